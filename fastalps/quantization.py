"""bf16 and int8 on CPUs: what a model needs for them, and whether they keep its ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalps import backends
from fastalps.calibration import middle_ranks
from fastalps.engine import Engine, why_not
from fastalps.engine.narrow import Ranges, activation_ranges, range_count
from fastalps.environment import has_fast_bfloat16
from fastalps.inputs import check_array, check_pixels, to_tensor
from fastalps.models import ALPS, alterations
from fastalps.seeds import seeded

# In the order of their speed, with the instructions of which any makes them faster than fp32.
NARROW = {"int8": ("avx512_vnni", "avx_vnni"), "bf16": ("avx512_bf16",)}

# What precision="auto" asks of a precision, on normal images that did not set the ranges: their
# order hardly changes, and a threshold that was set in fp32 still means what it meant.
LEAST_CORRELATION = 0.999
LARGEST_DIFFERENCE = 0.02

# Images that `quantize` looks at: the ranges of some hundred are those of thousands.
IMAGES = 1024
LEAST_IMAGES = 4
# With fewer, of which half are compared, how near a precision comes is not known.
LEAST_COMPARED = 32


@dataclass(frozen=True)
class Agreement:
    """How the average scores of normal images agree with those in fp32.

    Attributes:
        correlation: of their ranks (Spearman), -1 to 1; 1 = the same order.
        difference: median of |score - score in fp32| / score in fp32.
    """

    correlation: float
    difference: float

    def __post_init__(self) -> None:
        for name in ("correlation", "difference"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected a number, got {value!r}")

    @property
    def close(self) -> bool:
        """Whether precision="auto" may choose it."""
        return self.correlation >= LEAST_CORRELATION and self.difference <= LARGEST_DIFFERENCE


@dataclass(frozen=True)
class Quantization:
    """What int8 needs to know of a model, stored with it.

    Attributes:
        ranges: (lowest, highest) value of each layer's output over normal images, see
            `fastalps.engine.narrow.activation_ranges`: of the encoder's three hidden layers and
            its pooled sums, the same four of the distorter where there is one, and the decoder's
            six hidden maps; 14 pairs, or 10 without a distorter.
        images: how many normal images were looked at.
        agreement: of "bf16" and "int8" with fp32.
    """

    ranges: Ranges
    images: int
    agreement: dict[str, Agreement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # JSON has lists and dictionaries only.
        ranges = tuple((float(low), float(high)) for low, high in self.ranges)
        if not all(-math.inf < low <= high < math.inf for low, high in ranges):
            raise ValueError(f"ranges: expected finite pairs (lowest, highest), got {ranges}")
        agreement = {
            name: found if isinstance(found, Agreement) else Agreement(**found)
            for name, found in dict(self.agreement).items()
        }
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "agreement", agreement)

    def check(self, model: ALPS) -> None:
        """Raises ValueError unless it has as many ranges as the model needs."""
        needed = range_count(model)
        if len(self.ranges) != needed:
            raise ValueError(
                f"ranges: int8 needs {needed} ranges of activations for this model, got "
                f"{len(self.ranges)}; find them with fastalps.quantize"
            )


def quantize(model: ALPS, normal_images: Any) -> Quantization:
    """Finds the ranges that int8 needs, and how near bf16 and int8 come to fp32.

    Every second image sets the ranges, the others are scored in all precisions. Keep the result as
    ``model.quantization``: `fastalps.save` stores it, and a `fastalps.Scorer` made afterwards knows
    int8. Training changes the ranges; quantize again.

    Args:
        model: a trained `fastalps.ALPS`, on any device.
        normal_images: (N, C, H, W) normal images or patches, uint8 (0 to 255) or floating (0 to 1),
            a tensor or an array; N at least 4. At most `IMAGES` of them, evenly spaced, are used.

    Returns:
        a `Quantization`. Its `agreement` is empty where there are no compiled kernels, and with
        fewer than `LEAST_COMPARED` images: then "auto" takes neither bf16 nor int8 in the engine.

    Raises:
        ValueError: too few images, another shape, or a model with layers, methods or hooks of its
            own. TypeError: another dtype.
    """
    check_array("normal_images", normal_images)
    shape, expected = tuple(normal_images.shape), (model.config.channels, *model.config.image_size)
    if len(shape) != 4 or shape[1:] != expected or shape[0] < LEAST_IMAGES:
        raise ValueError(
            f"normal_images must be (N, C, H, W) = (N, {', '.join(map(str, expected))}) with N at "
            f"least {LEAST_IMAGES} for this model, got shape {shape}"
        )
    if altered := alterations(model):
        raise ValueError(
            f"model: int8 is for models as they come from fastalps.ALPS, but {altered}"
        )
    picked = np.linspace(0, shape[0] - 1, min(IMAGES, shape[0])).round().astype(int)
    images = to_tensor(normal_images[picked]).cpu()
    check_pixels("normal_images", images)
    ranges = activation_ranges(model, images[::2])
    agreement = {}
    cpu = torch.device("cpu")
    if not why_not(model.config, cpu, "int8") and len(images) >= LEAST_COMPARED:
        held_out = images[1::2]
        exact = _scores(Engine(model), held_out)
        for name in NARROW:
            found = _scores(Engine(model, precision=name, ranges=ranges), held_out)
            agreement[name] = measured_agreement(found, exact)
    return Quantization(ranges, len(images), agreement)


def _scores(engine: Engine, images: Tensor) -> Tensor:
    # A model with noise draws the same for each precision.
    with seeded(0):
        return engine.errors(images, "both").mean(0)


def measured_agreement(found: Tensor, exact: Tensor) -> Agreement:
    """How near (N,) scores come to the exact ones."""
    correlation = torch.corrcoef(torch.stack([middle_ranks(found), middle_ranks(exact)]))[0, 1]
    difference = ((found - exact).abs() / exact.clamp(min=torch.finfo().tiny)).median()
    # Scores that are all equal rank nothing.
    return Agreement(float(correlation.nan_to_num(0.0)), float(difference))


def in_hardware(precision: str) -> bool:
    """Whether this processor has instructions for "int8" or "bf16", else emulated and slow."""
    return any(name in backends.dot_products() for name in NARROW[precision])


def choose(model: ALPS, device: torch.device) -> str:
    """The precision that "auto" stands for.

    A precision is close to fp32 where the model's `quantization` found ranks correlated to
    `LEAST_CORRELATION` at least, and a median difference of `LARGEST_DIFFERENCE` at most.

    In the engine, on CPUs: int8 before bf16 before fp32, the first two only where they are close
    and the processor has instructions for them (AVX512-VNNI or AVX-VNNI; AVX512-BF16). On CUDA
    devices, and layer by layer (as by the backend "reference"): bf16 where the device has
    instructions for it, unless it was found not to be close.
    """
    found = {} if model.quantization is None else model.quantization.agreement
    covered = not alterations(model) and not why_not(model.config, device, "fp32")
    if covered and backends.engines_wanted():
        for name in NARROW:
            close = name in found and found[name].close
            if close and in_hardware(name) and not why_not(model.config, device, name):
                return name
        return "fp32"
    far = "bf16" in found and not found["bf16"].close
    return "bf16" if has_fast_bfloat16(device) and not far else "fp32"
