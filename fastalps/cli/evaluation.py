"""Testing a trained model: threshold, figures of merit, rows of scores, pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalps import protocols
from fastalps.checkpoint import SCORE_KINDS, Calibration
from fastalps.cli import figures
from fastalps.cli.options import EvaluationOptions
from fastalps.data import Clip, OneClassData, moving_patches
from fastalps.errors import UserError
from fastalps.frame_scores import FrameScores, reduce_patches
from fastalps.gate import MotionGate
from fastalps.scoring import Scorer
from fastalps.training import FitResult

# Examples in the picture of reconstructions, of each class.
EXAMPLES = 8


@dataclass(frozen=True)
class Video:
    """What a model of patches is tested on.

    Attributes:
        frames: what the clips' frames show: "gray" or "motion".
        held_out: normal clips that were not trained on.
        test: clips with labels or masks.
        gate: says which patches are looked at.
        baseline: for each test clip the scores (T, P) of `protocols.motion_baseline`.
    """

    frames: str
    held_out: Sequence[Clip]
    test: Sequence[Clip]
    gate: MotionGate
    baseline: Sequence[Tensor]


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
    metrics["threshold"] = _flag_rates(flagged, data.test_labels)
    metrics["images_per_second"] = round(rate, 1)
    rows = [
        (name, bool(label), *(float(kinds[kind][i]) for kind in SCORE_KINDS), bool(flagged[i]))
        for i, (name, label) in enumerate(zip(data.test_names, data.test_labels, strict=True))
    ]

    def draw(folder: Path) -> None:
        figures.roc(
            folder / "roc.png",
            {f"{kind} score": (values, data.test_labels) for kind, values in kinds.items()},
            f"{data.name}: ROC over {len(data.test)} test images",
        )
        figures.histogram(
            folder / "histogram.png",
            kinds[fitted.score],
            data.test_labels,
            calibration,
            f"{data.name}: {fitted.score} score of test images",
        )
        examples = _examples(data.test, data.test_labels)
        figures.reconstructions(folder / "reconstructions.png", fitted.model, *examples)

    lines = [
        f"epoch {fitted.best_epoch} kept (chosen by {fitted.selection}); "
        f"{len(data.test)} test images scored at {rate:,.0f} images/s ({scorer.precision})",
        _table_head("score"),
    ]
    for kind in SCORE_KINDS:
        mark = "  <- chosen before test" if kind == fitted.score else ""
        lines.append(_table_row(kind, metrics[kind]) + mark)
    lines.append(_rates_text(metrics["threshold"], "images"))
    columns = ("image", "anomalous", *SCORE_KINDS, "flagged")
    return Evaluation(metrics, columns, rows, lines, calibration, draw)


def evaluate_video(fitted: FitResult, video: Video, options: EvaluationOptions) -> Evaluation:
    """Scores test clips, every patch of them; the threshold comes from the held-out normal clips,
    under the motion gate, as `fastalps-score` applies it."""
    gate, test, motion = video.gate, video.test, video.baseline
    settings: dict[str, Any] = {"frame_reduce": options.frame_reduce, "top_k": options.top_k}
    gated = Scorer(fitted.model, fitted.score, gate=gate, **settings)
    calibration = gated.calibrate(video.held_out, options.target_fpr, level="frame")
    calibration = replace(calibration, settings={**calibration.settings, "frames": video.frames})
    everything = Scorer(fitted.model, fitted.score, **settings)
    frames = sum(len(clip.frames) for clip in test)
    begin = time.perf_counter()
    results = [everything.scores_frames(clip.frames) for clip in test]
    rate = frames / (time.perf_counter() - begin)
    kept = [gate.kept(clip.frames, everything.patch_size) for clip in test]
    cut: dict[str, Any] = {
        "patch_size": everything.patch_size,
        "kept": kept,
        "top_k": options.top_k,
    }
    metrics: dict[str, Any] = {
        kind: protocols.evaluate_video([result[kind] for result in results], test, **cut)
        for kind in SCORE_KINDS
    }
    metrics["motion_baseline"] = protocols.evaluate_video(motion, test, **cut)
    metrics["reported"] = metrics[fitted.score]
    curves = {
        kind: [
            _gated_frames(result[kind], keep, options)
            for result, keep in zip(results, kept, strict=True)
        ]
        for kind in SCORE_KINDS
    }
    labels = [
        torch.zeros(len(clip.frames), dtype=torch.bool) if clip.labels is None else clip.labels
        for clip in test
    ]
    all_labels, chosen = torch.cat(labels), torch.cat(curves[fitted.score])
    flagged = chosen > calibration.threshold
    metrics["threshold"] = _flag_rates(flagged, all_labels)
    metrics["frames_per_second"] = round(rate, 2)
    rows = _frame_rows(test, labels, curves, calibration)

    def draw(folder: Path) -> None:
        still = [scores.where(keep, 0.0) for scores, keep in zip(motion, kept, strict=True)]
        ranked = {f"{kind} score": (torch.cat(curve), all_labels) for kind, curve in curves.items()}
        baseline = torch.cat([reduce_patches(scores, "max") for scores in still])
        ranked["motion, no learning"] = (baseline, all_labels)
        figures.roc(folder / "roc.png", ranked, f"ROC over {len(all_labels)} test frames, micro")
        figures.histogram(
            folder / "histogram.png",
            chosen,
            all_labels,
            calibration,
            f"{fitted.score} score of test frames",
        )
        figures.timelines(
            folder / "timeline.png",
            [clip.name for clip in test],
            curves[fitted.score],
            labels,
            calibration,
        )
        patches, marks = _patch_examples(test, everything.patch_size, gate)
        figures.reconstructions(folder / "reconstructions.png", fitted.model, patches, marks)

    lines = [
        f"epoch {fitted.best_epoch} kept (chosen by {fitted.selection}); {frames} test frames, "
        f"every patch of them, scored at {rate:,.1f} frames/s ({everything.precision})",
        _table_head(f"frames, {options.frame_reduce} over gated patches"),
    ]
    for kind in (*SCORE_KINDS, "motion_baseline"):
        level = metrics[kind].get("frame", {}).get("micro", {}).get(options.frame_reduce, {})
        if "gated" in level:
            mark = "  <- chosen before test" if kind == fitted.score else ""
            lines.append(_table_row(kind, level["gated"]) + mark)
    if "patch" in metrics["average"]:
        lines.append(_table_head("patches (overlap above 30%)"))
        for kind in (*SCORE_KINDS, "motion_baseline"):
            for which in ("all", "gated"):
                lines.append(_table_row(f"{kind}, {which}", metrics[kind]["patch"][which]))
    lines.append(_rates_text(metrics["threshold"], "frames"))
    columns = ("clip", "frame", "anomalous", *SCORE_KINDS, "flagged")
    return Evaluation(metrics, columns, rows, lines, calibration, draw)


def _gated_frames(result: FrameScores, kept: Tensor, options: EvaluationOptions) -> Tensor:
    """Frame scores as a gated scorer gives them: dropped patches count as 0."""
    return reduce_patches(result.patches.where(kept, 0.0), options.frame_reduce, options.top_k)


def _frame_rows(
    clips: Sequence[Clip],
    labels: Sequence[Tensor],
    curves: dict[str, list[Tensor]],
    calibration: Calibration,
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for c, clip in enumerate(clips):
        for t in range(len(clip.frames)):
            values = [float(curves[kind][c][t]) for kind in SCORE_KINDS]
            flagged = float(curves[calibration.score][c][t]) > calibration.threshold
            rows.append((clip.name, t + 1, bool(labels[c][t]), *values, flagged))
    return rows


def _flag_rates(flagged: Tensor, anomalous: Tensor) -> dict[str, float | None]:
    """Shares flagged at the threshold: of normal and of anomalous test data."""
    shares: dict[str, float | None] = {}
    for name, chosen in (("false_positive_rate", ~anomalous), ("true_positive_rate", anomalous)):
        count = int(chosen.sum())
        shares[name] = float(flagged[chosen].float().mean()) if count else None
    return shares


def _examples(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced images of both classes, the normal ones first."""
    picks = []
    for wanted in (False, True):
        index = (labels == wanted).nonzero().flatten()
        count = min(EXAMPLES, len(index))
        picks.append(index[torch.arange(count) * len(index) // max(1, count)])
    chosen = torch.cat(picks)
    return images[chosen], labels[chosen]


def _patch_examples(
    clips: Sequence[Clip], patch_size: tuple[int, int], gate: MotionGate
) -> tuple[Tensor, Tensor]:
    """Moving test patches of both classes, by their masks."""
    patches, labels = [], []
    for clip in clips:
        if clip.masks is None:
            continue
        # A frame in eleven shows enough of a clip.
        part = slice(None, None, 11)
        thin = Clip(clip.name, clip.frames[part], None, clip.masks[part])
        still = replace(gate, background=gate.background_of(clip.frames))
        keep = still.kept(thin.frames, patch_size)
        patches.append(moving_patches([thin], patch_size, still))
        labels.append(protocols.patch_labels(clip.masks[part], patch_size)[keep])
    if not patches:
        return torch.empty(0, 1, *patch_size, dtype=torch.uint8), torch.empty(0, dtype=torch.bool)
    images, marks = torch.cat(patches), torch.cat(labels)
    sure = marks >= 0
    return _examples(images[sure], marks[sure] == 1)


def _table_head(name: str) -> str:
    return f"  {name:<36}{'AUROC %':>9}{'AUPR %':>9}{'EER %':>8}{'count':>9}"


def _table_row(name: str, values: dict[str, Any]) -> str:
    figures_text = "".join(
        f"{'-':>{width}}" if values[key] is None else f"{100 * values[key]:>{width}.2f}"
        for key, width in (("auroc", 9), ("aupr", 9), ("eer", 8))
    )
    return f"  {name:<36}{figures_text}{values['count']:>9}"


def _rates_text(rates: dict[str, float | None], what: str) -> str:
    parts = [
        f"{100 * value:.1f}% of the {which} test {what}"
        for which, value in (
            ("anomalous", rates["true_positive_rate"]),
            ("normal", rates["false_positive_rate"]),
        )
        if value is not None
    ]
    return f"the threshold flags {' and '.join(parts)}"
