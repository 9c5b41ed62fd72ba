"""Registers `fastalps::<op>_triton` for every op: same arguments, shapes and gradients as the op.

`triton_op` lets torch.compile see the kernels and fuse their neighbours. It does not work with
Triton's interpreter, nor for an op whose shape depends on data (the compiler would see two unknown
sizes, the fake kernel's and the traced one): those are opaque ops.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from fastalps.kernels import (
    active_patches,
    fold_scores,
    perturb_latent,
    squared_error,
    tile_patches,
)

from fastalps import backends, op_definitions

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "tile_patches": tile_patches.tile_patches,
    "tile_patches_backward": tile_patches.tile_patches_backward,
    "fold_scores": fold_scores.fold_scores,
    "fold_scores_backward": fold_scores.fold_scores_backward,
    "perturb_latent": perturb_latent.perturb_latent,
    "perturb_latent_backward": perturb_latent.perturb_latent_backward,
    "per_sample_mse": squared_error.per_sample_mse,
    "paired_mse": squared_error.paired_mse,
    "sigmoid_mse": squared_error.sigmoid_mse,
    "paired_sigmoid_mse": squared_error.paired_sigmoid_mse,
    "squared_error_backward": squared_error.squared_error_backward,
    "active_patches": active_patches.active_patches,
}
DATA_DEPENDENT = ("active_patches",)

_library = torch.library.Library("fastalps", "FRAGMENT")


def _on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """`launcher` with its first tensor's device current: Triton launches on the current one."""

    @functools.wraps(launcher)
    def launch(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return launcher(*arguments)

    # Annotations are strings that only the launcher's own module can resolve.
    launch.__signature__ = inspect.signature(launcher, eval_str=True)  # type: ignore[attr-defined]
    return launch


def register(name: str) -> None:
    """Defines `fastalps::<name>_triton` with its kernels, fake kernel and gradient."""
    qualified = f"fastalps::{name}_triton"
    launch = _on_device(LAUNCHERS[name])
    pair = op_definitions.gradient(name, "_triton")
    if backends.triton_interpreted() or name in DATA_DEPENDENT:
        schema = f"{name}_triton{op_definitions.SCHEMAS[name]}"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(f"{name}_triton", launch, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, op_definitions.FAKES[name], lib=_library)
        if pair is not None:
            torch.library.register_autograd(qualified, pair[1], setup_context=pair[0], lib=_library)
        return
    op: Any = torch.library.triton_op(qualified, launch, mutates_args=())
    op.register_fake(op_definitions.FAKES[name])
    if pair is not None:
        op.register_autograd(pair[1], setup_context=pair[0])


for _name in op_definitions.SCHEMAS:
    register(_name)
