"""Several models' networks as one network of groups, which shares their memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastalps.models import ALPS, Decoder


def stack(models: Sequence[ALPS]) -> ALPS:
    """One network that computes all of the models and shares their memory.

    It takes and gives the samples of K models in turn: of (N * K, ...), row ``n * K + k`` passes
    through model k. The models' weights and statistics become slices of its own, so whatever
    changes one changes the other; `unstack` parts them again.

    Args:
        models: of one configuration, on one device, in one memory format.
    """
    whole = copy.deepcopy(models[0])
    whole.encoder = _Grouped([model.encoder for model in models])  # type: ignore[assignment]
    whole.decoder = _Grouped([model.decoder for model in models])  # type: ignore[assignment]
    distorters = [model.distorter for model in models if model.distorter is not None]
    if whole.distorter is not None:
        encoders = [distorter.encoder for distorter in distorters]
        whole.distorter.encoder = _Grouped(encoders)  # type: ignore[assignment]
    return whole


@torch.no_grad()
def unstack(models: Sequence[ALPS]) -> None:
    """Gives each model memory of its own again."""
    for model in models:
        for layer in model.modules():
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.clone()
            for name, buffer in layer.named_buffers(recurse=False):
                setattr(layer, name, buffer.clone())


class _Grouped(nn.Module):
    """K networks (encoders or decoders) as one: row ``n * K + k`` passes through network k."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = count = len(networks)
        self.network = copy.deepcopy(networks[0])
        if isinstance(self.network, Decoder):
            channels, height, width = self.network.start
            self.network.start = (count * channels, height, width)
            self.network.dense = _GroupedLinear(count)  # type: ignore[assignment]
        layers = (network.modules() for network in networks)
        for whole, *parts in zip(self.network.modules(), *layers, strict=True):
            if isinstance(whole, nn.Conv2d | nn.ConvTranspose2d):
                whole.groups = count
                whole.in_channels *= count
                whole.out_channels *= count
            elif isinstance(whole, nn.BatchNorm2d):
                whole.num_features *= count
            _share(whole, parts)

    def forward(self, rows: Tensor) -> Tensor:
        wide = self.network(rows.reshape(-1, self.count * rows.shape[1], *rows.shape[2:]))
        return wide.reshape(-1, wide.shape[1] // self.count, *wide.shape[2:])


class _GroupedLinear(nn.Module):
    """K dense layers as one, (N, K * inputs) -> (N, K * outputs); `_share` sets its weights."""

    weight: Tensor
    bias: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, wide: Tensor) -> Tensor:
        rows = wide.unflatten(1, (self.count, -1)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.count, -1)).transpose(1, 2)
        bias = self.bias.unflatten(0, (self.count, 1, -1))
        return torch.baddbmm(bias, rows, weight).transpose(0, 1).flatten(1)


@torch.no_grad()
def _share(whole: nn.Module, parts: Sequence[nn.Module]) -> None:
    """One tensor for each of the layers' own, of which theirs become slices."""
    for name, first in parts[0].named_parameters(recurse=False):
        values = torch.cat([getattr(part, name) for part in parts])
        setattr(whole, name, nn.Parameter(values, first.requires_grad))
        for part, piece in zip(parts, values.chunk(len(parts)), strict=True):
            getattr(part, name).data = piece
    for name, buffer in parts[0].named_buffers(recurse=False):
        buffers = [getattr(part, name) for part in parts]
        # A batch norm counts its batches in a scalar: K of them count in a vector.
        joined = torch.cat(buffers) if buffer.dim() else torch.stack(buffers)
        setattr(whole, name, joined)
        pieces = joined.chunk(len(parts)) if buffer.dim() else joined.unbind()
        for part, piece in zip(parts, pieces, strict=True):
            setattr(part, name, piece)
