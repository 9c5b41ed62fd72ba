"""Testing a trained model on video: threshold, figures of merit, rows of scores, pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalps import protocols
from fastalps.calibration import Calibration
from fastalps.cli import plots
from fastalps.cli.evaluation import (
    Evaluation,
    examples,
    flag_rates,
    rates_text,
    table_head,
    table_row,
)
from fastalps.cli.options import EvaluationOptions
from fastalps.data import Clip, moving_patches
from fastalps.frame_scores import FrameScores, reduce_patches
from fastalps.gate import MotionGate
from fastalps.models import SCORE_KINDS
from fastalps.scoring import Scorer
from fastalps.training import FitResult

# Patches in the picture of reconstructions where none is anomalous.
NORMAL_EXAMPLES = 16
COLUMNS = ("clip", "frame", "anomalous", *SCORE_KINDS, "flagged")


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


def evaluate_video(fitted: FitResult, video: Video, options: EvaluationOptions) -> Evaluation:
    """Scores test clips, every patch of them; the threshold comes from the held-out normal clips,
    under the motion gate, as `fastalps-score` applies it."""
    calibration = _calibrate(_scorer(fitted, options, video.gate), video, options)
    scorer = _scorer(fitted, options, None)
    results, rate = _score(scorer, video.test)
    kept = [video.gate.kept(clip.frames, scorer.patch_size) for clip in video.test]
    labels = [
        torch.zeros(len(clip.frames), dtype=torch.bool) if clip.labels is None else clip.labels
        for clip in video.test
    ]
    curves = {
        kind: [
            _gated_frames(result[kind], keep, options)
            for result, keep in zip(results, kept, strict=True)
        ]
        for kind in SCORE_KINDS
    }
    metrics = _metrics(results, kept, video, scorer.patch_size, options.top_k)
    metrics["reported"] = metrics[fitted.score]
    flagged = torch.cat(curves[fitted.score]) > calibration.threshold
    metrics["threshold"] = flag_rates(flagged, torch.cat(labels))
    metrics["frames_per_second"] = round(rate, 2)

    def draw(folder: Path) -> None:
        _draw_curves(folder, video, kept, curves, labels, calibration)
        patches, marks = _patch_examples(video.test, scorer.patch_size, video.gate)
        plots.reconstructions(folder / "reconstructions.png", fitted.model, patches, marks)

    lines = [
        f"epoch {fitted.best_epoch} kept (chosen by {fitted.selection}); {len(flagged)} test "
        f"frames, every patch of them, scored at {rate:,.1f} frames/s ({scorer.precision})",
        *_tables(metrics, fitted.score, options.frame_reduce),
        rates_text(metrics["threshold"], "frames"),
    ]
    rows = _frame_rows(video.test, labels, curves, calibration)
    return Evaluation(metrics, COLUMNS, rows, lines, calibration, draw)


def evaluate_normal_video(
    fitted: FitResult, video: Video, options: EvaluationOptions
) -> Evaluation:
    """Sets the threshold on the held-out clips; their scores are the run's scores.csv."""
    scorer = _scorer(fitted, options, video.gate)
    calibration = _calibrate(scorer, video, options)
    results, rate = _score(scorer, video.held_out)
    frames = sum(len(clip.frames) for clip in video.held_out)
    curves = [result[fitted.score].frames.cpu() for result in results]
    rows: list[tuple[Any, ...]] = []
    for clip, result in zip(video.held_out, results, strict=True):
        for t in range(len(clip.frames)):
            values = [float(result[kind].frames[t]) for kind in SCORE_KINDS]
            chosen = float(result[fitted.score].frames[t])
            rows.append((clip.name, t + 1, *values, chosen > calibration.threshold))
    metrics: dict[str, Any] = {
        "held_out_frames": frames,
        "frames_per_second": round(rate, 2),
        "reported": None,
        "why": "no labelled test video: there is nothing to compute a figure of merit from",
    }

    def draw(folder: Path) -> None:
        normal = torch.zeros(frames, dtype=torch.bool)
        plots.histogram(
            folder / "histogram.png",
            torch.cat(curves),
            normal,
            calibration,
            f"{fitted.score} score of held-out normal frames",
        )
        plots.timelines(
            folder / "timeline.png",
            [clip.name for clip in video.held_out],
            curves,
            [torch.zeros(len(curve), dtype=torch.bool) for curve in curves],
            calibration,
        )
        patches = moving_patches(video.held_out, scorer.patch_size, video.gate)
        patches = patches[:: max(1, len(patches) // NORMAL_EXAMPLES)][:NORMAL_EXAMPLES]
        marks = torch.zeros(len(patches), dtype=torch.bool)
        plots.reconstructions(folder / "reconstructions.png", fitted.model, patches, marks)

    lines = [
        f"epoch {fitted.best_epoch} kept (chosen by {fitted.selection}); {frames} held-out normal "
        f"frames scored at {rate:,.1f} frames/s ({scorer.precision})",
        "there are no labelled anomalies, so no AUROC: see how the run scores your own videos",
    ]
    columns = ("clip", "frame", *SCORE_KINDS, "flagged")
    return Evaluation(metrics, columns, rows, lines, calibration, draw)


def _scorer(fitted: FitResult, options: EvaluationOptions, gate: MotionGate | None) -> Scorer:
    return Scorer(
        fitted.model,
        fitted.score,
        gate=gate,
        frame_reduce=options.frame_reduce,
        top_k=options.top_k,
    )


def _calibrate(scorer: Scorer, video: Video, options: EvaluationOptions) -> Calibration:
    """The threshold of frames, with how the run's frames are to be made."""
    found = scorer.calibrate(video.held_out, options.target_fpr, level="frame")
    return replace(found, settings={**found.settings, "frames": video.frames})


def _score(scorer: Scorer, clips: Sequence[Clip]) -> tuple[list[dict[str, FrameScores]], float]:
    """The scores of each clip, and frames a second."""
    begin = time.perf_counter()
    results = [scorer.scores_frames(clip.frames) for clip in clips]
    seconds = time.perf_counter() - begin
    return results, sum(len(clip.frames) for clip in clips) / seconds


def _metrics(
    results: Sequence[dict[str, FrameScores]],
    kept: Sequence[Tensor],
    video: Video,
    patch_size: tuple[int, int],
    top_k: int,
) -> dict[str, Any]:
    """Figures of merit of each kind of score and of what needs no learning."""
    cut: dict[str, Any] = {"patch_size": patch_size, "kept": kept, "top_k": top_k}
    metrics: dict[str, Any] = {
        kind: protocols.evaluate_video([result[kind] for result in results], video.test, **cut)
        for kind in SCORE_KINDS
    }
    metrics["motion_baseline"] = protocols.evaluate_video(video.baseline, video.test, **cut)
    return metrics


def _draw_curves(
    folder: Path,
    video: Video,
    kept: Sequence[Tensor],
    curves: dict[str, list[Tensor]],
    labels: Sequence[Tensor],
    calibration: Calibration,
) -> None:
    """The pictures of frame scores: ROC curves, histogram, timelines."""
    all_labels, kind = torch.cat(list(labels)), calibration.score
    still = [scores.where(keep, 0.0) for scores, keep in zip(video.baseline, kept, strict=True)]
    ranked = {f"{name} score": (torch.cat(curve), all_labels) for name, curve in curves.items()}
    baseline = torch.cat([reduce_patches(scores, "max") for scores in still])
    ranked["motion, no learning"] = (baseline, all_labels)
    plots.roc(folder / "roc.png", ranked, f"ROC over {len(all_labels)} test frames, micro")
    plots.histogram(
        folder / "histogram.png",
        torch.cat(curves[kind]),
        all_labels,
        calibration,
        f"{kind} score of test frames",
    )
    plots.timelines(
        folder / "timeline.png",
        [clip.name for clip in video.test],
        curves[kind],
        labels,
        calibration,
    )


def _tables(metrics: dict[str, Any], chosen: str, reduce: str) -> list[str]:
    """Figures of merit as lines for the screen."""
    lines = [table_head(f"frames, {reduce} over gated patches")]
    for kind in (*SCORE_KINDS, "motion_baseline"):
        level = metrics[kind].get("frame", {}).get("micro", {}).get(reduce, {})
        if "gated" in level:
            mark = "  <- chosen before test" if kind == chosen else ""
            lines.append(table_row(kind, level["gated"]) + mark)
    if "patch" in metrics["average"]:
        lines.append(table_head("patches (overlap above 30%)"))
        for kind in (*SCORE_KINDS, "motion_baseline"):
            for which in ("all", "gated"):
                lines.append(table_row(f"{kind}, {which}", metrics[kind]["patch"][which]))
    return lines


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
    return examples(images[sure], marks[sure] == 1)
