"""The errors of every patch of a clip, computed piece by piece."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastalps.chunks import Band, Plan
from fastalps.inputs import Pixels, check_pixels, home, release_mapped, to_tensor
from fastalps.passes import Cut, Network, Passes
from fastalps.streaming import COMPUTE, Staging


def frame_errors(
    network: Network,
    frames: Pixels,
    plan: Plan,
    cut: Cut,
    passes: Passes,
    threshold: float | None,
    background: Tensor | None,
    offset: int = 0,
    staging: Staging | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cuts frames into patches and runs the network on those that the motion gate keeps.

    Args:
        network: computes the errors of patches.
        frames: (N, H, W) or (N, C, H, W) of the model's channels.
        plan: how the frames are cut into pieces.
        cut: patch size, stride and edge.
        passes: see `Network.errors`.
        threshold: of the gate, gray levels; None = no gate.
        background: uint8 (H, W) for the gate; may be None when there are no frames.
        offset: number of the first frame within its stream, for messages.
        staging: how the frames get to the network's device beside its work; None = at once.

    Returns:
        errors (rows, N, P) float32, 0 where the gate dropped the patch, and kept bool (N, P), or
        None without a gate. Both on the frames' device; with staging on the network's, where they
        may still be under way.
    """
    rows = 2 if passes == "both" else 1
    shape = (len(frames), plan.patches)
    where = home(frames) if staging is None else network.device
    pieces = list(plan.pieces(len(frames)))
    errors = kept = None
    if len(pieces) != 1:
        errors = torch.zeros(rows, *shape, device=where)
        kept = None if threshold is None else torch.zeros(shape, dtype=torch.bool, device=where)
    if background is not None and staging is None:
        background = background.to(network.device)
    elif background is not None and staging is not None:
        background = staging.constant(background)
    for part, band in pieces:
        if band is plan.bands[0]:
            every = part == slice(0, len(frames))
            whole = to_tensor(frames if every else frames[part])
            check_pixels("frames", whole, offset + part.start)
            whole = whole.to(network.device) if staging is None else staging.upload(whole)
            release_mapped(frames)
        pixels = _rows(whole, band)
        gate: tuple[Tensor, float] | tuple[()] = ()
        if threshold is not None and background is not None:
            gate = (_rows(background, band), threshold)
        with contextlib.nullcontext() if staging is None else staging.span(COMPUTE):
            found, moved = network.frame_errors(pixels, cut, passes, *gate)
        if errors is None:
            errors, kept = _given(found, where), None if moved is None else _given(moved, where)
        else:
            errors[:, part, band.first : band.last] = found.to(where)
            if kept is not None and moved is not None:
                kept[part, band.first : band.last] = moved.to(where)
        if staging is not None and band is plan.bands[-1]:
            staging.release()
    assert errors is not None
    return errors, kept


def _rows(pixels: Tensor, band: Band) -> Tensor:
    """The band's rows of pixels; of a whole frame without an operation, which takes the host as
    long as a small kernel."""
    if band.bottom - band.top == pixels.shape[-2]:
        return pixels
    return pixels[..., band.top : band.bottom, :]


def _given(found: Tensor, where: torch.device) -> Tensor:
    """The same there; what was made in inference mode could not be changed by who gets it."""
    found = found.to(where)
    if found.is_inference() and not torch.is_inference_mode_enabled():
        return found.clone()
    return found
