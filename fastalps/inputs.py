"""What scorers accept as pixels: tensors, arrays, memory maps; checked, and cut into chunks."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pixels = Tensor | np.ndarray[Any, Any]

PIXEL_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_array(value: object) -> bool:
    """Whether a value is one array of pixels, not a stream of them."""
    return isinstance(value, (Tensor, np.ndarray))


def pair(size: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """(height, width) from one int for both, or from two; ValueError for anything else."""
    sides = list(size) if isinstance(size, Iterable) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) for side in sides):
        raise ValueError(f"{name}: expected a number of pixels or a pair of them, got {size!r}")
    return int(sides[0]), int(sides[1])


def by(size: Sequence[int]) -> str:
    """A size as text: 240 x 360."""
    return " x ".join(str(part) for part in size)


def home(values: Pixels) -> torch.device:
    """The device that results for these pixels belong on."""
    return values.device if isinstance(values, Tensor) else torch.device("cpu")


def unit_pixels(pixels: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]."""
    floats = pixels.to(torch.float32)
    return floats.div_(255) if pixels.dtype == torch.uint8 else floats


def to_tensor(values: Pixels) -> Tensor:
    """A tensor of the same values; a copy only where torch cannot share the memory.

    Raises TypeError for anything but a tensor or an array of a dtype that torch has.
    """
    if isinstance(values, Tensor):
        return values
    if not isinstance(values, np.ndarray):
        raise TypeError(f"expected a tensor or a numpy array, got {type(values).__name__}")
    # torch has neither read-only tensors nor negative strides.
    if not values.flags.writeable or any(step < 0 for step in values.strides):
        values = values.copy()
    return torch.from_numpy(values)


def release_mapped(values: object) -> None:
    """Gives back the memory of pages read so far from a read-only memory-mapped array.

    A long video that is read once through a map would otherwise stay resident as a whole.
    """
    # Only "r": dropping the pages of a copy-on-write map would lose what was written to them.
    if isinstance(values, np.memmap) and values.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages = getattr(values, "_mmap", None)
        if isinstance(pages, mmap.mmap):
            pages.madvise(mmap.MADV_DONTNEED)


def check_array(name: str, values: object) -> None:
    """Raises TypeError unless it is an array of uint8 (0 to 255) or of floating pixels (0 to 1)."""
    if not isinstance(values, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(values).__name__}")
    if not _has_pixels(values):
        raise TypeError(
            f"{name} must be uint8 (0 to 255) or floating (0 to 1), got {values.dtype}; "
            "convert them"
        )


def _has_pixels(values: Pixels) -> bool:
    if values.ndim == 0:
        return False
    if isinstance(values, Tensor):
        return values.dtype in PIXEL_DTYPES
    try:
        return to_tensor(values[:0]).dtype in PIXEL_DTYPES
    except TypeError:
        return False


def check_pixels(name: str, values: Tensor, offset: int = 0) -> None:
    """Checks floating pixels; `offset` is the number of the first item in the whole input.

    Raises ValueError when a pixel is NaN or infinite; warns when pixels leave [0, 1].
    """
    if not values.is_floating_point() or values.numel() == 0:
        return
    low, high = torch.aminmax(values)
    # NaN and infinity reach the extremes, so one pass over the pixels tells that all are finite.
    if not (torch.isfinite(low) & torch.isfinite(high)):
        bad = ~torch.isfinite(values)
        first = [int(i) for i in bad.nonzero()[0]]
        value = float(values[tuple(first)])
        first[0] += offset
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite pixels of "
            f"{values.numel()}, the first {value} at index {tuple(first)}"
        )
    if low < -1e-3 or high > 1 + 1e-3:
        warnings.warn(
            f"{name} are expected in [0, 1], got {float(low):.4g} to {float(high):.4g}; "
            "pass gray levels as uint8, or divide them by 255",
            stacklevel=4,
        )
