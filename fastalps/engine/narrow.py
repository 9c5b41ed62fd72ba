"""bf16 and int8 for the engine: ranges of activations, rounded weights, words of several channels.

int8 follows B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018): an activation x is a byte ``round(x / scale + zero)``,
0 to 255; a weight is ``round(w / scale)``, -127 to 127, with a scale for each output channel; sums
of products are exact. The pixels are bytes as they are. The dense layer, a hundredth of the work,
stays in fp32, as do the latent vectors: a distorter makes their range wide.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastalps.engine import axes
from fastalps.engine.axes import Axis
from fastalps.engine.packing import Packed, Packer, Tuning, fill
from fastalps.folding import fold_batch_norm
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, Encoder
from fastalps.rounding import round_taps

# Channels of a pixel in a word of 32 bits.
GROUPS = {"bf16": 2, "int8": 4}
NARROW = tuple(GROUPS)

# Pixels along an axis at most: 16 bits hold a sum of 256 bytes, and the average pooling before the
# encoder's last convolution sums a sixteenth of the pixels along each axis.
LARGEST_IMAGE = 256

# (lowest, highest) value of each layer's output, in the order of the plan.
Ranges = tuple[tuple[float, float], ...]

PIXELS = 1 / 255, 0.0  # scale and zero


def range_count(model: ALPS) -> int:
    """How many ranges `activation_ranges` finds: three layers and the pooled sums of an encoder,
    six maps of the decoder."""
    return (8 if model.distorter is not None else 4) + 6


@torch.no_grad()
def activation_ranges(model: ALPS, images: Tensor, batch: int = 64) -> Ranges:
    """Lowest and highest values between the layers of a model, over normal images.

    Args:
        model: an `fastalps.ALPS`; its distorter's perturbation, or noise, counts as in scoring.
        images: (N, C, H, W), uint8 (0 to 255) or floating (0 to 1), N at least 1; some hundred do.

    Returns:
        `range_count` pairs, what the layers of encoder, distorter and decoder give in the order of
        `fastalps.engine.packing.Packer`.

    Raises:
        ValueError: no image.
    """
    if len(images) == 0:
        raise ValueError(
            "images: expected at least one normal image to find activations' ranges on"
        )
    network = copy.deepcopy(model).eval().to("cpu", torch.float32)
    fold_batch_norm(network)
    low = torch.full((range_count(model),), torch.inf)
    high = -low
    for part in images.split(batch):
        maps = list(_activations(network, unit_pixels(part)))
        low = low.minimum(torch.stack([values.min() for values in maps]))
        high = high.maximum(torch.stack([values.max() for values in maps]))
    if not torch.isfinite(low + high).all():
        raise ValueError("model: its activations are not finite; train it again")
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _activations(network: ALPS, images: Tensor) -> Generator[Tensor, None, None]:
    latent = yield from _encoder_activations(network.encoder, images)
    if network.distorter is None:
        perturbation = network.distort(images)
    else:
        perturbation = yield from _encoder_activations(network.distorter.encoder, images)
        perturbation = _bounded(network, images, perturbation)
    latents = torch.cat([latent, latent + network.config.strength * perturbation])
    maps = network.decoder.dense(latents).unflatten(1, network.decoder.start)
    for layer in network.decoder.layers:
        maps = layer(maps)
        if isinstance(layer, nn.LeakyReLU):
            yield maps


def _bounded(network: ALPS, images: Tensor, perturbation: Tensor) -> Tensor:
    # The distorter's own bound, on what its encoder gave.
    return network.distort(images) if network.config.bound != "none" else perturbation


def _encoder_activations(encoder: Encoder, images: Tensor) -> Generator[Tensor, None, Tensor]:
    maps = images
    *layers, last = encoder.layers
    for layer in layers:
        maps = layer(maps)
        if isinstance(layer, nn.LeakyReLU):
            yield maps
    # The sums of `fastalps.engine.axes.pooled`: each tap of the last convolution meets one.
    padded = nn.functional.pad(maps, (1, 1, 1, 1))
    height, width = ((n + 1) // 2 for n in maps.shape[2:])
    sums = [
        padded[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2].sum((2, 3))
        for i in range(3)
        for j in range(3)
    ]
    yield torch.stack(sums)
    return last(maps).mean((2, 3))


def pack_narrow(model: ALPS, precision: str, ranges: Ranges | None = None) -> Packed:
    """The plan and the weights in bf16 or int8 of a model whose batch norms are folded, in float64.

    Args:
        ranges: for int8, see `activation_ranges`.
    """
    return fill(_NarrowPacker(precision, ranges or ()), model, precision)


class _NarrowPacker(Packer):
    """Layers as lists of pixels, see `NarrowLayer` in csrc/cpu/engine.h."""

    def __init__(self, precision: str, ranges: Sequence[tuple[float, float]]) -> None:
        super().__init__(Tuning(sum_cost=math.inf, band=8))
        self.precision = precision
        self._ranges = iter(ranges)
        self._coding = PIXELS  # of the next layer's input

    def encoder(self, encoder: Encoder, sizes: Sequence[tuple[int, int]], slope: float) -> None:
        self._coding = PIXELS
        super().encoder(encoder, sizes, slope)

    def _next_coding(self) -> tuple[float, float]:
        """Scale and zero of what the next layer gives."""
        if self.precision == "bf16":
            return 1.0, 0.0
        low, high = next(self._ranges)
        low, high = min(low, 0.0), max(high, 0.0)
        # A map that is zero everywhere has no range; any will do.
        scale = (high - low) / 255 or 1.0
        return scale, float(round(-low / scale))

    def _code(self, scale: float, zero: float) -> None:
        self.weights.append(torch.tensor([1 / scale, zero], dtype=torch.float32))

    def _dense(
        self, weight: Tensor, bias: Tensor, shape: tuple[int, int], slope: float, following: int
    ) -> None:
        self.plan += [*shape, 1]
        super()._layer(weight, bias, axes.point(), axes.point(), slope)
        self._coding = self._next_coding()
        self._code(*self._coding)
        self.plan.append(following)

    def _layer(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rows: Axis,
        columns: Axis,
        slope: float,
        pooled: bool = False,
    ) -> None:
        outputs, inputs = weight.shape[:2]
        last = slope == 1.0
        pixels, sums = _direct(rows, columns, pooled)
        self.multiplications += self._passes * inputs * outputs * sum(map(len, pixels))
        classes: dict[tuple[int, ...], int] = {}
        numbers = []
        for terms in pixels:
            filters = tuple(number for _, number in terms)
            numbers += [classes.setdefault(filters, len(classes)), len(terms)]
            numbers += [number for term in terms for number in term]
        self.plan += [inputs, outputs, int(last), len(sums)]
        for members in sums:
            self.plan += [len(members), *members]
        filter_count = len(rows.filters) * len(columns.filters)
        self.plan += [filter_count, len(classes), len(pixels), *numbers]

        (before, zero), factor = self._coding, 1.0
        pool_zeros = torch.zeros(len(sums), dtype=torch.float32)
        if sums:
            # A sum of n bytes is (sum - n * zero) * scale, and coded anew.
            scale, pool_zero = self._next_coding()
            lengths = torch.tensor([len(members) for members in sums], dtype=torch.float32)
            factor, pool_zeros = before / scale, pool_zero - lengths * zero * before / scale
            before, zero = scale, pool_zero
        coding = (1.0, 0.0) if last else self._next_coding()
        if self.precision == "bf16" and self._coding is PIXELS:
            # Bytes are whole in bf16; their scale goes into the weights.
            weight, before = weight / 255, 1.0
        mixes = [
            torch.tensor([[float(tap) for tap in mix] for mix in axis.filters], dtype=torch.float64)
            for axis in (rows, columns)
        ]
        mixed = torch.einsum("ry,cx,oiyx->rcoi", *mixes, weight).flatten(0, 1)
        bias = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias
        scales, biases = torch.ones(outputs, dtype=torch.float64), bias.repeat(len(classes), 1)
        if self.precision == "int8":
            largest = mixed.abs().amax((0, 2))
            largest[largest == 0] = 1.0
            mixed = (mixed / (largest / 127)[:, None]).round()
            scales = largest / 127 * before
            # The bytes of zero: their sums are known, for each set of filters.
            sums_of_weights = mixed.sum(2)
            for filters, number in classes.items():
                biases[number] -= scales * zero * sums_of_weights[list(filters)].sum(0)
        else:
            mixed = _bf16_weights(
                mixed, classes, doubled=self._coding is PIXELS and inputs % 2 == 1
            )
        self.weights.append(torch.tensor([slope], dtype=torch.float32))
        self._code(*coding)
        factors = torch.tensor([factor], dtype=torch.float32)
        self.weights += [factors, pool_zeros, scales.float()]
        self.weights.append(biases.float().flatten())
        self.words.append(_words(mixed, self.precision))
        self._coding = coding


def _direct(
    rows: Axis, columns: Axis, pooled: bool
) -> tuple[list[list[tuple[int, int]]], list[list[int]]]:
    """The terms (input, filter) of each output pixel, and the sums of pixels that inputs are.

    Only behind a pooling inputs are sums (even of one pixel); else they are pixels.
    """
    sums: dict[tuple[int, ...], int] = {}
    pixels = []
    for row in _results(rows):
        for column in _results(columns):
            terms = []
            for ys, row_filter in row:
                for xs, column_filter in column:
                    members = tuple(y * columns.inputs + x for y in ys for x in xs)
                    index = sums.setdefault(members, len(sums))
                    terms.append((index, row_filter * len(columns.filters) + column_filter))
            pixels.append(terms)
    if pooled:
        return pixels, [list(members) for members in sums]
    single = [members[0] for members in sums]
    return [[(single[i], number) for i, number in terms] for terms in pixels], []


def _results(axis: Axis) -> Iterator[list[tuple[list[int], int]]]:
    """Of each result of an axis without minimal algorithms: (inputs, filter) of its terms."""
    for band in axis.bands:
        for result in band.results:
            ((product, _),) = result.terms
            yield [
                ([index for index, _ in band.values[value]], number)
                for value, number in band.products[product]
            ]


def _bf16_weights(filters: Tensor, classes: Iterable[tuple[int, ...]], doubled: bool) -> Tensor:
    """(F, out, in) float64 -> the same, on the values of bf16.

    Args:
        classes: the sets of filters that a pixel meets.
        doubled: the last channel comes twice (`encode_pixels`): another one holds the rest of its
            weights.
    """
    result = round_taps(filters, _meeting(len(filters), classes))
    if not doubled:
        return result
    last = filters[:, :, -1:]
    result[:, :, -1:] = last.bfloat16().double()
    return torch.cat([result, last - result[:, :, -1:]], 2)


def _meeting(count: int, classes: Iterable[tuple[int, ...]]) -> list[list[int]]:
    """The filters 0 to count - 1 in sets, those of a class in one."""
    sets = [{number} for number in range(count)]
    for members in classes:
        joined = {number for one in sets if one & set(members) for number in one}
        sets = [one for one in sets if not one & joined] + [joined]
    return [sorted(one) for one in sets]


def _words(filters: Tensor, precision: str) -> Tensor:
    """(F, out, in) -> flat int32, as (F, out, group of in)."""
    padded = nn.functional.pad(filters, (0, -filters.shape[2] % GROUPS[precision]))
    dtype = torch.int8 if precision == "int8" else torch.bfloat16
    return padded.to(dtype).contiguous().view(torch.int32).flatten()
