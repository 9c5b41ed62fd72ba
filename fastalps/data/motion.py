"""Frames of change: what moved since the frame before, as gray levels around a middle."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The gray level of a pixel that did not change.
STILL = 128


def motion_frames(frames: Tensor, before: Tensor | None = None) -> Tensor:
    """The change of each pixel since the frame before: ``128 + frame[t] - frame[t - 1]``.

    Appearance alone does not tell a cyclist from a walker; speed does.

    Args:
        frames: uint8 (T, H, W) of a static camera, in the host's memory.
        before: uint8 (H, W), the frame before the first; None: the first has no change.

    Returns:
        uint8 (T, H, W), clamped to 0 to 255.
    """
    # By numpy, on this thread: torch shares each of these short steps out among threads, which is
    # slow where others (decoding) keep the cores busy (240x360, two threads, two busy AVX2 cores:
    # 2,900 frames a second against 550, with one thread as many).
    pixels = frames.numpy()
    first = pixels[:1] if before is None else before.numpy()[None]
    previous = [*first, *pixels[:-1]][: len(pixels)]
    result = torch.empty_like(frames, memory_format=torch.contiguous_format)
    # A frame at a time: the differences take twice the frames' memory.
    change = np.empty(pixels.shape[1:], np.int16)
    for out, now, then in zip(result.numpy(), pixels, previous, strict=True):
        np.subtract(now, then, out=change, dtype=np.int16)
        change += STILL
        out[...] = np.clip(change, 0, 255, out=change)
    return result


def still_background(frame_size: tuple[int, int]) -> Tensor:
    """The background of motion frames for a `fastalps.MotionGate`: nothing moves."""
    return torch.full(frame_size, STILL, dtype=torch.uint8)
