"""Errors of smoothed residuals, for images whose texture no autoencoder can reconstruct.

Fine texture and the exact place of an edge are lost in a short latent vector, of normal images as
of others; squared, that loss can outweigh everything else in an error. The mean over a small
neighbourhood of the residual takes it away, since it changes sign from pixel to pixel, and leaves
what is wrong over an area: a missing sleeve, a stroke in the wrong place. It is worth points of
AUROC on MNIST and on Fashion-MNIST (docs/quality.md). Not part of the paper, and so off unless a
model is made with ``smoothing=3``: then all its scores are such errors; its training is as ever.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastalps import ops
from fastalps.scalars import is_whole

# Chosen without a test label, on training images of all classes of MNIST and Fashion-MNIST:
# docs/quality.md compares 3 to 9, and other filters.
SIZE = 3
# Larger ones would be no neighbourhoods.
LARGEST = 31


def check_size(name: str, size: int) -> None:
    """Raises ValueError unless `size` is the side of a neighbourhood."""
    if not is_whole(size) or size not in range(1, LARGEST + 1, 2):
        raise ValueError(f"{name}: expected an odd number from 1 to {LARGEST}, got {size!r}")


def smooth(images: Tensor, size: int = SIZE) -> Tensor:
    """The mean over each pixel's neighbourhood of `size` x `size` pixels, as far as the image goes.

    Args:
        images: floating (N, C, H, W).
        size: odd, 1 to 31; 1 leaves the images as they are.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: another size, or images of other dimensions.
    """
    check_size("size", size)
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


def reconstruction_errors(logits: Tensor, images: Tensor, size: int, *, paired: bool) -> Tensor:
    """The errors of one or two reconstructions of each image, before their sigmoid.

    Args:
        logits: floating (N, C, H, W); (2N, C, H, W) where paired.
        images: floating (N, C, H, W) in [0, 1].
        size: of the neighbourhood, see `smooth`; 1: plain mean squared errors.
        paired: whether there are two reconstructions of each image.

    Returns:
        (1, N) or (2, N) float32.

    Raises:
        ValueError: as `smooth`; shapes that do not fit.
    """
    if size == 1:
        if paired:
            return ops.paired_sigmoid_mse(logits, images)
        return ops.sigmoid_mse(logits, images)[None]
    targets = smooth(images.float(), size)
    rebuilt = smooth(logits.float().sigmoid(), size)
    if paired:
        return ops.paired_mse(rebuilt, targets)
    return ops.per_sample_mse(rebuilt, targets)[None]
