"""What the fused kernels must give: the model in float64 that rounds to bf16 where they do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalps import ALPS, ops
from fastalps.folding import fold_batch_norm
from fastalps.fused.packing import SHAPES
from tests.networks import carried_rounding, mean_square, neighbourhood_means, randomise

NAMES = [f"{preset}-{size}" for preset, size in SHAPES]
STRIDE = (7, 9)
GAIN = 1.6
# What float32 may lose of a sum of products, relative to the root of the sum of their squares.
SUM_ERROR = 2.0**-21
# Deviations that are independent add up as squares; so many times that root is allowed.
DEVIATIONS = 4


def make_model(shape: int, rng: torch.Generator, **options) -> ALPS:
    """A random network whose logits spread, so that little that is wrong shows in its scores."""
    preset, size = SHAPES[shape]
    return randomise(ALPS(size, 1, preset, **options), rng, GAIN)


def frames_of(shape: int, rng: torch.Generator, count: int = 1) -> Tensor:
    """uint8 frames whose patches do not divide them: 3 x 2 patches each, the last moved back."""
    size = SHAPES[shape][1]
    return torch.randint(0, 256, (count, size + 11, size + 5), dtype=torch.uint8, generator=rng)


def patches_of(frames: Tensor, size: int, stride: tuple[int, int]) -> Tensor:
    return ops.tile_patches(frames, size, stride, dtype=torch.float64, scale=1 / 255).flatten(0, 1)


def rounded(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).double()


class Reference:
    """The model's stages in float64, rounded to bf16 where the kernels round.

    A stage gives its values and, for each, how far a correct result may be from it: a sum in
    another order may fall on the other side of a rounding, by one step of bf16, and carry that on.
    """

    def __init__(self, model: ALPS) -> None:
        self.config = model.config
        self.network = copy.deepcopy(model).double().eval().requires_grad_(False)
        fold_batch_norm(self.network)

    def _hidden(self, values: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        slope = rounded(torch.tensor(self.config.negative_slope))

        def leaky(x: Tensor) -> Tensor:
            return torch.maximum(rounded(x), rounded(slope * rounded(x)))

        found = leaky(values)
        return found, torch.maximum(leaky(values + off) - found, found - leaky(values - off))

    def _layer(
        self,
        layer: nn.Module,
        values: Tensor,
        off: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A layer with its weights rounded; what it makes of values that are `off`."""
        weight = layer.weight if weight is None else weight

        def apply(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(x, w, bias)
            if isinstance(layer, nn.Conv2d):
                return F.conv2d(x, w, bias, 2, 1)
            return F.conv_transpose2d(x, w, bias, layer.stride, 1, layer.output_padding)

        if isinstance(layer, nn.Linear):
            weight = rounded(weight)
        else:
            ones = torch.ones_like(values[:1, :1])
            weight = carried_rounding(weight, lambda w: apply(ones, w, None))

        squares = (SUM_ERROR * values).square()
        if off is not None:
            squares += (DEVIATIONS * off).square()
        room = apply(squares, weight.square(), None).sqrt()
        return apply(values, weight, layer.bias), room

    def _encoders(self) -> list[list[nn.Conv2d]]:
        networks = [self.network.encoder, self.network.distorter]
        return [
            [layer for layer in each.modules() if isinstance(layer, nn.Conv2d)]
            for each in networks
            if each is not None
        ]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, H, W) in [0, 1] -> (N, networks, channels, height, width)."""
        levels = rounded(images * 255)
        found = []
        for first, second, *_ in self._encoders():
            hidden = self._hidden(*self._layer(first, levels, weight=first.weight / 255))
            found.append(self._hidden(*self._layer(second, *hidden)))
        maps, off = zip(*found, strict=True)
        return torch.stack(maps, 1), torch.stack(off, 1)

    def outputs(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """-> (N, networks, latent), not rounded."""
        found = []
        for layers, values in zip(self._encoders(), maps.unbind(1), strict=False):
            hidden = self._hidden(*self._layer(layers[2], values))
            found.append([x.mean((2, 3)) for x in self._layer(layers[3], *hidden)])
        outputs, off = zip(*found, strict=True)
        return torch.stack(outputs, 1), torch.stack(off, 1)

    def latents(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """-> (N, 2, latent): normal and perturbed."""
        latent, perturbation = outputs.unbind(1)
        if self.config.bound == "tanh":
            perturbation = perturbation.tanh()
        elif self.config.bound == "norm":
            perturbation = (
                perturbation / (perturbation.square().mean(1, keepdim=True) + 1e-12).sqrt()
            )
        change = self.config.strength * perturbation
        values = torch.stack([latent, latent + change], 1)
        # float32 rounds the factor, the change and the sum.
        room = SUM_ERROR * torch.stack([torch.zeros_like(latent), latent.abs() + change.abs()], 1)
        found = rounded(values)
        return found, torch.maximum(rounded(values + room) - found, found - rounded(values - room))

    def _transposed(self) -> list[nn.ConvTranspose2d]:
        layers = self.network.decoder.layers
        return [layer for layer in layers if isinstance(layer, nn.ConvTranspose2d)]

    def expand(self, latents: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, latent) -> (rows, channels, height, width)."""
        decoder = self.network.decoder
        found = self._layer(decoder.dense, latents, off)
        found = self._hidden(*(x.unflatten(1, decoder.start) for x in found))
        for layer in self._transposed()[:2]:
            found = self._hidden(*self._layer(layer, *found))
        return found

    def decode(self, maps: Tensor) -> Tensor:
        """-> (rows, 1, H, W) in [0, 1]."""
        *hidden, last = self._transposed()[2:]
        for layer in hidden:
            maps, _ = self._hidden(*self._layer(layer, maps))
        return self._layer(last, maps)[0].sigmoid()

    def errors(self, images: Tensor, smoothing: int | None = None) -> Tensor:
        """-> (2, N): normal and perturbed; smoothed as the model is, unless told."""
        latents = self.latents(self.outputs(self.encode(images)[0])[0])
        both = self.decode(self.expand(*(x.flatten(0, 1) for x in latents))[0])
        return mean_squares(both, images, smoothing or self.config.smoothing)


def mean_squares(both: Tensor, images: Tensor, smoothing: int) -> Tensor:
    """(2N, 1, H, W) and (N, 1, H, W) -> (2, N)."""
    residuals = both - images.repeat_interleave(2, 0)
    if smoothing > 1:
        residuals = neighbourhood_means(residuals, smoothing)
    return mean_square(residuals).view(-1, 2).T
