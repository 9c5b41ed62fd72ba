"""What can be told of a model of video without any anomaly: its threshold and normal scores."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastalps.checkpoint import SCORE_KINDS
from fastalps.cli import figures
from fastalps.cli.evaluation import Evaluation, Video
from fastalps.cli.options import EvaluationOptions
from fastalps.data import moving_patches
from fastalps.scoring import Scorer
from fastalps.training import FitResult

EXAMPLES = 16


def evaluate_normal_video(
    fitted: FitResult, video: Video, options: EvaluationOptions
) -> Evaluation:
    """Sets the threshold on the held-out clips; their scores are the run's scores.csv."""
    scorer = Scorer(
        fitted.model,
        fitted.score,
        gate=video.gate,
        frame_reduce=options.frame_reduce,
        top_k=options.top_k,
    )
    calibration = scorer.calibrate(video.held_out, options.target_fpr, level="frame")
    calibration = replace(calibration, settings={**calibration.settings, "frames": video.frames})
    begin = time.perf_counter()
    results = [scorer.scores_frames(clip.frames) for clip in video.held_out]
    frames = sum(len(clip.frames) for clip in video.held_out)
    rate = frames / (time.perf_counter() - begin)
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
        figures.histogram(
            folder / "histogram.png",
            torch.cat(curves),
            normal,
            calibration,
            f"{fitted.score} score of held-out normal frames",
        )
        figures.timelines(
            folder / "timeline.png",
            [clip.name for clip in video.held_out],
            curves,
            [torch.zeros(len(curve), dtype=torch.bool) for curve in curves],
            calibration,
        )
        patches = moving_patches(video.held_out, scorer.patch_size, video.gate)
        patches = patches[:: max(1, len(patches) // EXAMPLES)][:EXAMPLES]
        marks = torch.zeros(len(patches), dtype=torch.bool)
        figures.reconstructions(folder / "reconstructions.png", fitted.model, patches, marks)

    lines = [
        f"epoch {fitted.best_epoch} kept (chosen by {fitted.selection}); {frames} held-out normal "
        f"frames scored at {rate:,.1f} frames/s ({scorer.precision})",
        "there are no labelled anomalies, so no AUROC: see how the run scores your own videos",
    ]
    columns = ("clip", "frame", *SCORE_KINDS, "flagged")
    return Evaluation(metrics, columns, rows, lines, calibration, draw)
