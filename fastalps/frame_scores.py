"""Scores of frames: of their patches, reduced to one a frame, painted as heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalps import ops
from fastalps.scalars import is_whole

FRAME_REDUCES = ("max", "mean", "topk")


def check_frame_reduce(reduce: str, top_k: int) -> None:
    """Raises ValueError for an unknown reduction or a top_k below 1."""
    if reduce not in FRAME_REDUCES:
        raise ValueError(f"frame_reduce must be one of {', '.join(FRAME_REDUCES)}, got {reduce!r}")
    if not is_whole(top_k):
        raise ValueError(f"top_k must be a number of patches from 1 up, got {top_k!r}")


def reduce_patches(
    patches: Tensor, reduce: str = "max", top_k: int = 3, kept: Tensor | None = None
) -> Tensor:
    """One score a frame from those of its patches.

    Args:
        patches: (..., P) floating, such as (N, P).
        reduce: "max"; "mean"; "topk" = the mean of the `top_k` highest (of all when P is less).
        top_k: for "topk".
        kept: bool of the same shape: only these patches count; None = all.

    Returns:
        (...) float32; 0 for a frame without (kept) patches.
    """
    check_frame_reduce(reduce, top_k)
    patches = patches.float()
    every = patches.shape[-1]
    if every == 0:
        return patches.new_zeros(patches.shape[:-1])
    number = 1 if reduce == "max" else min(top_k, every)
    if kept is None:  # By fewer operations: of single frames they would take most of the time.
        if reduce == "mean":
            return patches.sum(-1) / every
        return patches.amax(-1) if number == 1 else patches.topk(number).values.mean(-1)
    count = kept.sum(-1)
    if reduce == "mean":
        return patches.where(kept, 0.0).sum(-1) / count.clamp(min=1)
    highest = patches.where(kept, -torch.inf).topk(number).values
    # A frame with fewer kept patches than top_k is the mean of those that it has.
    return highest.where(highest > -torch.inf, 0.0).sum(-1) / count.clamp(min=1, max=number)


@dataclass(frozen=True, eq=False)
class FrameScores:
    """The scores of N frames.

    Attributes:
        patches: (N, P) float32, P in the order of `fastalps.ops.patch_grid`; 0 where the motion
            gate dropped the patch.
        frames: (N,) float32, the reduction of each frame's patches (dropped ones count as 0).
        kept: bool (N, P), False where the gate dropped the patch; None when there was no gate.
        frame_size: (height, width) in pixels.
        patch_size: likewise.
        stride: (rows, columns) from one patch to the next.
        edge: as the patches were cut, see `fastalps.ops.patch_grid`.
    """

    patches: Tensor
    frames: Tensor
    kept: Tensor | None
    frame_size: tuple[int, int]
    patch_size: tuple[int, int]
    stride: tuple[int, int]
    edge: str

    def __len__(self) -> int:
        return self.patches.shape[0]

    def heatmaps(
        self, frames: slice | Sequence[int] | Tensor | None = None, *, reduce: str = "mean"
    ) -> Tensor:
        """The patches' scores painted on their frames, made when asked for.

        Args:
            frames: which frames, such as slice(100, 200), [3, 7] or ``result.frames > threshold``;
                None = all. One frame takes 4 * height * width bytes, so ask for a long video's in
                pieces.
            reduce: "mean" or "max" of the patches that cover a pixel.

        Returns:
            (n, H, W) float32; 0 where no patch covers a pixel.
        """
        if frames is None:
            frames = slice(None)
        elif not isinstance(frames, slice):
            frames = torch.as_tensor(frames)
            # A list of none has no integers either.
            frames = frames if frames.numel() else frames.long()
        scores = self.patches[frames]
        return ops.fold_scores(
            scores, self.frame_size, self.patch_size, self.stride, edge=self.edge, reduce=reduce
        )
