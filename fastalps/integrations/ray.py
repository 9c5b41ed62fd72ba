"""Ray Data: callable classes for ``Dataset.map_batches`` that score videos, or frames.

Ray itself is not needed to import this; ``pip install 'fastalps[ray]'`` brings it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import fastalps
from fastalps.calibration import Calibration
from fastalps.cli.frame_sources import Chunk, Source
from fastalps.cli.options import ScoreOptions
from fastalps.cli.run_folder import model_path
from fastalps.cli.score import make_scorer
from fastalps.data import motion_frames
from fastalps.environment import find_device
from fastalps.errors import UserError
from fastalps.gate import MotionGate
from fastalps.scoring import Scorer

Batch = dict[str, Any]
_ERRORS = ("raise", "keep")


class VideoScorer:
    """Scores the videos of a batch: paths in, a row for every frame out.

    Each actor holds the model once; a video is read and scored by one actor, in chunks, so that
    memory does not depend on its length. Scores are those of ``fastalps-score``.

        videos = ray.data.from_items([{"path": p} for p in paths])
        rows = videos.map_batches(
            VideoScorer, fn_constructor_args=["runs/gate"], concurrency=4, num_cpus=1, batch_size=1
        )

    Args:
        run: folder of a run of fastalps-train on video, or its model.safetensors; a path that every
            node sees.
        column: that holds the paths: of video files, or of folders of frames.
        errors: "raise": a video that cannot be read, or not to its end, stops the whole job;
            "keep": the rows before the error stay, and the video's last row says what is wrong in
            the column "error", which is empty in all others, with frame 0 and score NaN.
        precision, device, chunk: see ``fastalps-score --help``; "auto" takes the GPU that Ray gave
            the actor (``num_gpus=1``), else the CPU.
        threshold: flag what scores above this; None = the run's own threshold.

    Raises:
        UserError: no such run, or it is no run on gray video.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        column: str = "path",
        *,
        errors: str = "raise",
        precision: str = "auto",
        device: str = "auto",
        chunk: int = 128,
        threshold: float | None = None,
    ) -> None:
        if errors not in _ERRORS:
            raise UserError(f"errors must be raise or keep, got {errors!r}")
        self.column, self.errors = column, errors
        self.options = ScoreOptions(precision, device, threshold, chunk=chunk)
        self.scorer, self.calibration = _load(run, self.options)
        if self.calibration.level == "image" or self.scorer.channels != 1:
            raise UserError(f"{run} is no run on gray video; use FrameScorer, or train one")
        self._gate = self.scorer.gate

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Scores the videos of a batch.

        Args:
            batch: the column of paths, (n,) strings.

        Returns:
            an iterator of batches, one for each chunk of frames: "path" (as given), "frame" (the
            name of its file, or its number from 1), "time" (seconds since the first frame; NaN =
            unknown), "score" (higher = more anomalous), "flagged"; with errors="keep" also "error".

        Raises:
            UserError: a video cannot be read, and errors is "raise".
        """
        for path in _column(batch, self.column):
            try:
                for chunk, scores in self._score(str(path)):
                    yield self._rows(str(path), chunk.names, chunk.times, scores, "")
            except UserError as error:
                if self.errors == "raise":
                    raise
                yield self._rows(str(path), ["0"], [None], np.full(1, np.nan), str(error))

    def _score(self, path: str) -> Iterator[tuple[Chunk, np.ndarray[Any, Any]]]:
        waiting: deque[Chunk] = deque()
        moving = self.calibration.settings.get("frames") == "motion"
        with Source(path, self.options, realtime=False) as source:
            if source.live:
                raise UserError(f"{source.name} has no end; score a camera with fastalps-score")
            if self._gate is not None:
                background = source.background(moving)
                self.scorer.gate = MotionGate(self._gate.threshold, background)

            def pixels() -> Iterator[torch.Tensor]:
                before = None
                for chunk in source:
                    waiting.append(chunk)
                    yield motion_frames(chunk.frames, before) if moving else chunk.frames
                    before = chunk.frames[-1].clone()

            for result in self.scorer.score_frames(pixels()):
                yield waiting.popleft(), result.frames.cpu().numpy()

    def _rows(
        self,
        path: str,
        names: list[str],
        times: list[float | None],
        scores: np.ndarray[Any, Any],
        error: str,
    ) -> Batch:
        rows: Batch = {
            "path": np.array([path] * len(names), dtype=object),
            "frame": np.array(names, dtype=object),
            "time": np.array([np.nan if t is None else t for t in times], dtype=np.float64),
            "score": scores.astype(np.float32),
            "flagged": scores > _threshold(self.options, self.calibration),
        }
        if self.errors == "keep":
            rows["error"] = np.array([error] * len(names), dtype=object)
        return rows


class FrameScorer:
    """Scores the images or frames of a batch, each by itself: pixels in, a score each out.

        images = ray.data.read_images("images", mode="L", size=(28, 28), include_paths=True)
        rows = images.map_batches(FrameScorer, fn_constructor_args=["runs/two"], concurrency=4)

    Args:
        run: folder of a run of fastalps-train, or its model.safetensors; a path that every node
            sees.
        column: that holds the pixels.
        background: uint8 (H, W), what the motion gate of a run on gray frames compares with, such
            as ``fastalps.gate.clip_background`` of a clip of the camera.
        precision, device, batch_size: see ``fastalps-score --help``.
        threshold: flag what scores above this; None = the run's own threshold.

    Raises:
        UserError: no such run; one whose gate needs a background; one on frames of motion, which
            are scored with the frame before them, by `VideoScorer`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        column: str = "image",
        *,
        background: np.ndarray[Any, Any] | None = None,
        precision: str = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        threshold: float | None = None,
    ) -> None:
        self.column = column
        self.options = ScoreOptions(precision, device, threshold, batch_size=batch_size)
        self.scorer, self.calibration = _load(run, self.options)
        if self.calibration.settings.get("frames") == "motion":
            raise UserError(f"{run} scores motion, which a frame alone does not show; VideoScorer")
        if self.scorer.gate is not None:
            if background is None:
                raise UserError(f"{run} has a motion gate; give the camera's background")
            still = torch.from_numpy(np.array(background))
            self.scorer.gate = MotionGate(self.scorer.gate.threshold, still)

    def __call__(self, batch: Batch) -> Batch:
        """Scores a batch.

        Args:
            batch: the column of pixels, uint8 (n, H, W) or (n, H, W, C), and any others.

        Returns:
            the batch without its pixels, with "score" (higher = more anomalous) and "flagged".

        Raises:
            UserError: no such column; pixels of different sizes. ValueError: not the model's shape.
        """
        pixels = _column(batch, self.column)
        if pixels.dtype == object:
            raise UserError(f"the images of column {self.column!r} differ in size; resize them")
        pixels = pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)
        images = torch.from_numpy(np.array(pixels))
        if self.calibration.level == "image":
            scores = self.scorer.score_images(images).numpy()
        else:
            scores = self.scorer.score_frames(images).frames.numpy()
        rest = {name: values for name, values in batch.items() if name != self.column}
        return {
            **rest,
            "score": scores,
            "flagged": scores > _threshold(self.options, self.calibration),
        }


def _load(run: str | os.PathLike[str], options: ScoreOptions) -> tuple[Scorer, Calibration]:
    model = fastalps.load(model_path(os.fspath(run)))
    if model.calibration is None:
        raise UserError(f"{run}: the model has no threshold; calibrate and save it")
    device = str(find_device(options.device))
    return make_scorer(model, model.calibration, options, device), model.calibration


def _column(batch: Batch, name: str) -> np.ndarray[Any, Any]:
    if name not in batch:
        raise UserError(f"the batch has no column {name!r}; it has {', '.join(batch)}")
    return np.asarray(batch[name])


def _threshold(options: ScoreOptions, calibration: Calibration) -> float:
    return calibration.threshold if options.threshold is None else options.threshold
