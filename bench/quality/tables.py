"""Finished cells as the paper's tables, in Markdown; missing cells are named, never estimated."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.cells import CLASSES, Cell, read
from bench.quality.video import PROTOCOL, SMOOTH, VideoCell

# Table I of the paper, AUROC in %.
PAPER_ALPS = {
    "mnist": (99.68, 99.92, 94.09, 96.19, 98.31, 97.25, 99.64, 97.25, 95.56, 98.65),
    "fashion-mnist": (94.42, 98.46, 89.82, 90.65, 91.68, 90.40, 80.43, 97.88, 97.87, 97.88),
}
PAPER_MEAN = {"mnist": 97.65, "fashion-mnist": 92.94}
# Table III of the paper, which has means alone.
PAPER_ABLATION = {"mnist": {"none": 95.42, "noise": 95.95}}
LABELS = {
    "alps": "ALPS",
    "noise": "random noise",
    "none": "plain autoencoder",
    "fast": "ALPS, preset fast",
    "ocsvm": "OCSVM",
    "iforest": "Isolation Forest",
    "pca": "PCA",
}
# What a row says after the method's name.
KINDS = {"reported": "", "ours": ", ours: smoothed and relative errors allowed"}
# The kinds of score that ALPS gets rows of.
ALPS_KINDS = (
    "reported",
    "normal",
    "perturbed",
    "average",
    "relative_normal",
    "smoothed_normal",
    "relative_smoothed_normal",
)


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
    if len(classes) == CLASSES:
        lines += [
            _row([f"paper's {LABELS[method]}", *[""] * CLASSES, f"{mean:.2f}", "", ""])
            for method, mean in PAPER_ABLATION.get(dataset, {}).items()
            if method in methods
        ]
    missing: list[str] = []
    for method in methods:
        kinds = list(ALPS_KINDS) if method in ("alps", "fast") else ["reported"]
        if method not in ("ocsvm", "iforest"):
            kinds.append("ours")
        for kind in kinds:
            found = _figures(dataset, protocol, method, kind, classes, seeds, results)
            name = LABELS[method] + KINDS.get(kind, f", {kind.replace('_', ' ')} score")
            spread = found.spread or "-"
            lines.append(_row([name, *found.classes, found.mean, spread, str(found.seeds)]))
            if kind == "reported":
                missing += found.missing
    lines += ["", f"Missing cells: {', '.join(missing) if missing else 'none'}."]
    return lines


@dataclass(frozen=True)
class _Figures:
    """A kind of score by a method, in % as text; "-" where cells are missing.

    Attributes:
        classes: means over the seeds there are.
        mean: of the classes; of all or of none, or it would look like one over all.
        spread: standard deviation of the mean over seeds; empty with fewer than two.
        seeds: with every class.
        missing: names of cells.
    """

    classes: list[str]
    mean: str
    spread: str
    seeds: int
    missing: list[str]


def _figures(
    dataset: str,
    protocol: str,
    method: str,
    kind: str,
    classes: Sequence[int],
    seeds: Sequence[int],
    results: Path,
) -> _Figures:
    found: dict[tuple[int, int], float] = {}
    missing = []
    for c in classes:
        for seed in seeds:
            cell = Cell(dataset, c, seed, method)
            record = read(cell, results, protocol)
            if record is None:
                missing.append(cell.name)
            else:
                found[c, seed] = 100 * record["auroc"][kind]
    texts, means = [], []
    for c in classes:
        values = [found[c, seed] for seed in seeds if (c, seed) in found]
        means.append(statistics.mean(values) if values else None)
        texts.append("-" if means[-1] is None else f"{means[-1]:.2f}")
    known = [mean for mean in means if mean is not None]
    mean = f"{statistics.mean(known):.2f}" if len(known) == len(classes) else "-"
    whole = [seed for seed in seeds if all((c, seed) in found for c in classes)]
    by_seed = [statistics.mean(found[c, seed] for c in classes) for seed in whole]
    spread = f"{statistics.stdev(by_seed):.2f}" if len(by_seed) > 1 else ""
    return _Figures(texts, mean, spread, len(whole), missing)


# The rows of a method in the summary: (label, protocol, kind of score).
SUMMARY_ROWS = (
    ("{}, `paper`", "paper", "reported"),
    ("ours, `paper`", "paper", "ours"),
    ("{}, `strict`, normal score", "strict", "normal"),
    ("ours, `strict`", "strict", "ours"),
)


def summary_table(
    dataset: str, classes: Sequence[int], seeds: Sequence[int], results: Path
) -> list[str]:
    """ALPS by class under both protocols, then the means of every method that has cells."""
    head = [dataset, *map(str, classes), "mean", "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    published = PAPER_ALPS.get(dataset)
    if published and len(classes) == CLASSES:
        texts = [f"{published[c]:.2f}" for c in classes]
        lines.append(_row(["paper's ALPS", *texts, f"{PAPER_MEAN[dataset]:.2f}", ""]))
    for label, protocol, kind in SUMMARY_ROWS:
        found = _figures(dataset, protocol, "alps", kind, classes, seeds, results)
        name = label.format(LABELS["alps"])
        lines.append(_row([name, *found.classes, _with_spread(found), str(found.seeds)]))
    head = [
        "means",
        "paper's",
        *(label.format("").removeprefix(", ") for label, _, _ in SUMMARY_ROWS),
        "seeds",
    ]
    lines += ["", _row(head), _row(["---"] * len(head))]
    means = {**PAPER_ABLATION.get(dataset, {}), "alps": PAPER_MEAN.get(dataset)}
    for method, label in LABELS.items():
        parts = [
            _figures(dataset, protocol, method, kind, classes, seeds, results)
            if kind != "ours" or method not in ("ocsvm", "iforest")
            else None
            for _, protocol, kind in SUMMARY_ROWS
        ]
        complete = [part for part in parts if part and part.seeds]
        if complete:
            mean = means.get(method)
            cells = ["" if part is None else _with_spread(part) for part in parts]
            published_mean = "" if mean is None else f"{mean:.2f}"
            lines.append(_row([label, published_mean, *cells, str(complete[0].seeds)]))
    return lines


def _with_spread(found: _Figures) -> str:
    return found.mean + (f" ±{found.spread}" if found.spread else "")


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


# Rows of table II: (label, variant, entry of the record's metrics).
VIDEO_ROWS = (
    ("no learning: change since the frame before", "gray", "motion_baseline"),
    ("the same, relative to contrast, options as below", "motion", "motion_baseline_ours"),
    ("plain: gray patches, average score", "gray", "average"),
    ("motion patches, average score", "motion", "average"),
    ("ours: motion patches, relative to contrast, options by rehearsal", "motion", "ours"),
    ("the same, but the normal score", "motion", "ours_normal"),
)
# Columns: (head, level, path to the figures).
VIDEO_COLUMNS = (
    ("frames, max", ("frame", "micro", "max", "gated")),
    ("frames, top patches over 21 frames", ("frame", "micro_smooth21", "topk", "gated")),
    ("all patches", ("patch", "all")),
    ("moving patches", ("patch", "gated")),
)
PAPER_VIDEO = "98.16 / 6"


def video_table(seeds: Sequence[int], results: Path) -> list[str]:
    """Table II: AUROC / EER in %, means over the seeds there are (spread: standard deviation)."""
    head = ["", *(name for name, _ in VIDEO_COLUMNS), "seeds"]
    lines = [_row(head), _row(["---"] * len(head))]
    lines.append(_row(["paper's ALPS (protocol not stated)", PAPER_VIDEO, "", "", "", ""]))
    missing: set[str] = set()
    for label, variant, entry in VIDEO_ROWS:
        records = []
        for seed in seeds:
            cell = VideoCell(variant, seed)
            record = read(cell, results, PROTOCOL)
            if record is None:
                missing.add(cell.name)
            else:
                records.append(record["metrics"][entry])
        texts = [_video_figure(records, path) for _, path in VIDEO_COLUMNS]
        lines.append(_row([label, *texts, str(len(records))]))
    lines += ["", f"Missing cells: {', '.join(sorted(missing)) if missing else 'none'}."]
    return lines


def _video_figure(records: Sequence[dict[str, Any]], path: Sequence[str]) -> str:
    found: dict[str, list[float]] = {"auroc": [], "eer": []}
    for record in records:
        node: Any = record
        for name in path:
            node = node[name]
        for key, values in found.items():
            values.append(100 * node[key])
    if not found["auroc"]:
        return "-"
    area, equal = (statistics.mean(values) for values in found.values())
    # What learns nothing is the same for every seed.
    spread = statistics.stdev(found["auroc"]) if len(found["auroc"]) > 1 else 0.0
    return f"{area:.1f}{f' (±{spread:.1f})' if spread >= 0.05 else ''} / {equal:.1f}"


def summary(record: dict[str, Any]) -> str:
    """The figure that tells how a cell went."""
    if "auroc" in record:
        return f"{100 * record['auroc']['reported']:.2f}%"
    figures = record["metrics"]["ours"]["frame"][f"micro_smooth{SMOOTH}"]["topk"]["gated"]
    return "-" if figures["auroc"] is None else f"{100 * figures['auroc']:.2f}%"
