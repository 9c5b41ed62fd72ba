"""Patches of video as training images: what moves, and only that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastalps import ops
from fastalps.chunks import plan_chunks
from fastalps.data.containers import Clip, OneClassData
from fastalps.errors import UserError
from fastalps.inputs import pair

if TYPE_CHECKING:
    from fastalps.gate import MotionGate

# One clip in so many is held out for validation and for the threshold.
HELD_OUT_PART = 8
# Normal patches that an epoch is validated on.
VALIDATION_PATCHES = 2048


def moving_patches(
    clips: Sequence[Clip],
    patch_size: int | Sequence[int],
    gate: MotionGate,
    stride: int | Sequence[int] | None = None,
    edge: str = "cover",
) -> Tensor:
    """The patches of clips in which something moves.

    Args:
        clips: of static cameras, each with a background of its own unless the gate has one.
        patch_size, stride, edge: see `fastalps.ops.patch_grid`.
        gate: says what moves.

    Returns:
        uint8 (K, 1, ph, pw), in the order of the clips, their frames and their patches.

    Raises:
        ValueError: a patch larger than the frames.

    Source: ALPS, section IV: in training "only pedestrians are included in the patches".
    """
    patch = pair(patch_size, "patch_size")
    parts = [torch.empty(0, 1, *patch, dtype=torch.uint8)]
    for clip in clips:
        frames = clip.frames
        if not len(frames):
            continue
        plan = plan_chunks(tuple(frames.shape[1:]), patch, stride, edge, bytes_per_pixel=2)
        background = gate.background_of(frames)
        for part, band in plan.pieces(len(frames)):
            rows = slice(band.top, band.bottom)
            # Half precision holds every gray level exactly, in half the memory.
            patches, _ = ops.active_patches(
                frames[part, rows],
                background[rows],
                patch,
                stride,
                threshold=gate.threshold,
                edge=edge,
                dtype=torch.float16,
                scale=1.0,
            )
            parts.append(patches.to(torch.uint8))
    return torch.cat(parts)


def patch_task(
    name: str, clips: Sequence[Clip], patch_size: int | Sequence[int], gate: MotionGate
) -> tuple[OneClassData, list[Clip]]:
    """Training clips as a one-class task of patches, and the clips held out of it.

    The last eighth of the clips (at least one) is held out whole, since neighbouring frames are
    nearly the same: up to 2,048 of its patches, at even distances, are the task's normal validation
    images, and it is there to set a threshold on. The task has no test images; video is tested by
    `fastalps.protocols.evaluate_video`.

    Raises:
        UserError: fewer than two clips, or nothing that moves.
    """
    if len(clips) < 2:
        raise UserError(f"{name} has {len(clips)} training clips; at least 2 are needed")
    count = max(1, len(clips) // HELD_OUT_PART)
    held_out = list(clips[-count:])
    train = moving_patches(clips[:-count], patch_size, gate)
    validation = moving_patches(held_out, patch_size, gate)
    if not (len(train) and len(validation)):
        raise UserError(
            f"{name}: nothing moves by more than {gate.threshold:g} gray levels; "
            "lower the gate's threshold"
        )
    step = -(-len(validation) // VALIDATION_PATCHES)
    validation = validation[::step].contiguous()
    return (
        OneClassData(
            name=name,
            train=train,
            validation=validation,
            validation_labels=torch.zeros(len(validation), dtype=torch.bool),
            test=train[:0],
            test_labels=torch.zeros(0, dtype=torch.bool),
            test_names=(),
        ),
        held_out,
    )
