"""The four mean squared errors and their gradient, with the sigmoid applied in the kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastalps.kernels.launch import (
    CHUNK,
    float_pair,
    grid_of,
    mean_of_partials,
    program_number,
    single,
    tile_of,
)
from torch import Tensor
from torch.library import wrap_triton


@triton.jit
def squared_error_kernel(
    values,
    target,
    errors,
    count,
    size,
    splits,
    steps,
    values_row,
    target_row,
    PASSES: tl.constexpr,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FINAL: tl.constexpr,
):
    program = program_number()
    rows = (program // splits) * ROWS + tl.arange(0, ROWS)
    start = (program % splits) * CHUNK
    first = tl.zeros((ROWS, BLOCK), tl.float64 if DOUBLE else tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float64 if DOUBLE else tl.float32)
    for step in range(steps):
        columns = start + step * BLOCK + tl.arange(0, BLOCK)
        mask = (rows < count)[:, None] & (columns < size)[None, :]
        goal = tl.load(
            target + rows[:, None] * target_row + columns[None, :], mask=mask, other=0.0
        ).to(first.dtype)
        # Both passes against one read of the target.
        source = values + rows[:, None] * values_row + columns[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(first.dtype)
        if SIGMOID:
            value = tl.sigmoid(value)
        difference = tl.where(mask, value - goal, 0.0)
        first += difference * difference
        if PASSES == 2:
            source += tl.cast(count, tl.int64) * values_row
            value = tl.load(source, mask=mask, other=0.0).to(first.dtype)
            if SIGMOID:
                value = tl.sigmoid(value)
            difference = tl.where(mask, value - goal, 0.0)
            second += difference * difference
    place = errors + rows * splits + program % splits
    result = tl.sum(first, axis=1)
    if FINAL:
        result = (result / size).to(tl.float32)
    tl.store(place, result, mask=rows < count)
    if PASSES == 2:
        result = tl.sum(second, axis=1)
        if FINAL:
            result = (result / size).to(tl.float32)
        tl.store(place + tl.cast(count, tl.int64) * splits, result, mask=rows < count)


def _is_dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a sample fills its memory, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _flat(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The tensors with samples that can be read flat in one order: a sum needs no other order.

    Copies nothing when both samples are dense in the same order (both contiguous, both
    channels_last), whatever lies between samples.
    """
    sizes = target.shape[1:]
    first, second = values.stride()[1:], target.stride()[1:]
    same = all(a == b or size == 1 for a, b, size in zip(first, second, sizes, strict=True))
    if same and _is_dense(sizes, first):
        return values, target
    return values.contiguous(), target.contiguous()


def _squared_error(values: Tensor, target: Tensor, passes: int, sigmoid: bool) -> Tensor:
    """(S * N, ...), (N, ...) -> (S * N,) float32."""
    n, size = target.shape[0], math.prod(target.shape[1:])
    if n == 0 or size == 0:  # The mean of nothing is NaN.
        shape = (passes * n,)
        return torch.full(shape, float("nan"), dtype=torch.float32, device=target.device)
    values, target = _flat(values, target)
    double = values.dtype == torch.float64
    splits = triton.cdiv(size, CHUNK)
    dtype = torch.float64 if double and splits > 1 else torch.float32
    errors = torch.empty((passes * n, splits), dtype=dtype, device=target.device)
    rows, block = tile_of(size)
    wrap_triton(squared_error_kernel)[grid_of(triton.cdiv(n, rows) * splits)](
        values,
        target,
        errors,
        n,
        size,
        splits,
        triton.cdiv(min(size, CHUNK), block),
        values.stride(0),
        target.stride(0),
        PASSES=passes,
        SIGMOID=sigmoid,
        DOUBLE=double,
        ROWS=rows,
        BLOCK=block,
        CHUNK=CHUNK,
        FINAL=splits == 1,
    )
    return errors.reshape(passes * n) if splits == 1 else mean_of_partials(errors, size)


def per_sample_mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """(N, ...) twice -> (N,) float32."""
    return _squared_error(reconstruction, target, 1, False)


def paired_mse(reconstructions: Tensor, target: Tensor) -> Tensor:
    """(2N, ...), (N, ...) -> (2, N) float32."""
    return _squared_error(reconstructions, target, 2, False).reshape(2, target.shape[0])


def sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """(N, ...) twice -> (N,) float32, of ``sigmoid(logits)``."""
    return _squared_error(logits, target, 1, True)


def paired_sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """(2N, ...), (N, ...) -> (2, N) float32, of ``sigmoid(logits)``."""
    return _squared_error(logits, target, 2, True).reshape(2, target.shape[0])


@triton.jit
def squared_error_backward_kernel(
    grad,
    values,
    target,
    result,
    factor,
    factor_low,
    count,
    samples,
    size,
    blocks,
    values_row,
    target_row,
    SIGMOID: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = program_number()
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)
    columns = ((program % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < count)[:, None] & (columns < size)
    weight = tl.load(grad + rows, mask=rows < count, other=0.0)
    weight = weight.to(tl.float64 if DOUBLE else tl.float32)
    weight = weight * factor + weight * factor_low if DOUBLE else weight * single(factor)
    value = tl.load(values + rows[:, None] * values_row + columns, mask=mask, other=0.0)
    value = value.to(weight.dtype)
    goal = tl.load(target + (rows % samples)[:, None] * target_row + columns, mask=mask, other=0.0)
    if SIGMOID:
        value = tl.sigmoid(value)
        slope = weight[:, None] * (value - goal.to(weight.dtype)) * (value * (1 - value))
    else:
        slope = weight[:, None] * (value - goal.to(weight.dtype))
    place = result + rows[:, None] * size + columns
    tl.store(place, slope.to(result.dtype.element_ty), mask=mask)


def squared_error_backward(
    grad: Tensor, reconstructions: Tensor, target: Tensor, sigmoid: bool
) -> Tensor:
    """Gradient of the reconstructions (or logits), contiguous; `grad` is (S * N,)."""
    count, samples = reconstructions.shape[0], target.shape[0]
    size = math.prod(target.shape[1:])
    values, target = _flat(reconstructions, target)
    # Written in the order that is read, then made contiguous: at most one copy instead of two.
    result = torch.empty_strided(
        values.shape, (size, *values.stride()[1:]), dtype=values.dtype, device=values.device
    )
    if count == 0 or size == 0:
        return result.contiguous()
    rows, block = tile_of(size)
    blocks = triton.cdiv(size, block)
    wrap_triton(squared_error_backward_kernel)[grid_of(triton.cdiv(count, rows) * blocks)](
        grad.contiguous(),
        values,
        target,
        result,
        *float_pair(2 / int(size)),
        count,
        samples,
        size,
        blocks,
        values.stride(0),
        target.stride(0),
        SIGMOID=sigmoid,
        DOUBLE=values.dtype == torch.float64,
        ROWS=rows,
        BLOCK=block,
    )
    return result.contiguous()
