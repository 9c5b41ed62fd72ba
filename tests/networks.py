"""Random networks, and what they compute in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastalps import ALPS, backends
from fastalps.models import BOUNDS

STATE = backends.load_native("cpu")
needs_library = pytest.mark.skipif(not STATE.available, reason=STATE.reason)

# The kinds of scores that a model has.
SCORES = ("normal", "perturbed", "average")

# Of a test of random networks: fewer where a sanitizer checks every access.
examples = settings(
    max_examples=8 if "FASTALPS_TEST_LIBRARY" in os.environ else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def randomise(model: ALPS, rng: torch.Generator | int, gain: float = 1.0) -> ALPS:
    """Weights and running statistics as training leaves them: none of them special.

    Returns the model, in eval mode.

    Args:
        rng: may be a seed.
        gain: of each layer on the spread of its inputs.
    """
    generator = torch.Generator().manual_seed(rng) if isinstance(rng, int) else rng

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.3, 3.0)
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                fan = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose2d):
                    fan = module.in_channels * 9 / module.stride[0] ** 2
                module.weight.normal_(0, gain / fan**0.5, generator=generator)
                if module.bias is not None:
                    uniform(module.bias, -0.2, 0.2)
    return model.eval()


@st.composite
def networks(draw: st.DrawFn) -> ALPS:
    width = st.integers(1, 20)
    widths = st.tuples(width, width, width)
    torch.manual_seed(0)
    model = ALPS(
        image_size=draw(st.tuples(st.integers(8, 64), st.integers(8, 64))),
        channels=draw(st.integers(1, 4)),
        preset="fast",
        latent=draw(width),
        encoder=draw(widths),
        distorter=draw(widths),
        decoder=draw(st.tuples(width, width, width, width, width, width)),
        batch_norm=draw(st.booleans()),
        negative_slope=draw(st.sampled_from([0.0, 0.01, 0.2])),
        bound=draw(st.sampled_from(BOUNDS)),
        strength=draw(st.sampled_from([0.5, 1.0, 2.0])),
        smoothing=draw(st.sampled_from([1, 3, 7])),
    )
    return randomise(model, draw(st.integers(0, 1000)))


# What they compute -------------------------------------------------------------------------------


def exact(model: ALPS, images: Tensor) -> Tensor:
    """Errors (2, N) in float64: normal, perturbed. The model's own score has float32 errors."""
    pixels = images.double() / (255 if images.dtype == torch.uint8 else 1)
    with torch.no_grad():
        out = copy.deepcopy(model).double().eval()(pixels)
    pairs = (out.reconstruction, out.perturbed_reconstruction)
    side = model.config.smoothing
    return torch.stack([mean_square(neighbourhood_means(one - pixels, side)) for one in pairs])


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of what was expected; from any device."""
    if expected.numel() == 0:
        return 0.0
    return float(((found.double().cpu() - expected).abs() / expected).max())


def mean_square(maps: Tensor) -> Tensor:
    return maps.square().flatten(1).mean(1)


def neighbourhood_means(maps: Tensor, side: int) -> Tensor:
    """Of (N, C, H, W): sums of shifted maps over how many of the shifted places lie inside."""
    reach = side // 2
    height, width = maps.shape[2:]
    inside = torch.ones_like(maps[:1, :1])
    padded, counted = (F.pad(x, [reach] * 4) for x in (maps, inside))
    total, count = torch.zeros_like(maps), torch.zeros_like(inside)
    for i in range(side):
        for j in range(side):
            window = (..., slice(i, i + height), slice(j, j + width))
            total, count = total + padded[window], count + counted[window]
    return total / count


def carried_rounding(weight: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights (a, b, 3, 3) in bf16: of the taps that meet in an output pixel, the largest first,
    each takes what rounding the last one lost."""
    taps = weight.flatten(2)
    reach = []
    for tap in range(9):
        one = torch.zeros(9, dtype=weight.dtype)
        one[tap] = 1
        reach.append(apply(one.view(1, 1, 3, 3)).flatten() != 0)
    groups: list[list[int]] = []
    for tap in range(9):
        near = [g for g in groups if any((reach[tap] & reach[other]).any() for other in g)]
        joined = [other for g in near for other in g]
        groups = [g for g in groups if g not in near] + [[*joined, tap]]
    result = torch.empty_like(taps)
    for group in groups:
        lost = torch.zeros(weight.shape[:2], dtype=weight.dtype)
        left = taps[:, :, group].abs()
        for _ in group:
            # The largest that was not rounded yet, of each pair of channels.
            pick = left.argmax(2, keepdim=True)
            left.scatter_(2, pick, -1.0)
            index = torch.tensor(group)[pick]
            wanted = taps.gather(2, index)[..., 0] + lost
            kept = wanted.bfloat16().double()
            result.scatter_(2, index, kept[..., None])
            lost = wanted - kept
    return result.view_as(weight)
