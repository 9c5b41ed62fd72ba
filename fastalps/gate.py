"""The motion gate: static background is told from what moves, so that no network runs on it.

A patch is kept when the mean of |frame - background| over its pixels exceeds a threshold in gray
levels. The background of a static camera is the median of each pixel over time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalps import ops
from fastalps.chunks import plan_chunks
from fastalps.inputs import is_array, pair, release_mapped, to_tensor
from fastalps.scalars import is_whole, plain

# Bytes of frames that a median works on at a time: what stays in a core's cache (2-core AVX2
# machine, 180 frames of 240x360: 24 ms against 81 ms for torch.median).
_MEDIAN_BYTES = 1 << 20

# Frames that a median is taken over where the caller does not say. A stream keeps its samples in
# memory, so they are fewer: 64 frames of 1080 x 1920 are 133 MB.
CLIP_SAMPLES = 256
STREAM_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class MotionGate:
    """Keeps the patches in which something moves, by their difference from the background.

    Attributes:
        threshold: gray levels (0 to 255); a patch is kept when its mean absolute difference from
            the background is greater.
        background: uint8 (H, W); None = the median of the clip that is scored (`clip_background`),
            or of what was seen so far of a stream (`StreamingBackground`).
        samples: frames that the median is taken over at most; None = all of a clip. For a stream
            at most 64, which are kept in memory.

    Raises ValueError or TypeError when one of them is out of its range.
    """

    threshold: float = 3.0
    background: Tensor | None = None
    samples: int | None = CLIP_SAMPLES

    def __post_init__(self) -> None:
        for name in ("threshold", "samples"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(
                f"threshold must be a number of gray levels from 0 up, got {self.threshold}"
            )
        background = self.background
        if background is not None:
            if not isinstance(background, Tensor) or background.dtype != torch.uint8:
                kind = getattr(background, "dtype", type(background).__name__)
                raise TypeError(f"background must be a uint8 (H, W) tensor, got {kind}")
            if background.dim() != 2:
                raise ValueError(
                    f"background must be a uint8 (H, W) tensor, got shape {tuple(background.shape)}"
                )
        _check_samples(self.samples)

    def background_of(self, frames: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """The gate's own background, else that of the clip, see `clip_background`."""
        if self.background is not None:
            return self.background
        return clip_background(frames, self.samples)

    def kept(
        self,
        frames: Tensor | np.ndarray[Any, Any],
        patch_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        edge: str = "cover",
    ) -> Tensor:
        """Which patches of a clip are kept.

        Args:
            frames: uint8 (N, H, W).
            patch_size, stride, edge: see `fastalps.ops.patch_grid`.

        Returns:
            bool (N, P), P in the order of `patch_grid`.

        Raises:
            ValueError, TypeError: sizes that do not fit, frames that are not uint8.
        """
        check_gray(frames)
        count, height, width = frames.shape
        patch = pair(patch_size, "patch_size")
        plan = plan_chunks((height, width), patch, stride, edge, bytes_per_pixel=2)
        kept = torch.zeros(count, plan.patches, dtype=torch.bool)
        if count == 0:
            return kept
        background = self.background_of(frames)
        for part, band in plan.pieces(count):
            rows = slice(band.top, band.bottom)
            pixels = to_tensor(frames[part, rows])
            index = ops.active_patches(
                pixels,
                background[rows].to(pixels.device),
                patch,
                stride,
                threshold=self.threshold,
                edge=edge,
                dtype=torch.float16,
            )[1].cpu()
            kept[index[:, 0] + part.start, index[:, 1] + band.first] = True
            release_mapped(frames)
        return kept


def clip_background(
    frames: Tensor | np.ndarray[Any, Any], samples: int | None = CLIP_SAMPLES
) -> Tensor:
    """The background of a static camera: the median of each pixel over a clip.

    Args:
        frames: uint8 (N, H, W), N > 0; a tensor, an array or a memory map.
        samples: frames that the median is taken over: all when the clip has no more, else this
            many at even distances. None = all, whatever their number.

    Returns:
        uint8 (H, W) on the frames' device: the lower median, a gray level that does occur (for an
        even number of frames not the mean of the middle two).

    Raises:
        ValueError: no frames, wrong shape, samples < 1.
        TypeError: not uint8.
    """
    check_gray(frames)
    _check_samples(samples)
    count, height, width = frames.shape
    if count == 0:
        raise ValueError("frames must not be empty: there is no background of no frames")
    picks: Any = slice(None)
    if samples is not None and count > samples:
        chosen = np.arange(samples, dtype=np.int64) * count // samples
        picks = torch.from_numpy(chosen) if isinstance(frames, Tensor) else chosen
        count = samples
    device = frames.device if isinstance(frames, Tensor) else None
    background = torch.empty(height, width, dtype=torch.uint8, device=device)
    row_step = max(1, _MEDIAN_BYTES // (count * width))
    column_step = width if row_step > 1 else max(1, min(width, _MEDIAN_BYTES // count))
    for row in range(0, height, row_step):
        for column in range(0, width, column_step):
            block = (slice(row, row + row_step), slice(column, column + column_step))
            background[block] = _lower_median(to_tensor(frames[picks, block[0], block[1]]))
        release_mapped(frames)
    return background


def _lower_median(values: Tensor) -> Tensor:
    """uint8 (N, ...) -> (...): the ((N - 1) // 2)-th smallest.

    Found bit by bit from the top: the greatest value that at most (N - 1) // 2 are smaller than.
    Counting is one vectorised pass a bit, where a partial sort branches on every value.
    """
    values = values.contiguous()
    rank = (values.shape[0] - 1) // 2
    median = torch.zeros(values.shape[1:], dtype=torch.uint8, device=values.device)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        candidate = median | bit
        smaller = (values < candidate).view(torch.uint8).sum(0, dtype=torch.int32)
        median = torch.where(smaller <= rank, candidate, median)
    return median


class StreamingBackground:
    """A background estimate for a stream of any length, in the memory of `samples` frames.

    Keeps a uniform random sample of all frames seen so far (a reservoir: J. Vitter, Random
    Sampling with a Reservoir, 1985) and takes its median, anew whenever an eighth of the sample
    has changed. The seed fixes the sample: the same chunks give the same backgrounds.

    Args:
        samples: frames kept, at least 1; they are bytes of memory times the frame's size.
        seed: of the sampling.
    """

    def __init__(self, samples: int = STREAM_SAMPLES, seed: int = 0) -> None:
        _check_samples(samples)
        self.samples = samples
        self.seen = 0
        self._random = random.Random(seed)
        self._reservoir: Tensor | None = None
        self._background: Tensor | None = None
        self._changed = 0

    def update(self, frames: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Takes in the next frames and returns the background, uint8 (H, W), on their device.

        Args:
            frames: uint8 (n, H, W) of one size throughout; n may be 0 but for the first time.

        Raises:
            ValueError: wrong shape, another size than before, no frames yet.
            TypeError: not uint8.
        """
        check_gray(frames)
        if self._reservoir is None:
            if len(frames) == 0:
                raise ValueError("frames must not be empty: there is no background of no frames")
            device = frames.device if isinstance(frames, Tensor) else None
            # Grows by doubling: a short stream does not pay for the whole reservoir.
            size = (min(self.samples, max(len(frames), 16)), *frames.shape[1:])
            self._reservoir = torch.empty(size, dtype=torch.uint8, device=device)
        if self._reservoir.shape[1:] != tuple(frames.shape[1:]):
            raise ValueError(
                f"frames must keep the size {tuple(self._reservoir.shape[1:])} of those before, "
                f"got {tuple(frames.shape[1:])}"
            )
        for index in range(len(frames)):
            self._offer(frames, index)
        held = min(self.seen, self.samples)
        if self._background is None or 8 * self._changed >= held:
            self._background = clip_background(self._reservoir[:held], None)
            self._changed = 0
        return self._background

    def _offer(self, frames: Tensor | np.ndarray[Any, Any], index: int) -> None:
        assert self._reservoir is not None
        slot = self.seen
        if self.seen >= self.samples:
            slot = self._random.randrange(self.seen + 1)
        self.seen += 1
        if slot >= self.samples:
            return
        if slot >= len(self._reservoir):
            larger = min(self.samples, 2 * len(self._reservoir))
            grown = self._reservoir.new_empty(larger, *self._reservoir.shape[1:])
            grown[: len(self._reservoir)] = self._reservoir
            self._reservoir = grown
        self._reservoir[slot] = to_tensor(frames[index : index + 1])[0]
        self._changed += 1


def check_gray(frames: Tensor | np.ndarray[Any, Any]) -> None:
    """Raises TypeError or ValueError unless `frames` is a uint8 (N, H, W) tensor or array."""
    if not is_array(frames):
        raise TypeError(
            f"frames must be a uint8 (N, H, W) tensor or array, got {type(frames).__name__}"
        )
    if str(frames.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"frames must be uint8 gray levels (0 to 255), got {frames.dtype}")
    if frames.ndim != 3:
        raise ValueError(f"frames must be (N, H, W), got shape {tuple(frames.shape)}")


def _check_samples(samples: int | None) -> None:
    if samples is not None and not is_whole(samples):
        raise ValueError(f"samples must be a number of frames from 1 up, got {samples!r}")
