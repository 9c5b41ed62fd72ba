"""Errors relative to contrast, for data in which faint things are easy to reconstruct.

A mean squared error is small wherever there is little to reconstruct: a thin digit that a model
has never seen can be cheaper than a bold one that it knows, and a cyclist in the distance changes
fewer gray levels than a walker nearby. Dividing by a power of the contrast takes most of that away.
It is worth points of AUROC on MNIST and UCSD, and costs some on Fashion-MNIST. Not part of the
paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalps import ops
from fastalps.chunks import plan_chunks
from fastalps.inputs import Pixels, pair, to_tensor, unit_pixels

# Energy of an image that is nothing but noise: deviations of 8 gray levels of 255, squared.
FLOOR = 1e-3
# Between an error that ignores contrast (0) and a share of it (1). Chosen without a test label:
# on training images of MNIST's classes 1, 2, 4, 7, 8 that were held out, 1/2 to 3/4 ranked best; on
# rehearsed anomalies in UCSD's training clips, 2/3 to 4/5 (docs/quality.md).
EXPONENT = 2 / 3


def energy(images: Pixels, background: Tensor | float = 0.0) -> Tensor:
    """Mean square of an image's difference from its background.

    Args:
        images: uint8 (0 to 255) or floating (0 to 1), (N, ...).
        background: what is empty, in [0, 1], broadcast against the images: 0 = black.

    Returns:
        (N,) float32, from 0 to 1.

    Raises:
        ValueError: images without pixels.
    """
    images = to_tensor(images)
    if images.dim() < 2 or (not images[:1].numel() and images.shape[0]):
        raise ValueError(f"images must be (N, ...) with pixels, got shape {tuple(images.shape)}")
    return (unit_pixels(images) - background).square().flatten(1).mean(1)


def patch_energies(
    frames: Tensor,
    background: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    edge: str = "cover",
) -> Tensor:
    """`energy` of each patch of frames: how much stands out from a static camera's background.

    Args:
        frames: uint8 (N, H, W).
        background: uint8 (H, W), as of `fastalps.gate.clip_background`.
        patch_size, stride, edge: see `fastalps.ops.patch_grid`.

    Returns:
        (N, P) float32, P in the order of `patch_grid`.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: not uint8.
    """
    if frames.dtype != torch.uint8 or background.dtype != torch.uint8:
        raise TypeError(
            f"frames and background must be uint8, got {frames.dtype} and {background.dtype}"
        )
    if frames.dim() != 3 or frames.shape[1:] != background.shape:
        raise ValueError(
            f"frames must be (N, H, W) of the background's size {tuple(background.shape)}, "
            f"got {tuple(frames.shape)}"
        )
    patch = pair(patch_size, "patch_size")
    plan = plan_chunks(tuple(background.shape), patch, stride, edge)
    result = torch.empty(len(frames), plan.patches)
    for part, band in plan.pieces(len(frames)):
        rows = slice(band.top, band.bottom)
        foreground = frames[part, rows].to(torch.int16) - background[rows]
        patches = ops.tile_patches(
            foreground.abs_().to(torch.uint8), patch, stride, edge=edge, scale=1 / 255
        )
        result[part, band.first : band.last] = patches.square().mean((2, 3, 4))
    return result


def relative_errors(errors: Tensor, energies: Tensor, exponent: float = EXPONENT) -> Tensor:
    """``error / (energy + 0.001) ** exponent``.

    Args:
        errors: mean squared errors of any shape, as of `fastalps.ALPS.score`.
        energies: of that shape, of `energy` or `patch_energies`; not negative.
        exponent: 0 leaves the errors as they are; 1 gives shares of an image's energy.

    Returns:
        float32 of that shape; higher = more anomalous. Comparable among images of one data set; it
        has no unit of its own.

    Raises:
        ValueError: shapes that differ.
    """
    if errors.shape != energies.shape:
        raise ValueError(
            f"errors and energies must have one shape, got {tuple(errors.shape)} and "
            f"{tuple(energies.shape)}"
        )
    return errors.float() / (energies.float() + FLOOR) ** exponent
