"""Errors of smoothed residuals, for images whose texture no autoencoder can reconstruct.

Fine texture and the exact place of an edge are lost in a short latent vector, of normal images as
of others; squared, that loss can outweigh everything else in an error. The mean over a small
neighbourhood of the residual takes it away, since it changes sign from pixel to pixel, and leaves
what is wrong over an area: a missing sleeve, a stroke in the wrong place. It is worth points of
AUROC on MNIST and on Fashion-MNIST (docs/quality.md). Not part of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastalps import ops
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, Scores

# Chosen without a test label, on training images of all classes of MNIST and Fashion-MNIST:
# docs/quality.md compares 3 to 9, and other filters.
SIZE = 3
BATCH = 512


def smooth(images: Tensor, size: int = SIZE) -> Tensor:
    """The mean over each pixel's neighbourhood of `size` x `size` pixels, as far as the image goes.

    Args:
        images: floating (N, C, H, W).
        size: odd, 1 or more; 1 leaves the images as they are.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: an even or negative size, or images of other dimensions.
    """
    if isinstance(size, bool) or size < 1 or size % 2 == 0:
        raise ValueError(f"size must be an odd number of pixels from 1 up, got {size!r}")
    if images.dim() != 4:
        raise ValueError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
    if size == 1 or not images.numel():
        return images
    return functional.avg_pool2d(images, size, 1, size // 2, count_include_pad=False)


def smoothed_errors(images: Tensor, reconstructions: Tensor, size: int = SIZE) -> Tensor:
    """``mean(smooth(images - reconstructions) ** 2)`` of each image.

    Args:
        images: floating (N, C, H, W).
        reconstructions: of that shape and dtype.
        size: see `smooth`; with 1 it is `fastalps.ops.per_sample_mse`.

    Returns:
        (N,) float32, in squared units of the pixels.

    Raises:
        ValueError: shapes that differ, or as `smooth`.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images and reconstructions must have one shape, got {tuple(images.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    return ops.per_sample_mse(smooth(images, size), smooth(reconstructions, size))


@torch.no_grad()
def smoothed_scores(model: ALPS, images: Tensor, size: int = SIZE) -> Scores:
    """The three scores of a model's reconstructions, of smoothed residuals.

    Args:
        model: in whatever mode; eval-mode statistics are used, as by `fastalps.ALPS.score`.
        images: uint8 or floating (0 to 1), (N, C, H, W); on any device.
        size: see `smooth`.

    Returns:
        `Scores` (normal, perturbed, average), (N,) float32 each, on the model's device.

    Raises:
        ValueError, TypeError: images that the model does not take, or as `smooth`.
    """
    device = next(model.parameters()).device
    training = model.training
    parts = []
    try:
        model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # A model perturbed by noise must score the same whatever was drawn before.
            torch.manual_seed(0)
            for batch in images.split(BATCH):
                pixels = unit_pixels(batch.to(device))
                out = model(pixels)
                normal = smoothed_errors(pixels, out.reconstruction, size)
                perturbed = smoothed_errors(pixels, out.perturbed_reconstruction, size)
                parts.append(Scores(normal, perturbed, (normal + perturbed) / 2))
    finally:
        model.train(training)
    return Scores(*(torch.cat(kind) for kind in zip(*parts, strict=True)))
