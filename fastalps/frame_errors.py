"""The errors of every patch of a clip, computed piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalps import ops
from fastalps.chunks import Plan
from fastalps.inference import LayerByLayer
from fastalps.inputs import Pixels, check_pixels, home, release_mapped, to_tensor


def frame_errors(
    engine: LayerByLayer,
    frames: Pixels,
    plan: Plan,
    cut: tuple[tuple[int, int], tuple[int, int], str],
    passes: str,
    threshold: float | None,
    background: Tensor | None,
    offset: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Cuts frames into patches and runs the network on those that the motion gate keeps.

    Args:
        engine: computes the errors of patches.
        frames: (N, H, W) or (N, C, H, W) of the model's channels.
        plan: how the frames are cut into pieces.
        cut: patch size, stride and edge.
        passes: see `LayerByLayer.errors`.
        threshold: of the gate, gray levels; None = no gate.
        background: uint8 (H, W) for the gate; may be None when there are no frames.
        offset: number of the first frame within its stream, for messages.

    Returns:
        errors (rows, N, P) float32, 0 where the gate dropped the patch, and kept bool (N, P), or
        None without a gate. Both on the frames' device.
    """
    patch, stride, edge = cut
    rows = 2 if passes == "both" else 1
    shape = (len(frames), plan.patches)
    errors = torch.zeros(rows, *shape, device=home(frames))
    kept = None if threshold is None else torch.zeros(shape, dtype=torch.bool, device=home(frames))
    if background is not None:
        background = background.to(engine.device)
    for part, band in plan.pieces(len(frames)):
        whole = to_tensor(frames[part])
        if band.first == 0:
            check_pixels("frames", whole, offset + part.start)
        pixels = whole[..., band.top : band.bottom, :].to(engine.device)
        if kept is None or threshold is None or background is None:
            scale = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
            patches = ops.tile_patches(pixels, patch, stride, edge=edge, scale=scale)
            found = engine.errors(patches.flatten(0, 1), passes)
            errors[:, part, band.first : band.last] = found.unflatten(1, patches.shape[:2]).to(
                errors.device
            )
        else:
            patches, index = ops.active_patches(
                pixels,
                background[band.top : band.bottom],
                patch,
                stride,
                threshold=threshold,
                edge=edge,
            )
            found = engine.errors(patches, passes).to(errors.device)
            frame, number = index.to(errors.device).unbind(1)
            errors[:, frame + part.start, number + band.first] = found
            kept[frame + part.start, number + band.first] = True
        release_mapped(frames)
    return errors, kept
