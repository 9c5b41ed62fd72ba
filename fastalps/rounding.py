"""Weights in bf16 whose roundings cancel where a layer's input is smooth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def round_taps(taps: Tensor, together: Iterable[Sequence[int]]) -> Tensor:
    """Filters on the values of bf16; what rounding takes from a tap goes to the next one.

    Neighbouring pixels are alike, so errors that add up to nothing over the taps that meet in an
    output pixel cancel. The largest tap is first, so that what is left at the end is a rounding of
    the smallest. Scores of plain rounding to nearest are off by more, up to twice as much on images
    (docs/performance.md).

    Args:
        taps: (taps, ...) floating: a filter's places, of each pair of channels.
        together: sets of taps that meet in output pixels; each tap in one of them.

    Returns:
        float64, the shape of `taps`.
    """
    taps = taps.double()
    result = torch.empty_like(taps)
    for members in together:
        part = taps[list(members)]
        order = part.abs().sort(stable=True, dim=0, descending=True).indices
        rounded, carried = [], torch.zeros_like(part[0])
        for weight in part.gather(0, order):
            rounded.append((weight + carried).bfloat16().double())
            carried = weight + carried - rounded[-1]
        result[list(members)] = torch.zeros_like(part).scatter(0, order, torch.stack(rounded))
    return result
