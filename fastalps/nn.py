"""The fused ops as modules, for any model: nothing here knows of ALPS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastalps import ops
from fastalps.inputs import pair


class TilePatches(nn.Module):
    """Cuts frames into patches, scaled and converted in the same pass: `ops.tile_patches`.

    Args:
        patch_size: pixels, an int or (height, width).
        stride: between patches, likewise; the patch size where None.
        edge: "cover", "drop" or "error": see `ops.patch_grid`.
        dtype: of the patches.
        scale, shift: ``patches = frames * scale + shift``.
        flatten: give (N * P, C, ph, pw), ready for a network, instead of (N, P, C, ph, pw).

    Shape:
        frames uint8 or floating (N, H, W) or (N, C, H, W) to patches in row-major order.
    """

    def __init__(
        self,
        patch_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        *,
        edge: str = "cover",
        dtype: torch.dtype = torch.float32,
        scale: float = 1 / 255,
        shift: float = 0.0,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = pair(patch_size, "patch_size")
        self.stride = self.patch_size if stride is None else pair(stride, "stride")
        self.edge, self.dtype, self.scale, self.shift = edge, dtype, scale, shift
        self.flatten = flatten

    def forward(self, frames: Tensor) -> Tensor:
        """The patches of `frames`, shaped as above."""
        patches = ops.tile_patches(
            frames,
            self.patch_size,
            self.stride,
            edge=self.edge,
            dtype=self.dtype,
            scale=self.scale,
            shift=self.shift,
        )
        return patches.flatten(0, 1) if self.flatten else patches

    def fold(self, scores: Tensor, frame_size: Sequence[int], reduce: str = "mean") -> Tensor:
        """Scores of these patches, (N, P), back to heatmaps (N, H, W): `ops.fold_scores`."""
        return ops.fold_scores(
            scores,
            pair(frame_size, "frame_size"),
            self.patch_size,
            self.stride,
            edge=self.edge,
            reduce=reduce,
        )

    def extra_repr(self) -> str:
        return f"{self.patch_size}, stride={self.stride}, edge={self.edge!r}, dtype={self.dtype}"


class PerturbLatent(nn.Module):
    """``latent + strength * perturbation`` and the perturbation's energy: `ops.perturb_latent`.

    Args:
        strength: factor on the perturbation.

    Shape:
        latent (N, D), perturbation (N, D) to perturbed latent (N, D), energy (N,) float32.
    """

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, latent: Tensor, perturbation: Tensor) -> tuple[Tensor, Tensor]:
        """The perturbed latent and the perturbation's energy."""
        return ops.perturb_latent(latent, perturbation, self.strength)

    def extra_repr(self) -> str:
        return f"strength={self.strength}"


class PerSampleMSE(nn.Module):
    """The mean squared error of each sample, (N,) float32, with no temporary of the input's size.

    Args:
        sigmoid: the first input is logits: the error of their sigmoid, which is never stored.
        paired: the first input has 2N samples, two versions of each target one after the other;
            the target is read once.

    Shape:
        reconstruction or logits (N, ...), target (N, ...) to (N,); paired: (2N, ...), (N, ...) to
        (2, N).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that no kernel takes.
    """

    def __init__(self, sigmoid: bool = False, paired: bool = False) -> None:
        super().__init__()
        self.sigmoid, self.paired = sigmoid, paired

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """The errors of `reconstruction` (or logits) against `target`."""
        if self.sigmoid and self.paired:
            return ops.paired_sigmoid_mse(reconstruction, target)
        if self.sigmoid:
            return ops.sigmoid_mse(reconstruction, target)
        if self.paired:
            return ops.paired_mse(reconstruction, target)
        return ops.per_sample_mse(reconstruction, target)

    def extra_repr(self) -> str:
        return f"sigmoid={self.sigmoid}, paired={self.paired}"
