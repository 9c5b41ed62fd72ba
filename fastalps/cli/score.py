"""``fastalps-score``: a trained run and new images or frames in, scores and pictures out."""

from __future__ import annotations

import heapq
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastalps
from fastalps import environment
from fastalps.calibration import level_scores
from fastalps.checkpoint import SCORE_MEANING, Calibration
from fastalps.cli import command, figures, run_folder
from fastalps.cli.options import make_parser, parse, pick
from fastalps.cli.overlays import Frame, draw_overlay
from fastalps.data import (
    IMAGE_SUFFIXES,
    iter_frames,
    motion_frames,
    read_images,
    still_background,
)
from fastalps.data.frames import frame_sample
from fastalps.drift import Drift, DriftMonitor
from fastalps.errors import UserError
from fastalps.files import make_folder
from fastalps.gate import CLIP_SAMPLES, MotionGate, clip_background
from fastalps.models import ALPS
from fastalps.scoring import Scorer

NAME = "fastalps-score"
OVERLAYS = "overlays"
TIMELINE = "timeline.png"
SUMMARY = "summary.json"
logger = logging.getLogger("fastalps")

USAGE = """fastalps-score RUN INPUT --out DIR [options]

  fastalps-score runs/two new-images --out scored
  fastalps-score runs/ped2 data/UCSDped2/Test/Test001 --out scored --overlays 20"""

DESCRIPTION = """Scores new data with a run of fastalps-train.

RUN is the run's folder (or its model.safetensors). INPUT is, for a run on images, a folder of
images (sub-folders too) or one image, resized to the model's size where they differ; for a run on
video, a folder of the frames of one clip, of any size from a patch up. DIR
gets scores.csv (name, score, flagged), timeline.png, summary.json and, for video, overlays/: the
frames with the highest scores under their heatmaps. Flagged is what scores above the threshold that
the run set on held-out normal data; a line warns where the scores have drifted from that data's."""


@dataclass(frozen=True)
class ScoreOptions:
    """Scoring.

    Attributes:
        precision: fp32, bf16 or auto (bf16 where the device multiplies it in hardware).
        device: cpu, cuda, cuda:1, ... or auto.
        threshold: flag what scores above this, in place of the run's own threshold.
        overlays: frames to draw with their heatmaps, those with the highest scores; -1 = all.
        chunk: frames read and scored at a time.
        batch_size: patches or images a network call; null = chosen by size and device.
    """

    precision: str = "auto"
    device: str = "auto"
    threshold: float | None = None
    overlays: int = 10
    chunk: int = 128
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.overlays < -1:
            raise UserError(f"overlays must be a number of frames, or -1 for all: {self.overlays}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"threshold must be a finite number, got {self.threshold}")
        if self.chunk < 1:
            raise UserError(f"chunk must be a number of frames from 1 up, got {self.chunk}")


@dataclass
class Scored:
    """Names and scores of what was scored, the time it took, and whether they drifted."""

    names: list[str]
    scores: list[Tensor]
    monitor: DriftMonitor | None
    seconds: float = 0.0
    patches: int = 0
    kept: int = 0
    drift: Drift | None = None

    def watch(self, scores: Tensor) -> None:
        """Compares the next scores with the calibration's; says so when they drift at first."""
        if self.monitor is not None:
            self._report(self.monitor.update(scores))

    def finish(self) -> None:
        """Compares the scores that fill no window."""
        if self.monitor is not None:
            self._report(self.monitor.finish())

    def _report(self, drift: Drift | None) -> None:
        if drift is not None and self.drift is None:
            self.drift = drift
            logger.warning("%s", drift)

    def curve(self) -> Tensor:
        return torch.cat([torch.empty(0), *self.scores])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, see `fastalps.cli.command.run`."""
    return command.run(NAME, score, arguments)


def score(arguments: Sequence[str]) -> None:
    """Parses the arguments, scores the input and writes the results."""
    parser = make_parser(NAME, DESCRIPTION, USAGE, ScoreOptions)
    parser.add_argument("run", help="folder of a run of fastalps-train, or a model.safetensors")
    parser.add_argument("input", help="what to score")
    parser.add_argument("--out", required=True, help="folder for the results")
    namespace = parse(parser, arguments)
    options = pick(namespace, ScoreOptions)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fastalps.load(run_folder.model_path(namespace.run))
    calibration = model.calibration
    if calibration is None:
        raise UserError(f"{namespace.run}: the model has no threshold; calibrate and save it")
    scorer = make_scorer(model, calibration, options, device)
    source, folder = Path(namespace.input), make_folder(namespace.out)
    # Models saved before calibrations kept quantiles have nothing to compare with.
    scored = Scored([], [], DriftMonitor(calibration) if calibration.quantiles else None)
    if calibration.level == "image":
        _score_images(scored, scorer, source)
    else:
        _score_frames(scored, scorer, source, folder, calibration, options)
    scored.finish()
    _write(folder, scored, scorer, calibration, options, namespace)


def make_scorer(
    model: ALPS, calibration: Calibration, options: ScoreOptions, device: str
) -> Scorer:
    """A scorer with the settings that the threshold was set with."""
    settings = calibration.settings
    common: dict[str, Any] = {"batch_size": options.batch_size, "device": device}
    if calibration.level == "image":
        return Scorer(model, calibration.score, options.precision, **common)
    threshold = settings.get("gate_threshold")
    return Scorer(
        model,
        calibration.score,
        options.precision,
        stride=settings.get("stride"),
        edge=settings.get("edge", "cover"),
        gate=None if threshold is None else MotionGate(threshold),
        frame_reduce=settings.get("frame_reduce", "max"),
        top_k=settings.get("top_k", 3),
        **common,
    )


def _score_images(scored: Scored, scorer: Scorer, source: Path) -> None:
    if not source.exists():
        raise UserError(f"the input {source} does not exist; give a folder of images or an image")
    images, names = read_images(source, size=scorer.image_size, channels=scorer.channels)
    begin = time.perf_counter()
    scores = scorer.score_images(images)
    scored.seconds = time.perf_counter() - begin
    scored.names += names
    scored.scores.append(scores)
    scored.watch(scores)


def _score_frames(
    scored: Scored,
    scorer: Scorer,
    source: Path,
    folder: Path,
    calibration: Calibration,
    options: ScoreOptions,
) -> None:
    if source.is_file():
        raise UserError(
            f"{source} is a file; give the folder of the clip's frames "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    moving = calibration.settings.get("frames") == "motion"
    if scorer.gate is not None:
        if moving:
            size = frame_sample(source, 1).shape[1:]
            background = still_background((size[0], size[1]))
        else:
            # The whole clip's from the start; a stream would have to learn it as it goes.
            background = clip_background(frame_sample(source, CLIP_SAMPLES))
        scorer.gate = MotionGate(scorer.gate.threshold, background)
    worst: list[tuple[float, int, Frame]] = []
    threshold = calibration.threshold if options.threshold is None else options.threshold
    before = None
    for frames, names in iter_frames(source, options.chunk):
        begin = time.perf_counter()
        result = scorer.score_frames(motion_frames(frames, before) if moving else frames)
        before = frames[-1]
        scored.seconds += time.perf_counter() - begin
        scored.patches += result.patches.numel()
        scored.kept += result.patches.numel() if result.kept is None else int(result.kept.sum())
        offset = len(scored.names)
        scored.names += names
        scored.scores.append(result.frames.cpu())
        scored.watch(level_scores(result, calibration.level))
        for i, name in enumerate(names):
            value = float(result.frames[i])
            if options.overlays >= 0 and (
                not options.overlays or (len(worst) == options.overlays and value <= worst[0][0])
            ):
                continue
            frame = Frame(name, frames[i], result.heatmaps([i])[0].cpu(), value, threshold)
            if options.overlays < 0:
                draw_overlay(make_folder(folder / OVERLAYS), frame)
                continue
            heapq.heappush(worst, (value, offset + i, frame))
            if len(worst) > options.overlays:
                heapq.heappop(worst)
    for _, _, frame in worst:
        draw_overlay(make_folder(folder / OVERLAYS), frame)


def _write(
    folder: Path,
    scored: Scored,
    scorer: Scorer,
    calibration: Calibration,
    options: ScoreOptions,
    namespace: Any,
) -> None:
    if options.threshold is not None:
        meaning = f"{SCORE_MEANING}; above {options.threshold:g} it is flagged, as asked for"
        threshold = options.threshold
    else:
        meaning, threshold = calibration.explain(), calibration.threshold
    curve = scored.curve()
    flagged = curve > threshold
    item = "image" if calibration.level == "image" else "frame"
    rows = [
        (name, float(value), bool(flag))
        for name, value, flag in zip(scored.names, curve, flagged, strict=True)
    ]
    run_folder.write_scores(folder / run_folder.SCORES, (item, "score", "flagged"), rows)
    figures.timeline(
        folder / TIMELINE, curve, calibration, threshold, f"{Path(namespace.input).name}: scores"
    )
    rate = len(curve) / scored.seconds if scored.seconds else 0.0
    facts: dict[str, Any] = {
        f"{item}s": len(curve),
        "flagged": int(flagged.sum()),
        "threshold": threshold,
        "threshold_means": meaning,
        f"{item}s_per_second": round(rate, 2),
        "timed": "scoring only, from decoded pixels to scores; not reading, not drawing",
        "precision": scorer.precision,
    }
    if item == "frame":
        facts |= {"patches": scored.patches, "patches_past_the_motion_gate": scored.kept}
    if scored.monitor is not None:
        facts["drift"] = {
            "windows": scored.monitor.windows,
            "window": scored.monitor.window,
            "drifted": scored.monitor.drifted,
            "false_alarm_rate_of_a_window": scored.monitor.false_alarm_rate,
            "first": None if scored.drift is None else str(scored.drift),
        }
    record = environment.result_record(
        f"score, level {calibration.level}", facts, seed=None, input=Path(namespace.input).name
    )
    run_folder.write_metrics(folder / SUMMARY, record)
    print(
        f"{len(curve)} {item}s, {int(flagged.sum())} flagged; scored at {rate:,.1f} {item}s/s "
        f"({scorer.precision}; decoding and drawing not counted)"
    )
    if item == "frame" and scored.patches:
        share = 100 * scored.kept / scored.patches
        print(f"{share:.1f}% of the patches passed the motion gate; the others score 0")
    print(meaning)
    if scored.monitor is not None:
        print(scored.monitor.summary())
    print(f"wrote {folder}: {run_folder.SCORES}, {TIMELINE}, {SUMMARY}")


if __name__ == "__main__":
    sys.exit(main())
