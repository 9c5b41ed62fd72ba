"""Batch norm folded into the layers before it, which saves scoring a pass over every map."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fastalps.models import Decoder


def fold_batch_norm(network: nn.Module) -> int:
    """Folds each batch norm into the layer right before it, in place; returns how many.

    Within an nn.Sequential, where the order of calls is known, and behind a decoder's dense layer;
    only in eval mode, where the running statistics are constants:
    y = gamma * (w * x + b - mean) / sqrt(var + eps) + beta.
    """
    folded = 0
    for parent in network.modules():
        if isinstance(parent, Decoder) and isinstance(parent.layers[0], nn.BatchNorm2d):
            parent.dense = _fused_dense(parent.dense, parent.layers[0])
            parent.layers[0] = nn.Identity()
            folded += 1
        if not isinstance(parent, nn.Sequential):
            continue
        for (name, layer), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            fused = _fused(layer, norm)
            if fused is not None:
                setattr(parent, name, fused)
                setattr(parent, norm_name, nn.Identity())
                folded += 1
    return folded


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        if isinstance(layer, nn.Conv2d):
            return fuse_conv_bn_eval(layer, norm)
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
            return fuse_conv_bn_eval(layer, norm, transpose=True)
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return None if norm.running_mean is None else fuse_linear_bn_eval(layer, norm)
    return None


def _fused_dense(dense: nn.Linear, norm: nn.BatchNorm2d) -> nn.Linear:
    """A dense layer whose output is a map, with the map's batch norm: its pixels share one norm."""
    pixels = dense.out_features // norm.num_features
    flat = nn.BatchNorm1d(dense.out_features, eps=norm.eps).to(dense.weight).eval()
    for name in ("running_mean", "running_var", "weight", "bias"):
        getattr(flat, name).data = getattr(norm, name).data.repeat_interleave(pixels)
    return fuse_linear_bn_eval(dense, flat)
