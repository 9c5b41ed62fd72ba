"""Clips in memory, the ways in which callers stream them, and whether scores are the same."""

from __future__ import annotations

import numpy as np
import torch

from fastalps.frame_scores import FrameScores
from tests.images import pixels_of

KINDS = ("numpy", "strided", "half", "double", "channel", "single")


def moving(count: int, rng: torch.Generator, size=(30, 41)) -> torch.Tensor:
    """A static scene in which a block of noise moves."""
    frames = pixels_of((1, *size), rng).repeat(count, 1, 1)
    for t in range(count):
        row, column = (5 * t) % (size[0] - 8), (7 * t) % (size[1] - 8)
        frames[t, row : row + 8, column : column + 8] = pixels_of((8, 8), rng)
    return frames


def brightening(rng: torch.Generator) -> torch.Tensor:
    """As `moving`, in light that grows."""
    frames = moving(40, rng)
    for t in range(40):
        frames[t] = (frames[t].int() + t).clamp(0, 255)
    return frames


def kind_of(frames: torch.Tensor, kind: str) -> torch.Tensor | np.ndarray:
    return {
        "numpy": frames.numpy(),
        "strided": frames.mT.contiguous().mT,
        "half": (frames / 255).half(),
        "double": frames.double() / 255,
        "channel": frames[:, None],
        "single": frames,
    }[kind]


def reusing(frames: torch.Tensor, size: int, pinned: bool = False):
    """Chunks that are all the same memory."""
    memory = torch.empty_like(frames[:size], pin_memory=pinned)
    for chunk in frames.split(size):
        memory[: len(chunk)] = chunk
        yield memory[: len(chunk)] if pinned else memory[: len(chunk)].numpy()


def same(results: list[FrameScores], whole: FrameScores) -> bool:
    """Whether a stream gave what the clip gave; no NaN is."""
    pairs = [(torch.cat([r.patches for r in results]), whole.patches)]
    pairs.append((torch.cat([r.frames for r in results]), whole.frames))
    if whole.kept is not None:
        pairs.append((torch.cat([r.kept for r in results]), whole.kept))
    return all(
        found.shape == expected.shape
        and torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-6)
        for found, expected in pairs
    )
