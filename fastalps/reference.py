"""Every op in plain PyTorch: the definition of correct.

The functions have the names and signatures of the raw ops (`torch.ops.fastalps.*`): arguments are
already validated and normalised by `fastalps.ops`. They are differentiable through autograd, so
that the gradients of the kernels are tested against them. Arithmetic is float32, or float64 where
the input is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op accumulates in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def origins(size: int, patch: int, stride: int, cover: bool) -> list[int]:
    """First rows (or columns) of the patches along one axis of `size` pixels.

    With `cover` the last patch is moved back to the border; without it, partial patches are left
    out.
    """
    steps = size - patch
    count = (-(-steps // stride) if cover else steps // stride) + 1
    return [min(index * stride, steps) for index in range(count)]


def _pixel_indices(
    frame_size: Sequence[int],
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    device: torch.device,
) -> Tensor:
    """(P, ph * pw) int64: the flat pixel indices of each patch of an (H, W) frame."""
    rows, columns = (
        (
            torch.tensor(origins(*axis, cover), device=device)[:, None]
            + torch.arange(axis[1], device=device)
        )
        for axis in zip(frame_size, patch_size, stride, strict=True)
    )
    flat = rows[:, None, :, None] * frame_size[1] + columns[None, :, None, :]
    return flat.reshape(rows.shape[0] * columns.shape[0], patch_size[0] * patch_size[1])


def tile_patches(
    frames: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    dtype: torch.dtype,
    scale: float,
    shift: float,
) -> Tensor:
    """(N, C, H, W) -> (N, P, C, ph, pw): ``frames * scale + shift`` on a row-major grid."""
    n, channels, height, width = frames.shape
    index = _pixel_indices((height, width), patch_size, stride, cover, frames.device)
    values = frames.to(compute_dtype(frames.dtype)) * scale + shift
    patches = values.reshape(n, channels, height * width)[:, :, index]
    shape = (n, index.shape[0], channels, patch_size[0], patch_size[1])
    return patches.transpose(1, 2).reshape(shape).to(dtype).contiguous()


def tile_patches_backward(
    grad: Tensor,
    frame_size: Sequence[int],
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    dtype: torch.dtype,
    scale: float,
) -> Tensor:
    """(N, P, C, ph, pw) -> (N, C, H, W): scale times the sum over the patches of each pixel."""
    n, _, channels = grad.shape[:3]
    index = _pixel_indices(frame_size, patch_size, stride, cover, grad.device)
    values = grad.to(torch.promote_types(compute_dtype(dtype), compute_dtype(grad.dtype)))
    values = values.transpose(1, 2).reshape(n, channels, index.numel())
    frames = values.new_zeros(n, channels, frame_size[0] * frame_size[1])
    frames.index_add_(2, index.flatten(), values)
    return (frames * scale).reshape(n, channels, *frame_size).to(dtype)


def fold_scores(
    scores: Tensor,
    frame_size: Sequence[int],
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    maximum: bool,
) -> Tensor:
    """(N, P) -> (N, H, W) float32: mean or maximum of the patches over each pixel, 0 where none."""
    n, count = scores.shape
    index = _pixel_indices(frame_size, patch_size, stride, cover, scores.device)
    pixels = frame_size[0] * frame_size[1]
    values = scores.to(compute_dtype(scores.dtype))
    values = values[:, :, None].expand(n, count, index.shape[1]).reshape(n, index.numel())
    target = index.flatten().expand(n, index.numel())
    heatmap = torch.zeros(n, pixels, dtype=values.dtype, device=scores.device)
    heatmap = heatmap.scatter_reduce(
        1, target, values, "amax" if maximum else "mean", include_self=False
    )
    return heatmap.reshape(n, *frame_size).to(torch.float32)


def fold_scores_backward(
    grad: Tensor,
    scores: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    maximum: bool,
) -> Tensor:
    """Gradient of the scores; of a tied maximum, the first patch has it all."""
    n, height, width = grad.shape
    index = _pixel_indices((height, width), patch_size, stride, cover, grad.device)
    work = compute_dtype(scores.dtype)
    pixels = height * width
    gathered = grad.to(work).reshape(n, pixels)[:, index]  # (N, P, ph * pw)
    if not maximum:
        covered = torch.bincount(index.flatten(), minlength=pixels)
        return (gathered / covered[index]).sum(2).to(scores.dtype)
    # Which patch owns a pixel: the lowest-numbered one among those that attain the maximum.
    count = index.shape[0]
    values = scores.to(work)
    heatmap = fold_scores(scores, (height, width), patch_size, stride, cover, True).to(work)
    attains = values.to(torch.float32)[:, :, None] == heatmap.reshape(n, pixels)[:, index]
    number = torch.arange(count, device=grad.device)[None, :, None].expand(n, count, index.shape[1])
    owner = torch.full((n, pixels), count, device=grad.device)
    flat = index.flatten().expand(n, index.numel())
    candidates = torch.where(attains, number, count).reshape(n, index.numel())
    owner = owner.scatter_reduce(1, flat, candidates, "amin")
    return torch.where(owner[:, index] == number, gathered, 0.0).sum(2).to(scores.dtype)


def perturb_latent(latent: Tensor, perturbation: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """``(latent + strength * perturbation, mean over D of (strength * perturbation)**2)``."""
    scaled = strength * perturbation.to(compute_dtype(perturbation.dtype))
    perturbed = (latent.to(scaled.dtype) + scaled).to(latent.dtype)
    return perturbed.contiguous(), scaled.square().mean(1).to(torch.float32)


def perturb_latent_backward(
    grad_output: Tensor, grad_energy: Tensor, perturbation: Tensor, strength: float
) -> Tensor:
    """Gradient of the perturbation."""
    values = perturbation.to(compute_dtype(perturbation.dtype))
    factor = 2 * strength * strength / max(1, perturbation.shape[1])
    grad = strength * grad_output.to(values.dtype)
    return (grad + factor * grad_energy.to(values.dtype)[:, None] * values).to(perturbation.dtype)


def _squared_error(values: Tensor, target: Tensor, passes: int, sigmoid: bool) -> Tensor:
    """(S * N, ...), (N, ...) -> (S, N) float32: per-sample mean squared error."""
    n = target.shape[0]
    work = compute_dtype(values.dtype)
    # The size is spelt out: -1 is ambiguous for empty batches.
    size = math.prod(target.shape[1:])
    values = values.to(work).reshape(passes, n, size)
    if sigmoid:
        values = values.sigmoid()
    difference = values - target.to(work).reshape(1, n, size)
    return difference.square().mean(2).to(torch.float32)


def per_sample_mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """(N, ...) twice -> (N,) float32."""
    return _squared_error(reconstruction, target, 1, False)[0]


def paired_mse(reconstructions: Tensor, target: Tensor) -> Tensor:
    """(2N, ...), (N, ...) -> (2, N) float32."""
    return _squared_error(reconstructions, target, 2, False)


def sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """(N, ...) twice -> (N,) float32, of ``sigmoid(logits)``."""
    return _squared_error(logits, target, 1, True)[0]


def paired_sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """(2N, ...), (N, ...) -> (2, N) float32, of ``sigmoid(logits)``."""
    return _squared_error(logits, target, 2, True)


def squared_error_backward(
    grad: Tensor, reconstructions: Tensor, target: Tensor, sigmoid: bool
) -> Tensor:
    """Gradient of the reconstructions (or logits); `grad` is (S * N,), passes first."""
    work = compute_dtype(reconstructions.dtype)
    n, size = target.shape[0], math.prod(target.shape[1:])
    passes = grad.shape[0] // n if n else 1
    values = reconstructions.to(work).reshape(passes, n, size)
    factor = (2 / max(1, size)) * grad.to(work).reshape(passes, n, 1)
    goal = target.to(work).reshape(1, n, size)
    if sigmoid:
        values = values.sigmoid()
        result = factor * (values - goal) * (values * (1 - values))
    else:
        result = factor * (values - goal)
    return result.reshape(reconstructions.shape).to(reconstructions.dtype)


def active_patches(
    frames: Tensor,
    background: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    dtype: torch.dtype,
    scale: float,
    shift: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """The patches that differ from the background, compacted, and their (frame, patch) pairs."""
    n, height, width = frames.shape
    index = _pixel_indices((height, width), patch_size, stride, cover, frames.device)
    difference = (frames.to(torch.int16) - background.to(torch.int16)).abs()
    total = difference.reshape(n, height * width)[:, index].sum(2, dtype=torch.int64)
    # No sum exceeds 255 a pixel; beyond int64, a limit could not be compared.
    limit = math.floor(min(threshold, 255.0) * patch_size[0] * patch_size[1])
    kept = (total > limit).nonzero().contiguous()
    pixels = frames.reshape(n, height * width)[kept[:, :1], index[kept[:, 1]]]
    patches = (pixels.to(torch.float32) * scale + shift).to(dtype)
    return patches.reshape(kept.shape[0], 1, patch_size[0], patch_size[1]), kept
