"""Frames to score: real ones where they are there, else made-up ones that look alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Settings
from fastalps.data.frames import read_frames
from fastalps.gate import clip_background

# Training frames are every tenth of a clip: neighbours are almost the same.
_EVERY = 10
# Made-up frames of a test set, after which it begins again: drawing them takes a second.
_SYNTHETIC = 134


@dataclass(frozen=True)
class Video:
    """Frames of a static camera, uint8 (N, 240, 360).

    Attributes:
        source: what they are, for the record.
        test: to score.
        train: normal ones, for a short training.
        background: of the test frames, uint8 (240, 360).
    """

    source: str
    test: Tensor
    train: Tensor
    background: Tensor


def load_video(settings: Settings) -> Video:
    """UCSD Ped2's first clips, or random textured frames with moving blobs."""
    count = settings.pick(1, 2, 8)
    test, train = settings.data / "Test" / "Test001", settings.data / "Train" / "Train001"
    if test.is_dir() and train.is_dir():
        clip, _ = read_frames(test)
        normal, _ = read_frames(train)
        # From the clip's middle, where people walk.
        middle = max(0, len(clip) // 2 - count // 2)
        return Video(
            "UCSD Ped2, Test001",
            clip[middle : middle + count].contiguous(),
            normal[::_EVERY].contiguous(),
            clip_background(clip),
        )
    clip = synthetic_frames(16 + count, settings.generator())
    reason = f"random textured frames with moving blobs ({_missing(settings.data)})"
    return Video(
        reason, clip[:count].contiguous(), clip[count:].contiguous(), clip_background(clip)
    )


def load_test_set(settings: Settings, count: int) -> tuple[str, Tensor]:
    """What they are, and `count` frames, uint8 (count, 240, 360).

    UCSD Ped2's test clips one after the other, or random textured frames; over and over where they
    are fewer.
    """
    clips: list[Tensor] = []
    for folder in sorted((settings.data / "Test").glob("Test[0-9][0-9][0-9]")):
        if sum(map(len, clips)) < count:
            clips.append(read_frames(folder)[0])
    if clips:
        source, frames = f"UCSD Ped2, {len(clips)} test clips", torch.cat(clips)
    else:
        source = f"random textured frames with moving blobs ({_missing(settings.data)})"
        frames = synthetic_frames(min(count, _SYNTHETIC), settings.generator())
    if len(frames) < count:
        source += f"; {len(frames)} frames over and over"
    return source, repeated(frames, 0, count)


def repeated(values: Tensor, dim: int, count: int) -> Tensor:
    """`values`, over and over along a dimension until there are `count`."""
    return values.index_select(dim, torch.arange(count) % values.shape[dim])


def _missing(folder: Path) -> str:
    return f"no UCSD Ped2 in {folder.name or folder}"


def synthetic_frames(
    count: int, rng: torch.Generator, size: tuple[int, int] = (240, 360)
) -> Tensor:
    """uint8 (count, H, W): smooth noise, a little sensor noise, and blobs that wander."""
    coarse = torch.rand(1, 1, size[0] // 12 + 2, size[1] // 12 + 2, generator=rng)
    texture = F.interpolate(coarse, size=size, mode="bicubic")[0, 0] * 160 + 40
    frames = texture + torch.randn(count, *size, generator=rng)
    rows, columns = torch.arange(size[0]).view(-1, 1), torch.arange(size[1]).view(1, -1)
    for _ in range(8):
        y, x, dy, dx = torch.rand(4, generator=rng).tolist()
        for number in range(count):
            top = (y * size[0] + 3 * number * (dy - 0.5)) % size[0]
            left = (x * size[1] + 6 * number * (dx - 0.5)) % size[1]
            inside = ((rows - top) / 20).square() + ((columns - left) / 8).square() < 1
            frames[number][inside] += 70
    return frames.clamp_(0, 255).to(torch.uint8)
