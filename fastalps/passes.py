"""The passes of a network over images, and what computes their errors."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

# The network passes that are run.
Passes = Literal["normal", "perturbed", "both"]

# How frames are cut into patches: patch size, stride and edge, see `fastalps.ops.patch_grid`.
Cut = tuple[tuple[int, int], tuple[int, int], str]


def passes_for(kind: str) -> Passes:
    """The passes that one kind of score needs."""
    if kind == "normal":
        return "normal"
    return "perturbed" if kind == "perturbed" else "both"


def pick(errors: Tensor, kind: str) -> Tensor:
    """One kind of score out of the (rows, ...) errors of its passes, or of both."""
    if kind == "average":
        return errors.mean(0)
    return errors[1 if kind == "perturbed" and errors.shape[0] == 2 else 0]


class Network(Protocol):
    """What computes errors: `fastalps.engine.Engine`, `fastalps.fused.FusedEngine` or
    `fastalps.layers.LayerByLayer`."""

    device: torch.device

    def errors(self, images: Tensor, passes: Passes) -> Tensor:
        """Mean squared errors of the reconstructions.

        Args:
            images: (N, C, H, W) on the device, uint8 (0 to 255) or floating (0 to 1), any strides;
                N may be 0.
            passes: "normal", "perturbed" or "both".

        Returns:
            (1, N) float32, or (2, N) for "both": normal, then perturbed.
        """
        ...

    def frame_errors(
        self,
        frames: Tensor,
        cut: Cut,
        passes: Passes,
        background: Tensor | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Errors of the patches of frames; with a background, of those that differ from it.

        Args:
            frames: (N, H, W) or (N, C, H, W) on the device, as for `errors`; uint8 (N, H, W) with
                a background.
            cut: patch size, stride and edge.
            passes: see `errors`.
            background: uint8 (H, W) of the motion gate, on the device; None = every patch is
                scored.
            threshold: of the gate, see `fastalps.ops.active_patches`.

        Returns:
            errors (rows, N, P) float32, 0 where the gate dropped the patch, and kept bool (N, P),
            or None without a background. Both are the caller's: nothing writes to them later.
        """
        ...
