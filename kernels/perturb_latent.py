"""`perturb_latent` and its gradient: the sum and the perturbation's energy from one read."""

from __future__ import annotations

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
def perturb_latent_kernel(
    latent,
    perturbation,
    output,
    energy,
    strength,
    strength_low,
    count,
    size,
    splits,
    steps,
    latent_row,
    latent_column,
    perturbation_row,
    perturbation_column,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DOUBLE: tl.constexpr,
    FINAL: tl.constexpr,
):
    program = program_number()
    rows = (program // splits) * ROWS + tl.arange(0, ROWS)
    start = (program % splits) * CHUNK
    total = tl.zeros((ROWS, BLOCK), tl.float64 if DOUBLE else tl.float32)
    for step in range(steps):
        columns = start + step * BLOCK + tl.arange(0, BLOCK)
        mask = (rows < count)[:, None] & (columns < size)[None, :]
        source = rows[:, None] * perturbation_row + columns[None, :] * perturbation_column
        scaled = tl.load(perturbation + source, mask=mask, other=0.0).to(total.dtype)
        scaled = scaled * strength + scaled * strength_low if DOUBLE else scaled * single(strength)
        source = rows[:, None] * latent_row + columns[None, :] * latent_column
        value = tl.load(latent + source, mask=mask, other=0.0).to(total.dtype) + scaled
        target = output + rows[:, None] * size + columns[None, :]
        tl.store(target, value.to(output.dtype.element_ty), mask=mask)
        # An infinite strength times a masked zero would be NaN.
        scaled = tl.where(mask, scaled, 0.0)
        total += scaled * scaled
    result = tl.sum(total, axis=1)
    if FINAL:
        result = (result / size).to(tl.float32)
    tl.store(energy + rows * splits + program % splits, result, mask=rows < count)


def perturb_latent(latent: Tensor, perturbation: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """(N, D) twice, any strides -> (N, D) contiguous and (N,) float32."""
    n, size = latent.shape
    output = torch.empty((n, size), dtype=latent.dtype, device=latent.device)
    if n == 0 or size == 0:  # The mean of nothing is NaN.
        return output, torch.full((n,), float("nan"), dtype=torch.float32, device=latent.device)
    double = latent.dtype == torch.float64
    splits = triton.cdiv(size, CHUNK)
    dtype = torch.float64 if double and splits > 1 else torch.float32
    energy = torch.empty((n, splits), dtype=dtype, device=latent.device)
    rows, block = tile_of(size)
    wrap_triton(perturb_latent_kernel)[grid_of(triton.cdiv(n, rows) * splits)](
        latent,
        perturbation,
        output,
        energy,
        *float_pair(strength),
        n,
        size,
        splits,
        triton.cdiv(min(size, CHUNK), block),
        *latent.stride(),
        *perturbation.stride(),
        ROWS=rows,
        BLOCK=block,
        CHUNK=CHUNK,
        DOUBLE=double,
        FINAL=splits == 1,
    )
    return output, energy.reshape(n) if splits == 1 else mean_of_partials(energy, size)


@triton.jit
def perturb_latent_backward_kernel(
    grad_output,
    grad_energy,
    perturbation,
    result,
    strength,
    strength_low,
    factor,
    factor_low,
    count,
    size,
    blocks,
    grad_row,
    grad_column,
    perturbation_row,
    perturbation_column,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    program = program_number()
    rows = (program // blocks) * ROWS + tl.arange(0, ROWS)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < count)[:, None] & (columns < size)[None, :]
    weight = tl.load(grad_energy + rows, mask=rows < count, other=0.0)
    source = rows[:, None] * grad_row + columns[None, :] * grad_column
    grad = tl.load(grad_output + source, mask=mask, other=0.0)
    source = rows[:, None] * perturbation_row + columns[None, :] * perturbation_column
    value = tl.load(perturbation + source, mask=mask, other=0.0)
    if DOUBLE:
        weight = weight.to(tl.float64)
        weight = weight * factor + weight * factor_low
        grad = grad.to(tl.float64)
        grad = grad * strength + grad * strength_low
        total = grad + weight[:, None] * value.to(tl.float64)
    else:
        weight = weight.to(tl.float32) * single(factor)
        total = grad.to(tl.float32) * single(strength) + weight[:, None] * value.to(tl.float32)
    target = result + rows[:, None] * size + columns[None, :]
    tl.store(target, total.to(result.dtype.element_ty), mask=mask)


def perturb_latent_backward(
    grad_output: Tensor, grad_energy: Tensor, perturbation: Tensor, strength: float
) -> Tensor:
    """Gradient of the perturbation, (N, D) contiguous."""
    n, size = perturbation.shape
    result = torch.empty((n, size), dtype=perturbation.dtype, device=perturbation.device)
    if n == 0 or size == 0:
        return result
    rows, block = tile_of(size)
    blocks = triton.cdiv(size, block)
    factor = float_pair(2 * strength * strength / int(size))
    wrap_triton(perturb_latent_backward_kernel)[grid_of(triton.cdiv(n, rows) * blocks)](
        grad_output,
        grad_energy.contiguous(),
        perturbation,
        result,
        *float_pair(strength),
        *factor,
        n,
        size,
        blocks,
        *grad_output.stride(),
        *perturbation.stride(),
        ROWS=rows,
        BLOCK=block,
        DOUBLE=perturbation.dtype == torch.float64,
    )
    return result
