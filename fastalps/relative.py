"""Errors relative to an image's own contrast, for data in which faint images are easy.

A mean squared error is small wherever there is little to reconstruct: a thin digit that a model
has never seen can be cheaper than a bold one that it knows. Dividing by the root of the image's
energy takes out half of that advantage on a logarithmic scale; on MNIST it is worth points of
AUROC, on Fashion-MNIST it costs some. Not part of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalps.inputs import unit_pixels

# Energy of an image that is nothing but noise: deviations of 8 gray levels of 255, squared.
FLOOR = 1e-3


def energy(images: Tensor, background: Tensor | float = 0.0) -> Tensor:
    """Mean square of an image's difference from its background.

    Args:
        images: uint8 (0 to 255) or floating (0 to 1), (N, ...).
        background: what is empty, in [0, 1], broadcast against the images: 0 = black.

    Returns:
        (N,) float32, from 0 to 1.

    Raises:
        ValueError: images without pixels.
    """
    if images.dim() < 2 or not images[:1].numel() and images.shape[0]:
        raise ValueError(f"images must be (N, ...) with pixels, got shape {tuple(images.shape)}")
    return (unit_pixels(images) - background).square().flatten(1).mean(1)


def relative_errors(errors: Tensor, energies: Tensor) -> Tensor:
    """``error / sqrt(energy + 0.001)``: squared error per unit of contrast.

    Args:
        errors: (N,) mean squared errors, as of `fastalps.ALPS.score`.
        energies: (N,), of `energy`; not negative.

    Returns:
        (N,) float32; higher = more anomalous. The quotient of squared gray levels by gray levels:
        0.1 is the error of a reconstruction that is wrong by 0.32 root mean square in an image
        whose own root mean square is 1.

    Raises:
        ValueError: shapes that differ.
    """
    if errors.shape != energies.shape:
        raise ValueError(
            f"errors and energies must have one shape, got {tuple(errors.shape)} and "
            f"{tuple(energies.shape)}"
        )
    return errors.float() / torch.sqrt(energies.float() + FLOOR)
