"""Weights of an ALPS model in the order that the fused CUDA kernels read them.

`csrc/cuda/fused_index.h` defines that order: layer by layer, each a matrix of terms (taps, then
inputs) by outputs, cut into the fragments that one mma instruction multiplies by.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastalps.folding import fold_batch_norm
from fastalps.models import ALPS, PRESETS, Decoder, ModelConfig
from fastalps.rounding import round_taps

# Terms and outputs of a fragment: B of mma m16n8k16.
TERMS, OUTPUTS = 16, 8

# Taps that meet in an output pixel: of a convolution, and, by parity, of a transposed one of stride
# 2 and padding 1.
EVERY_TAP = [range(9)]
PHASES = [(4,), (3, 5), (1, 7), (0, 2, 6, 8)]

# The same taps by the input that they meet: `ordered_tap` of csrc/cuda/fused_index.h.
ORDERED_TAPS = [4, 5, 8, 7, 3, 6, 2, 1, 0]

# The networks that the kernels are compiled for, at their numbers: `with_shape` of fused_shapes.h.
SHAPES = [
    ("paper", 28),
    ("paper", 30),
    ("fast", 28),
    ("fast", 30),
    ("network-b", 28),
    ("network-b", 30),
]


# What says where a patch is: `kPatchBytes` of csrc/cuda/fused.h.
PATCH_BYTES = 16


class PackedWeights(NamedTuple):
    """What the kernels read."""

    weights: Tensor  # bfloat16 (fragments, 32 lanes, 4)
    biases: Tensor  # float32


class Sizes(NamedTuple):
    """Scratch of one patch, in values."""

    maps: int  # bf16, between the kernels E and M, then between M and D
    latent: int  # float32, of one network

    def bytes(self, networks: int) -> int:
        """Of a patch that so many networks (1, or 2 with the distorter) encode."""
        return 2 * self.maps + 4 * networks * self.latent + PATCH_BYTES


def shape_number(config: ModelConfig) -> int | None:
    """The number of the compiled shape that this model has; None where there is none."""
    if config.channels != 1 or config.distorter != config.encoder:
        return None
    for number, (name, side) in enumerate(SHAPES):
        preset = PRESETS[name]
        widths = (config.latent, config.encoder, config.decoder)
        if widths == (preset["latent"], preset["encoder"], preset["decoder"]) and (
            config.image_size == (side, side)
        ):
            return number
    return None


def sizes(config: ModelConfig) -> Sizes:
    """The scratch that a patch of this model takes."""
    height, width = config.map_sizes()[2]
    return Sizes(2 * height * width * max(config.encoder[1], config.decoder[2]), config.latent)


def fragments(matrix: Tensor) -> Tensor:
    """(terms, outputs), padded with zeros -> (steps * tiles, 32, 4), each lane's values of B.

    Lane 4 * n + t of a fragment holds terms 2t, 2t + 1, 2t + 8, 2t + 9 of output n.
    """
    terms, outputs = matrix.shape
    padded = nn.functional.pad(matrix, (0, -outputs % OUTPUTS, 0, -terms % TERMS))
    # step, half, quad, pair, tile, output -> step, tile, output, quad, half, pair.
    cut = padded.reshape(-1, 2, 4, 2, padded.shape[1] // OUTPUTS, OUTPUTS)
    return cut.permute(0, 4, 5, 2, 1, 3).reshape(-1, 32, 4)


def pack_fused(model: ALPS) -> PackedWeights:
    """Packs a model; batch norm is folded in float64, then weights round once to bf16, those of
    convolutions by `fastalps.rounding.round_taps`.

    Args:
        model: of widths that the kernels can have, see `fastalps.fused.build.reason_against`;
            without a distorter, its place holds zeros.

    Returns:
        weights and biases on the CPU.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", torch.float64)
    fold_batch_norm(network)
    encoder = _convolutions(network.encoder)
    if network.distorter is None:
        distorter = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in encoder]
    else:
        distorter = _convolutions(network.distorter.encoder)
    height, width = network.config.map_sizes()[4]
    pairs = list(zip(encoder, distorter, strict=True))
    encoders, decoder = _pack_encoders(pairs, height * width), _pack_decoder(network.decoder)
    weights, biases = (torch.cat(one + other) for one, other in zip(encoders, decoder, strict=True))
    biases = nn.functional.pad(biases, (0, OUTPUTS - 1))  # After the one of the last layer.
    return PackedWeights(weights.to(torch.bfloat16).contiguous(), biases.float())


LayerParts = tuple[list[Tensor], list[Tensor]]  # Fragments and biases.


def _pack_encoders(pairs: Sequence[Sequence[tuple[Tensor, Tensor]]], pixels: int) -> LayerParts:
    """Weights and biases of both networks, layer by layer; `pixels`: of the last map."""
    first, second, third, fourth = pairs
    # The kernels read pixels in gray levels, which bf16 holds exactly, and ones for the biases.
    taps = torch.cat([_terms(_rounded(weight / 255)) for weight, _ in first], 1)
    packed = [fragments(torch.cat([taps, _parts(torch.cat([bias for _, bias in first]))]))]
    for weight, _ in second:
        across = weight.shape[0] // (2 * OUTPUTS)  # Tiles of one of two groups of columns.
        packed.append(_in_parts(_joint(_terms(_rounded(weight)), across)))
    packed += [fragments(_terms(_rounded(weight))) for weight, _ in third]
    # Its pixels are summed, not averaged.
    packed += [fragments(_terms(_rounded(weight / pixels))) for weight, _ in fourth]
    return packed, [bias for layers in pairs for _, bias in layers]


def _pack_decoder(decoder: Decoder) -> LayerParts:
    start, cells = decoder.start[0], decoder.start[1] * decoder.start[2]
    # From (channel, pixel), the order of its outputs, to (pixel, channel).
    dense, bias = (
        value.unflatten(0, (start, cells)).transpose(0, 1).flatten(0, 1)
        for value in (decoder.dense.weight, decoder.dense.bias)
    )
    layers = [layer for layer in decoder.layers if isinstance(layer, nn.ConvTranspose2d)]
    weights = [
        _rounded(layer.weight.transpose(0, 1), EVERY_TAP if layer.stride == (1, 1) else PHASES)
        for layer in layers
    ]
    columns = [weight.shape[0] // OUTPUTS for weight in weights]
    # With stride 1 it is a convolution by the mirrored kernel. The last layer has one output: the
    # taps of a row are the columns.
    fifth, last = (weight.flip(2, 3) for weight in weights[4:])
    ends = [fragments(matrix) for matrix in (_row_terms(fifth), *_row_columns(last))]
    packed = [
        fragments(_joint(dense.T, 4)),
        fragments(_terms(weights[0])),
        fragments(_joint(_terms(weights[1]), 2 if columns[1] >= 8 else 1)),
        _in_phases(weights[2], 2),
        _in_phases(weights[3], 1),
        _twins(torch.cat(ends)[None]),
    ]
    return packed, [bias, *map(_bias, layers)]


def _convolutions(encoder: nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    return [(layer.weight, _bias(layer)) for layer in layers]


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    return layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias


def _rounded(weight: Tensor, together: Sequence[Sequence[int]] = EVERY_TAP) -> Tensor:
    """(out, in, 3, 3) -> the same, on the values of bf16."""
    taps = round_taps(weight.flatten(2).permute(2, 0, 1), together)
    return taps.permute(1, 2, 0).reshape(weight.shape)


def _twins(found: Tensor) -> Tensor:
    """(groups, n, 32, 4) -> fragments in twins: each two of a group with a lane's values side by
    side. The last one of an odd n gets zeros: see `twins` of csrc/cuda/fused_index.h."""
    padded = nn.functional.pad(found, (0, 0, 0, 0, 0, found.shape[1] % 2))
    return padded.unflatten(1, (-1, 2)).transpose(2, 3).reshape(-1, 32, 4)


def _in_parts(matrix: Tensor) -> Tensor:
    """(terms, outputs) -> (fragments, 32, 4): of each step of terms first all outputs by its first
    8 terms, in parts of 8 outputs, then by the other 8: see `kPartBytes` of fused_index.h."""
    # step, half, term, part, output -> step, half, part, output, term.
    cut = matrix.unflatten(0, (-1, 2, TERMS // 2)).unflatten(-1, (-1, OUTPUTS))
    return cut.permute(0, 1, 3, 4, 2).reshape(-1, 32, 4)


def _in_phases(weight: Tensor, groups: int) -> Tensor:
    """(out, in, 3, 3) -> (fragments, 32, 4) of a transposed convolution: of each step of terms and
    each group of outputs its taps in parts, see `ordered_tap` of fused_index.h."""
    terms = weight.flatten(2).permute(2, 1, 0)[ORDERED_TAPS]
    # tap, step, half, term, group, part, output -> step, group, half, tap, part, output, term.
    cut = terms.unflatten(1, (-1, 2, TERMS // 2)).unflatten(-1, (groups, -1, OUTPUTS))
    return cut.permute(1, 4, 2, 0, 5, 6, 3).reshape(-1, 32, 4)


def _parts(values: Tensor) -> Tensor:
    """(n,) -> (3, n): values of bf16 that sum up to what float32 holds."""
    parts = []
    for _ in range(3):
        parts.append(values.to(torch.bfloat16).to(values.dtype))
        values = values - parts[-1]
    return torch.stack(parts)


def _joint(matrix: Tensor, across: int) -> Tensor:
    """Outputs in the order in which a lane's columns of `across` tiles are neighbouring channels:
    see `joint_channel` of csrc/cuda/fused_index.h. Biases stay in the order of channels."""
    # tile, quad, pair of tile 8 * across channels <- quad, tile, pair.
    cut = matrix.unflatten(1, (-1, 4, across, 2))
    return cut.transpose(2, 3).flatten(1)


def _row_terms(weight: Tensor) -> Tensor:
    """As `_terms`, but with each row's taps padded with zeros to whole fragments."""
    rows = weight.permute(2, 3, 1, 0).flatten(1, 2)
    return nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % TERMS)).flatten(0, 1)


def _row_columns(weight: Tensor) -> list[Tensor]:
    """(1, in, 3, 3) -> of each row of taps (in, 8): a lane has two columns, of which it stores the
    first one's products; of the four lanes the last one has what the third has."""
    return list(weight[0].transpose(0, 1)[..., [0, 0, 1, 1, 2, 2, 2, 2]])


def _terms(weight: Tensor) -> Tensor:
    """(out, in, height, width) -> (height * width * in, out)."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)
