"""Cutting a video into pieces whose patches fit a buffer: by frames, then by rows of patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastalps import ops

# Bytes of patches at a time: large enough that calls cost nothing, small beside any memory.
PATCH_BYTES = 1 << 24


@dataclass(frozen=True)
class Band:
    """Whole rows of patches: pixel rows top to bottom (exclusive), patches first to last."""

    top: int
    bottom: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """How the frames of one size are cut.

    A band, tiled by itself with the same arguments, gives exactly its patches of the whole frame.

    Attributes:
        patches: P of a frame.
        step: frames at a time.
        bands: one for the whole frame, or several (then step is 1).
    """

    patches: int
    step: int
    bands: tuple[Band, ...]

    def pieces(self, count: int) -> Iterator[tuple[slice, Band]]:
        """(frames, band) pairs that cover `count` frames once."""
        for start in range(0, count, self.step):
            for band in self.bands:
                yield slice(start, min(count, start + self.step)), band


def plan_chunks(
    frame_size: Sequence[int],
    patch_size: Sequence[int],
    stride: int | Sequence[int] | None,
    edge: str,
    *,
    bytes_per_pixel: int = 4,
    limit: int = PATCH_BYTES,
) -> Plan:
    """Plans pieces of at most `limit` bytes of patches, but at least one row of patches.

    Args:
        frame_size, patch_size, stride, edge: see `fastalps.ops.patch_grid`, which also checks them.
        bytes_per_pixel: of the patches, all channels together.
        limit: bytes of patches in a piece.
    """
    rows, columns = ops.patch_grid(frame_size, patch_size, stride, edge)
    patch_height, patch_width = patch_size
    row_bytes = len(columns) * patch_height * patch_width * bytes_per_pixel
    patches = len(rows) * len(columns)
    frame_bytes = len(rows) * row_bytes
    if frame_bytes <= limit:
        whole = Band(0, frame_size[0], 0, patches)
        return Plan(patches, limit // frame_bytes, (whole,))
    step = max(1, limit // row_bytes)
    bands = []
    for start in range(0, len(rows), step):
        taken = rows[start : start + step]
        first = start * len(columns)
        bands.append(
            Band(taken[0], taken[-1] + patch_height, first, first + len(taken) * len(columns))
        )
    return Plan(patches, 1, tuple(bands))
