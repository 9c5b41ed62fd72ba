"""What the ops are to torch: schemas, shape functions and gradients.

Schemas are defined here in Python, so that every op exists without any compiled file; the compiled
libraries only implement them. The default kernel of each op is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastalps import backends, reference

SCHEMAS = {
    "tile_patches": "(Tensor frames, SymInt[2] patch_size, SymInt[2] stride, bool cover, "
    "ScalarType dtype, float scale, float shift) -> Tensor",
    "tile_patches_backward": "(Tensor grad, SymInt[2] frame_size, SymInt[2] patch_size, "
    "SymInt[2] stride, bool cover, ScalarType dtype, float scale) -> Tensor",
    "fold_scores": "(Tensor scores, SymInt[2] frame_size, SymInt[2] patch_size, "
    "SymInt[2] stride, bool cover, bool maximum) -> Tensor",
    "fold_scores_backward": "(Tensor grad, Tensor scores, SymInt[2] patch_size, "
    "SymInt[2] stride, bool cover, bool maximum) -> Tensor",
    "perturb_latent": "(Tensor latent, Tensor perturbation, float strength) -> (Tensor, Tensor)",
    "perturb_latent_backward": "(Tensor grad_output, Tensor grad_energy, Tensor perturbation, "
    "float strength) -> Tensor",
    "per_sample_mse": "(Tensor reconstruction, Tensor target) -> Tensor",
    "paired_mse": "(Tensor reconstructions, Tensor target) -> Tensor",
    "sigmoid_mse": "(Tensor logits, Tensor target) -> Tensor",
    "paired_sigmoid_mse": "(Tensor logits, Tensor target) -> Tensor",
    "squared_error_backward": "(Tensor grad, Tensor reconstructions, Tensor target, "
    "bool sigmoid) -> Tensor",
    "active_patches": "(Tensor frames, Tensor background, SymInt[2] patch_size, "
    "SymInt[2] stride, bool cover, ScalarType dtype, float scale, float shift, "
    "float threshold) -> (Tensor, Tensor)",
}

_library = torch.library.Library("fastalps", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


# Shape functions -------------------------------------------------------------------------------


def patch_counts(
    frame_size: Sequence[int], patch_size: Sequence[int], stride: Sequence[int], cover: bool
) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = (
        (size - patch + (step - 1 if cover else 0)) // step + 1
        for size, patch, step in zip(frame_size, patch_size, stride, strict=True)
    )
    return rows, columns


def _fake_tile_patches(frames, patch_size, stride, cover, dtype, scale, shift):
    rows, columns = patch_counts(frames.shape[2:], patch_size, stride, cover)
    shape = (frames.shape[0], rows * columns, frames.shape[1], patch_size[0], patch_size[1])
    return frames.new_empty(shape, dtype=dtype)


def _fake_tile_patches_backward(grad, frame_size, patch_size, stride, cover, dtype, scale):
    return grad.new_empty((grad.shape[0], grad.shape[2], *frame_size), dtype=dtype)


def _fake_fold_scores(scores, frame_size, patch_size, stride, cover, maximum):
    return scores.new_empty((scores.shape[0], *frame_size), dtype=torch.float32)


def _fake_fold_scores_backward(grad, scores, patch_size, stride, cover, maximum):
    return scores.new_empty(scores.shape)


def _fake_perturb_latent(latent, perturbation, strength):
    return latent.new_empty(latent.shape), latent.new_empty(latent.shape[:1], dtype=torch.float32)


def _fake_perturb_latent_backward(grad_output, grad_energy, perturbation, strength):
    return perturbation.new_empty(perturbation.shape)


def _fake_per_sample(values, target):
    return target.new_empty(target.shape[:1], dtype=torch.float32)


def _fake_paired(values, target):
    return target.new_empty((2, target.shape[0]), dtype=torch.float32)


def _fake_squared_error_backward(grad, reconstructions, target, sigmoid):
    return reconstructions.new_empty(reconstructions.shape)


def _fake_active_patches(
    frames, background, patch_size, stride, cover, dtype, scale, shift, threshold
):
    kept = torch.library.get_ctx().new_dynamic_size()
    patches = frames.new_empty((kept, 1, patch_size[0], patch_size[1]), dtype=dtype)
    return patches, frames.new_empty((kept, 2), dtype=torch.int64)


FAKES: dict[str, Any] = {
    "tile_patches": _fake_tile_patches,
    "tile_patches_backward": _fake_tile_patches_backward,
    "fold_scores": _fake_fold_scores,
    "fold_scores_backward": _fake_fold_scores_backward,
    "perturb_latent": _fake_perturb_latent,
    "perturb_latent_backward": _fake_perturb_latent_backward,
    "per_sample_mse": _fake_per_sample,
    "paired_mse": _fake_paired,
    "sigmoid_mse": _fake_per_sample,
    "paired_sigmoid_mse": _fake_paired,
    "squared_error_backward": _fake_squared_error_backward,
    "active_patches": _fake_active_patches,
}


# Gradients -------------------------------------------------------------------------------------
# `suffix` is "" for the op itself and "_triton" for its Triton twin: a backward pass runs in the
# same implementation as its forward pass.


def _raw(name: str, suffix: str) -> Any:
    return getattr(torch.ops.fastalps, name + suffix).default


def _tile_patches_gradient(suffix: str):
    def setup(ctx, inputs, output):
        frames, ctx.patch_size, ctx.stride, ctx.cover, _, ctx.scale, _ = inputs
        ctx.frame_size, ctx.dtype = frames.shape[2:], frames.dtype

    def backward(ctx, grad):
        frames = _raw("tile_patches_backward", suffix)(
            grad, ctx.frame_size, ctx.patch_size, ctx.stride, ctx.cover, ctx.dtype, ctx.scale
        )
        return frames, None, None, None, None, None, None

    return setup, backward


def _fold_scores_gradient(suffix: str):
    def setup(ctx, inputs, output):
        scores, _, ctx.patch_size, ctx.stride, ctx.cover, ctx.maximum = inputs
        ctx.save_for_backward(scores)

    def backward(ctx, grad):
        (scores,) = ctx.saved_tensors
        result = _raw("fold_scores_backward", suffix)(
            grad, scores, ctx.patch_size, ctx.stride, ctx.cover, ctx.maximum
        )
        return result, None, None, None, None, None

    return setup, backward


def _perturb_latent_gradient(suffix: str):
    def setup(ctx, inputs, output):
        _, perturbation, ctx.strength = inputs
        ctx.save_for_backward(perturbation)

    def backward(ctx, grad_output, grad_energy):
        (perturbation,) = ctx.saved_tensors
        result = None
        if ctx.needs_input_grad[1]:
            result = _raw("perturb_latent_backward", suffix)(
                grad_output, grad_energy, perturbation, ctx.strength
            )
        return grad_output, result, None

    return setup, backward


def _squared_error_gradient(suffix: str, sigmoid: bool):
    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, grad):
        values, target = ctx.saved_tensors
        flat = grad.reshape(-1)
        grad_values = grad_target = None
        if ctx.needs_input_grad[0]:
            grad_values = _raw("squared_error_backward", suffix)(flat, values, target, sigmoid)
        if ctx.needs_input_grad[1]:
            # Rare (a target that is learnt): with the roles of a linear error swapped, the same
            # kernel gives it, at the price of one temporary for each pass.
            outputs = (
                values.to(reference.compute_dtype(values.dtype)).sigmoid() if sigmoid else values
            )
            parts = [
                _raw("squared_error_backward", suffix)(part, target, output, False)
                for part, output in zip(
                    flat.split(target.shape[0]), outputs.split(target.shape[0]), strict=True
                )
            ]
            grad_target = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return grad_values, grad_target

    return setup, backward


def _no_gradient(name: str):
    def setup(ctx, inputs, output):
        pass

    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastalps::{name} has no gradient, so a second derivative is not to be had; compute "
            f"with the function of fastalps.reference in place of the op"
        )

    return setup, backward


def gradient(name: str, suffix: str = ""):
    """(setup_context, backward) of the op `name` for its implementation `suffix`, or None."""
    if name.endswith("_backward"):
        return _no_gradient(name + suffix)
    if name == "tile_patches":
        return _tile_patches_gradient(suffix)
    if name == "fold_scores":
        return _fold_scores_gradient(suffix)
    if name == "perturb_latent":
        return _perturb_latent_gradient(suffix)
    if name in ("per_sample_mse", "paired_mse"):
        return _squared_error_gradient(suffix, False)
    if name in ("sigmoid_mse", "paired_sigmoid_mse"):
        return _squared_error_gradient(suffix, True)
    return None


for _name in SCHEMAS:
    torch.library.register_fake(f"fastalps::{_name}", FAKES[_name], lib=_library)
    if (_pair := gradient(_name)) is not None:
        torch.library.register_autograd(
            f"fastalps::{_name}", _pair[1], setup_context=_pair[0], lib=_library
        )

backends.initialise()
