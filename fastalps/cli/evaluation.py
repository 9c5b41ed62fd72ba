"""Testing a trained model on images, and what testing on video has in common with it: figures of
merit, tables, examples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalps import protocols
from fastalps.calibration import Calibration
from fastalps.cli import plots
from fastalps.cli.options import EvaluationOptions
from fastalps.data import OneClassData
from fastalps.errors import UserError
from fastalps.models import SCORE_KINDS
from fastalps.scoring import Scorer
from fastalps.training import FitResult

# Examples in the picture of reconstructions, of each class.
EXAMPLES = 8


@dataclass(frozen=True)
class Evaluation:
    """What is written about a trained model.

    Attributes:
        metrics: ready for JSON.
        columns, rows: of scores.csv.
        lines: for the screen.
        calibration: the threshold.
        draw: writes the pictures into a folder.
    """

    metrics: dict[str, Any]
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    lines: list[str]
    calibration: Calibration
    draw: Callable[[Path], None]


def evaluate_images(
    fitted: FitResult, data: OneClassData, options: EvaluationOptions
) -> Evaluation:
    """Scores the test images of a one-class task; the threshold comes from its normal validation
    images."""
    scorer = Scorer(fitted.model, score=fitted.score)
    normal = data.validation[~data.validation_labels]
    if not len(normal):
        raise UserError(f"{data.name} has no held-out normal images to set a threshold on")
    calibration = scorer.calibrate(normal, options.target_fpr)
    begin = time.perf_counter()
    scores = scorer.scores_images(data.test)
    rate = len(data.test) / (time.perf_counter() - begin)
    kinds = scores._asdict()
    flagged = kinds[fitted.score] > calibration.threshold
    metrics: dict[str, Any] = {
        kind: protocols.figures(values, data.test_labels) for kind, values in kinds.items()
    }
    metrics["reported"] = metrics[fitted.score]
    metrics["threshold"] = flag_rates(flagged, data.test_labels)
    metrics["images_per_second"] = round(rate, 1)
    rows = [
        (name, bool(label), *(float(kinds[kind][i]) for kind in SCORE_KINDS), bool(flagged[i]))
        for i, (name, label) in enumerate(zip(data.test_names, data.test_labels, strict=True))
    ]

    def draw(folder: Path) -> None:
        plots.roc(
            folder / "roc.png",
            {f"{kind} score": (values, data.test_labels) for kind, values in kinds.items()},
            f"{data.name}: ROC over {len(data.test)} test images",
        )
        plots.histogram(
            folder / "histogram.png",
            kinds[fitted.score],
            data.test_labels,
            calibration,
            f"{data.name}: {fitted.score} score of test images",
        )
        shown = examples(data.test, data.test_labels)
        plots.reconstructions(folder / "reconstructions.png", fitted.model, *shown)

    lines = [
        f"epoch {fitted.best_epoch} kept (chosen by {fitted.selection}); "
        f"{len(data.test)} test images scored at {rate:,.0f} images/s ({scorer.precision})",
        table_head("score"),
    ]
    for kind in SCORE_KINDS:
        mark = "  <- chosen before test" if kind == fitted.score else ""
        lines.append(table_row(kind, metrics[kind]) + mark)
    lines.append(rates_text(metrics["threshold"], "images"))
    columns = ("image", "anomalous", *SCORE_KINDS, "flagged")
    return Evaluation(metrics, columns, rows, lines, calibration, draw)


def flag_rates(flagged: Tensor, anomalous: Tensor) -> dict[str, float | None]:
    """Shares flagged at the threshold: of normal and of anomalous test data."""
    shares: dict[str, float | None] = {}
    for name, chosen in (("false_positive_rate", ~anomalous), ("true_positive_rate", anomalous)):
        count = int(chosen.sum())
        shares[name] = float(flagged[chosen].float().mean()) if count else None
    return shares


def examples(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced images of both classes, the normal ones first."""
    picks = []
    for wanted in (False, True):
        index = (labels == wanted).nonzero().flatten()
        count = min(EXAMPLES, len(index))
        picks.append(index[torch.arange(count) * len(index) // max(1, count)])
    chosen = torch.cat(picks)
    return images[chosen], labels[chosen]


def table_head(name: str) -> str:
    return f"  {name:<36}{'AUROC %':>9}{'AUPR %':>9}{'EER %':>8}{'count':>9}"


def table_row(name: str, values: dict[str, Any]) -> str:
    figures_text = "".join(
        f"{'-':>{width}}" if values[key] is None else f"{100 * values[key]:>{width}.2f}"
        for key, width in (("auroc", 9), ("aupr", 9), ("eer", 8))
    )
    return f"  {name:<36}{figures_text}{values['count']:>9}"


def rates_text(rates: dict[str, float | None], what: str) -> str:
    parts = [
        f"{100 * value:.1f}% of the {which} test {what}"
        for which, value in (
            ("anomalous", rates["true_positive_rate"]),
            ("normal", rates["false_positive_rate"]),
        )
        if value is not None
    ]
    return f"the threshold flags {' and '.join(parts)}"
