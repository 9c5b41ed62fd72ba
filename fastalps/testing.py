"""What the tests and the benchmarks of the ops share: tolerances, inputs, poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# How far an implementation may be from the float64 reference, by the dtype of what it returns.
# float32: rounding of single operations and of sums in another order; half precisions: one
# rounding of the result (their sums are float32).
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
    torch.int64: {"rtol": 0.0, "atol": 0.0},
}

# How far the error of a whole network may be from float64, relative to it, by the dtype of weights
# and activations. int8 is judged by its ranking (AUROC moved by 0.1 point at most); this only
# catches what is broken.
SCORE_ERROR: dict[torch.dtype, float] = {
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.int8: 1e-1,
}


def tolerance(dtype: torch.dtype, device: str = "cpu", factor: float = 1.0) -> dict[str, float]:
    """`TOLERANCE` of results of `dtype` computed on `device`, times `factor`.

    Exponentials and quotients of CUDA devices are within a few units in the last place, not one.
    """
    allowed = {name: value * factor for name, value in TOLERANCE[dtype].items()}
    if device == "cuda" and dtype == torch.float32:
        allowed["rtol"] *= 5
    return allowed


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills every `torch.empty` with NaN (integers: the largest): unwritten elements show."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _spread(tensor: Tensor) -> Tensor:
    """The same values with other strides: every second element of a larger block."""
    block = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    block[..., ::2] = tensor
    return block[..., ::2]


# Frames, patch and stride: divided or not, overlapping, with gaps, one pixel, the whole frame.
GRIDS = [
    ((24, 36), (8, 12), (8, 12)),
    ((23, 37), (8, 9), (5, 9)),
    ((17, 40), (5, 33), (7, 2)),
    ((9, 7), (9, 7), (1, 1)),
    ((6, 11), (1, 1), (2, 3)),
    ((33, 70), (16, 31), (16, 31)),
]

# Sizes of a sample: below and above a vector, odd, the paper's, above the runs that kernels sum.
SIZES = [1, 3, 16, 129, 784, 4097, 70001]


def sample_inputs(op: str, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """Argument tuples for the raw op `op` on the CPU: dtypes, odd shapes, strides, empty."""
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if op in ("tile_patches", "active_patches"):
        for number, (size, patch, stride) in enumerate(GRIDS):
            for dtype in floating:
                cover = bool(number % 2)
                if op == "active_patches":
                    frames = _random((3, *size), torch.uint8, generator)
                    background = _random(size, torch.uint8, generator)
                    for threshold in (0.0, 85.0, 255.0):
                        rest = (patch, stride, cover, dtype, 1 / 255, 0.25, threshold)
                        yield (frames, background, *rest)
                        yield (_spread(frames), background, *rest)
                        yield (frames[:0], background, *rest)
                    continue
                for source in (torch.uint8, *floating):
                    frames = _random((2, 3, *size), source, generator)
                    options = (patch, stride, not cover, dtype, 0.5, -1.0)
                    yield (frames, *options)
                    yield (frames[:, :1].transpose(0, 1), *options)
                    yield (frames.to(memory_format=torch.channels_last), *options)
                    yield (_spread(frames), *options)
                    yield (frames[:0], *options)
    elif op == "fold_scores":
        for size, patch, stride in GRIDS:
            for cover in (False, True):
                count = 1
                for length, part, step in zip(size, patch, stride, strict=True):
                    count *= (length - part + (step - 1 if cover else 0)) // step + 1
                for dtype in floating:
                    scores = _random((3, count), dtype, generator)
                    for maximum in (False, True):
                        yield (scores, size, patch, stride, cover, maximum)
                        yield (_spread(scores), size, patch, stride, cover, maximum)
                        yield (scores[:0], size, patch, stride, cover, maximum)
    elif op == "perturb_latent":
        for length in SIZES:
            for dtype in floating:
                latent = _random((5, length), dtype, generator)
                perturbation = _random((5, length), dtype, generator)
                yield (latent, perturbation, 0.7)
                yield (_spread(latent), perturbation.T.contiguous().T, -1.5)
                yield (latent[:0], perturbation[:0], 1.0)
    else:
        passes = 2 if op.startswith("paired") else 1
        for length in SIZES:
            for dtype, other in (
                *((dtype, dtype) for dtype in floating),
                (torch.bfloat16, torch.float32),
                (torch.float32, torch.float16),
            ):
                values = _random((passes * 3, length), dtype, generator)
                target = _random((3, length), other, generator)
                yield (values, target)
                yield (_spread(values), target)
                yield (values[:0], target[:0])
        values = _random((passes * 2, 3, 5, 7), torch.float32, generator)
        target = _random((2, 3, 5, 7), torch.float32, generator)
        last = values.contiguous(memory_format=torch.channels_last)
        yield (last, target.contiguous(memory_format=torch.channels_last))
        yield (last, target)
        yield (values[:, :1].expand(-1, 3, -1, -1), target)


def realistic_inputs(op: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments of the sizes that the raw op `op` is for: 240x360 frames in 30x30 patches, 28x28
    images."""
    grid = ((30, 30), (20, 20), True)
    if op == "tile_patches":
        frames = torch.randn(16, 1, 240, 360, generator=generator)
        return (frames, *grid, torch.bfloat16, 1 / 255, 0.0)
    if op == "fold_scores":
        return (torch.rand(64, 12 * 18, generator=generator), (240, 360), *grid, True)
    if op == "perturb_latent":
        return (*(torch.randn(4096, 128, generator=generator) for _ in range(2)), 0.5)
    if op == "active_patches":
        frames = _random((16, 240, 360), torch.uint8, generator)
        return (frames, frames[0].clone(), *grid, torch.float32, 1 / 255, 0.0, 85.0)
    count = 4096 if op.startswith("paired") else 2048
    target = torch.rand(2048, 1, 28, 28, generator=generator)
    return torch.randn(count, 1, 28, 28, generator=generator), target


def to_device(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The arguments on `device` ("cpu" or "cuda") with the strides that they have."""

    def moved(tensor: Tensor) -> Tensor:
        memory = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
        return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return tuple(
        moved(value) if isinstance(value, Tensor) and value.device.type != device else value
        for value in arguments
    )
