"""A trained ALPS model as the engine's plan (int64) and weights (float32)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastalps import backends
from fastalps.engine import axes
from fastalps.engine.axes import Axis
from fastalps.models import ALPS, BOUNDS, Encoder

# As csrc/cpu/engine.h: output channels whose weights lie side by side.
TILE = 4


class Tuning(NamedTuple):
    """What is fastest depends on the vectors' width: docs/performance.md has the measurements."""

    # Of a value that is a sum, or of a product that is part of one, in multiplications. What it
    # takes is its way through the caches, by bytes; a product takes no longer in a wide vector.
    sum_cost: float
    # Results of an axis that are computed at once. Of 4, 6, 8 and 16, though by 2% at most.
    band: int


TUNING = {"default": Tuning(3, 8), "avx2": Tuning(6, 8), "avx512": Tuning(12, 4)}

PRECISIONS = ("fp32", "bf16", "int8")  # in the order of `Precision` in csrc/cpu/engine.h
_NAMES = tuple(axes.ALGORITHMS)  # in the order of `Algorithm` in csrc/cpu/engine.h


class Packed(NamedTuple):
    """What the native call takes, and the work in it."""

    plan: Tensor  # int64
    weights: Tensor  # float32
    words: Tensor  # int32: weights in bf16 or int8, several channels each
    flop: int  # of both scores of an image: multiplications and as many additions


class Packer:
    """Collects layers in the order that csrc/cpu/engine_plan.cpp reads them."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.plan: list[int] = []
        self.weights: list[Tensor] = []
        self.words: list[Tensor] = [torch.empty(0, dtype=torch.int32)]
        # Of both scores of an image: the decoder runs once for each.
        self.multiplications = 0
        self._passes = 1

    def packed(self) -> Packed:
        plan = torch.tensor(self.plan, dtype=torch.int64)
        words = torch.cat(self.words)
        return Packed(plan, torch.cat(self.weights), words, 2 * self.multiplications)

    def head(self, model: ALPS, precision: str) -> None:
        """The precision, the sizes, and how the perturbation is bounded."""
        config = model.config
        self.plan += [PRECISIONS.index(precision), config.channels, *config.image_size]
        # The bound is the distorter's: noise has none.
        bound = "none" if model.distorter is None else config.bound
        self.plan += [config.latent, BOUNDS.index(bound), config.smoothing]
        self.weights.append(torch.tensor([config.strength], dtype=torch.float32))

    def encoder(self, encoder: Encoder, sizes: Sequence[tuple[int, int]], slope: float) -> None:
        """Four strided convolutions; the last one with the average pooling behind it."""
        convolutions = [layer for layer in encoder.layers if isinstance(layer, nn.Conv2d)]
        self.plan.append(len(convolutions))
        *hidden, last = convolutions
        for layer, (height, width) in zip(hidden, sizes, strict=False):
            sides = [(height,), (width,)]
            self._convolution(axes.strided, sides, layer.weight, layer.bias, slope)
        (height, width), pixels = sizes[3], sizes[4][0] * sizes[4][1]
        rows, columns = axes.pooled(height), axes.pooled(width)
        self._layer(last.weight / pixels, last.bias, rows, columns, 1.0, pooled=True)

    def decoder(self, model: ALPS, slope: float) -> None:
        """The dense layer, four transposed strided convolutions, and two of stride 1."""
        decoder, sizes = model.decoder, model.config.map_sizes()[::-1]
        self._passes = 1 if model.config.perturbation == "none" else 2
        *halves, inner, last = (m for m in decoder.layers if isinstance(m, nn.ConvTranspose2d))
        # From (channel, pixel), the order of its outputs, to (pixel, channel).
        start, pixels = decoder.start[0], sizes[0][0] * sizes[0][1]
        dense, bias = (
            value.unflatten(0, (start, pixels)).transpose(0, 1).flatten(0, 1)
            for value in (decoder.dense.weight, decoder.dense.bias)
        )
        self._dense(dense[:, :, None, None], bias, (start, pixels), slope, len(halves) + 2)
        for layer, small, large in zip(halves, sizes, sizes[1:], strict=False):
            sides = list(zip(small, large, strict=True))
            weight = layer.weight.transpose(0, 1)
            self._convolution(axes.transposed, sides, weight, layer.bias, slope)
        weight = inner.weight.transpose(0, 1)
        self._convolution(axes.same, [(n,) for n in sizes[-1]], weight, inner.bias, slope)
        # The last one gives no more channels than images have: direct.
        rows, columns = (axes.same(n, False, self.tuning.band) for n in sizes[-1])
        self._layer(last.weight.transpose(0, 1), last.bias, rows, columns, 1.0)

    def _convolution(
        self,
        axis: Callable[..., Axis],
        sizes: Iterable[tuple[int, ...]],
        weight: Tensor,
        bias: Tensor | None,
        slope: float,
    ) -> None:
        """A layer whose axes are ``axis(*size, minimal, limit)``, by minimal algorithms where what
        they save is more than what their sums take: where channels are many."""
        direct, minimal = (
            [axis(*size, choice, self.tuning.band) for size in sizes] for choice in (False, True)
        )
        outputs, inputs = weight.shape[:2]
        products = [math.prod(a.multiplications() for a in pair) for pair in (direct, minimal)]
        saved = (products[0] - products[1]) * inputs * outputs
        values, summed = axes.sums(*minimal)
        faster = saved > self.tuning.sum_cost * (values * inputs + summed * outputs)
        rows, columns = minimal if faster else direct
        self._layer(weight, bias, rows, columns, slope)

    def _dense(
        self, weight: Tensor, bias: Tensor, shape: tuple[int, int], slope: float, following: int
    ) -> None:
        """The dense layer to a map of `shape` (channels, pixels); `following` layers come after."""
        self.plan.append(following + 1)
        self._layer(weight, bias, axes.point(), axes.point(), slope)

    def _layer(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rows: Axis,
        columns: Axis,
        slope: float,
        pooled: bool = False,
    ) -> None:
        """`weight`: float64 (out, in, height, width), as of a convolution."""
        outputs, inputs = weight.shape[:2]
        self.plan += [inputs, outputs]
        products = rows.multiplications() * columns.multiplications() * inputs * outputs
        self.multiplications += self._passes * products
        filters = []
        for axis, taps in ((rows, weight.shape[2]), (columns, weight.shape[3])):
            self._axis(axis)
            mixes = [[float(tap) for tap in mix[:taps]] for mix in axis.filters]
            filters.append(torch.tensor(mixes, dtype=torch.float64))
        mixed = torch.einsum("ry,cx,oiyx->rcoi", filters[0], filters[1], weight)
        bias = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias
        scale = torch.tensor([slope], dtype=torch.float32)
        self.weights += [scale, bias.float(), _tiled(mixed).float()]

    def _axis(self, axis: Axis) -> None:
        self.plan += [axis.inputs, axis.outputs, len(axis.filters), len(axis.bands)]
        for band in axis.bands:
            for sums in (band.values, band.products):
                self.plan.append(len(sums))
                for terms in sums:
                    self.plan += [len(terms), *(number for term in terms for number in term)]
            # A result is one product, or comes out of a tile.
            self.plan.append(len(band.results))
            self.plan += [
                result.terms[0][0] if len(result.terms) == 1 else -1 for result in band.results
            ]
            self.plan.append(len(band.tiles))
            for tile in band.tiles:
                inputs = [-1 if index is None else index for index in tile.inputs]
                self.plan += [_NAMES.index(tile.algorithm), *inputs]
                self.plan += [tile.first_value, tile.first_product, tile.first_result, tile.step]


def _tiled(filters: Tensor) -> Tensor:
    """(R, C, out, in) -> flat, as (R, C, tile of out, in, out within the tile)."""
    return torch.cat(
        [tile.transpose(2, 3).flatten(2) for tile in filters.split(TILE, dim=2)], dim=2
    ).flatten()


def pack(model: ALPS, minimal: bool | None = None) -> Packed:
    """The plan and the weights in fp32 of a model whose batch norms are folded, in float64.

    Args:
        model: see `fastalps.folding.fold_batch_norm`.
        minimal: use algorithms with fewer multiplications, see `fastalps.engine.axes`; None: in
            the layers that are faster so on this processor.
    """
    tuning = TUNING.get(backends.cpu_kernels(), TUNING["default"])
    if minimal is not None:
        tuning = tuning._replace(sum_cost=0.0 if minimal else math.inf)
    return fill(Packer(tuning), model, "fp32")


def fill(packer: Packer, model: ALPS, precision: str) -> Packed:
    """Hands a model's parts to the packer in the order of the plan."""
    slope, sizes = model.config.negative_slope, model.config.map_sizes()
    packer.head(model, precision)
    packer.encoder(model.encoder, sizes, slope)
    if model.distorter is None:
        packer.plan.append(0)
    else:
        packer.encoder(model.distorter.encoder, sizes, slope)
    packer.decoder(model, slope)
    return packer.packed()
