"""Finished cells as the paper's tables, in Markdown; missing cells are named, never estimated."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.quality.cells import CLASSES, Cell, read

# Table I of the paper, AUROC in %.
PAPER_ALPS = {
    "mnist": (99.68, 99.92, 94.09, 96.19, 98.31, 97.25, 99.64, 97.25, 95.56, 98.65),
    "fashion-mnist": (94.42, 98.46, 89.82, 90.65, 91.68, 90.40, 80.43, 97.88, 97.87, 97.88),
}
PAPER_MEAN = {"mnist": 97.65, "fashion-mnist": 92.94}
# Table III of the paper: MNIST means.
PAPER_ABLATION = {"none": 95.42, "noise": 95.95, "alps": 97.65}
LABELS = {
    "alps": "ALPS",
    "noise": "random noise",
    "none": "plain autoencoder",
    "ocsvm": "OCSVM",
    "iforest": "Isolation Forest",
    "pca": "PCA",
}


def table(
    dataset: str,
    protocol: str,
    methods: Sequence[str],
    classes: Sequence[int],
    seeds: Sequence[int],
    results: Path,
) -> list[str]:
    """Rows of AUROC in % by class: the paper's, then each method's mean over the seeds there are,
    with the spread (standard deviation over seeds) of the mean."""
    head = ["", *map(str, classes), "mean", "spread", "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    if dataset in PAPER_ALPS:
        values = [PAPER_ALPS[dataset][c] for c in classes]
        mean = PAPER_MEAN[dataset] if len(classes) == CLASSES else statistics.mean(values)
        lines.append(_row(["paper's ALPS", *(f"{v:.2f}" for v in values), f"{mean:.2f}", "", ""]))
    missing: list[str] = []
    for method in methods:
        kinds = (
            ("reported", "normal", "perturbed", "average") if method == "alps" else ("reported",)
        )
        for kind in kinds:
            row, absent = _method_row(dataset, protocol, method, kind, classes, seeds, results)
            lines.append(row)
            if kind == "reported":
                missing += absent
    lines += ["", f"Missing cells: {', '.join(missing) if missing else 'none'}."]
    return lines


def _method_row(
    dataset: str,
    protocol: str,
    method: str,
    kind: str,
    classes: Sequence[int],
    seeds: Sequence[int],
    results: Path,
) -> tuple[str, list[str]]:
    found: dict[tuple[int, int], float] = {}
    absent = []
    for c in classes:
        for seed in seeds:
            cell = Cell(dataset, c, seed, method)
            record = read(cell, results, protocol)
            if record is None:
                absent.append(cell.name)
            else:
                found[c, seed] = 100 * record["auroc"][kind]
    texts, means = [], []
    for c in classes:
        values = [found[c, seed] for seed in seeds if (c, seed) in found]
        means.append(statistics.mean(values) if values else None)
        texts.append("-" if means[-1] is None else f"{means[-1]:.2f}")
    known = [mean for mean in means if mean is not None]
    # A mean over some classes only would look like one over all.
    mean = f"{statistics.mean(known):.2f}" if len(known) == len(classes) else "-"
    whole = [seed for seed in seeds if all((c, seed) in found for c in classes)]
    by_seed = [statistics.mean(found[c, seed] for c in classes) for seed in whole]
    spread = f"{statistics.stdev(by_seed):.2f}" if len(by_seed) > 1 else "-"
    name = LABELS[method] if kind == "reported" else f"{LABELS[method]}, {kind} score"
    return _row([name, *texts, mean, spread, str(len(whole))]), absent


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
