"""Frames of change: what moved since the frame before, as gray levels around a middle."""

from __future__ import annotations

import torch
from torch import Tensor

# The gray level of a pixel that did not change.
STILL = 128


def motion_frames(frames: Tensor, before: Tensor | None = None) -> Tensor:
    """The change of each pixel since the frame before: ``128 + frame[t] - frame[t - 1]``.

    Appearance alone does not tell a cyclist from a walker; speed does.

    Args:
        frames: uint8 (T, H, W) of a static camera.
        before: uint8 (H, W), the frame before the first; None: the first has no change.

    Returns:
        uint8 (T, H, W), clamped to 0 to 255.
    """
    first = frames[:1] if before is None else before[None]
    previous = [*first, *frames[:-1]][: len(frames)]
    result = torch.empty_like(frames, memory_format=torch.contiguous_format)
    # A frame at a time: the differences take twice the frames' memory.
    for out, now, then in zip(result, frames, previous, strict=True):
        change = now.to(torch.int16).sub_(then).add_(STILL).clamp_(0, 255)
        out.copy_(change)
    return result


def still_background(frame_size: tuple[int, int]) -> Tensor:
    """The background of motion frames for a `fastalps.MotionGate`: nothing moves."""
    return torch.full(frame_size, STILL, dtype=torch.uint8)
