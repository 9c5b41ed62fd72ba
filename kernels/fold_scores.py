"""`fold_scores` and its gradient: each pixel gathers its patches, each patch its pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastalps.kernels.launch import (
    GATHERED,
    Axis,
    axes,
    block_of,
    block_offsets,
    covering,
    grid_of,
    is_wide,
    program_number,
    tile_of,
)
from torch import Tensor
from torch.library import wrap_triton


@triton.jit
def fold_scores_kernel(
    scores,
    folded,
    frames,
    pixels,
    blocks,
    width,
    rows,
    columns,
    last_row,
    last_column,
    reach_h,
    reach_w,
    frame_stride,
    patch_stride,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    MAXIMUM: tl.constexpr,
    OWNER: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = program_number()
    frame = program // blocks
    offset = block_offsets(program % blocks, BLOCK, WIDE)
    mask = offset < tl.where(frame < frames, pixels, 0)
    y = offset // width
    x = offset - y * width
    first_y, count_y = covering(y, PATCH_H, STRIDE_H, rows, last_row)
    first_x, count_x = covering(x, PATCH_W, STRIDE_W, columns, last_column)
    # NaN is larger than everything: `value > best` is false once `best` is NaN.
    result = tl.full(
        (BLOCK,), float("-inf") if MAXIMUM else 0.0, tl.float64 if DOUBLE else tl.float32
    )
    owner = tl.full((BLOCK,), -1, tl.int64)
    for a in range(reach_h):
        for b in range(reach_w):
            valid = mask & (a < count_y) & (b < count_x)
            patch = ((first_y + a) * columns + first_x + b).to(tl.int64)
            source = scores + frame * frame_stride + patch * patch_stride
            value = tl.load(source, mask=valid, other=0.0).to(result.dtype)
            if MAXIMUM:
                first = (owner < 0) & (result == result)
                take = valid & ((value > result) | (value != value) | first)
                result = tl.where(take, value, result)
                owner = tl.where(take, tl.where(value == value, patch, -1), owner)
            else:
                result += value
    covered = (count_y > 0) & (count_x > 0)
    target = folded + frame * pixels + offset
    if OWNER:
        tl.store(target, owner, mask=mask)
    else:
        if not MAXIMUM:
            result = result / tl.where(covered, count_y * count_x, 1)
        tl.store(target, tl.where(covered, result, 0.0).to(tl.float32), mask=mask)


def _fold(
    scores: Tensor, rows: Axis, columns: Axis, maximum: bool, owner: bool, double: bool
) -> Tensor:
    """(N, P) -> (N, H, W): the heatmap, or the int64 number of the patch that has the maximum (-1
    where no patch or where it is NaN)."""
    n, pixels = scores.shape[0], rows.size * columns.size
    dtype = torch.int64 if owner else torch.float32
    folded = torch.empty((n, rows.size, columns.size), dtype=dtype, device=scores.device)
    if n == 0:
        return folded
    block, warps = block_of(pixels, GATHERED)
    blocks = triton.cdiv(pixels, block)
    wrap_triton(fold_scores_kernel)[grid_of(n * blocks)](
        scores,
        folded,
        n,
        pixels,
        blocks,
        columns.size,
        rows.count,
        columns.count,
        rows.last,
        columns.last,
        rows.reach,
        columns.reach,
        *scores.stride(),
        PATCH_H=rows.patch,
        PATCH_W=columns.patch,
        STRIDE_H=rows.stride,
        STRIDE_W=columns.stride,
        MAXIMUM=maximum,
        OWNER=owner,
        DOUBLE=double,
        BLOCK=block,
        WIDE=is_wide(pixels),
        num_warps=warps,
    )
    return folded


def fold_scores(
    scores: Tensor,
    frame_size: Sequence[int],
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    maximum: bool,
) -> Tensor:
    """(N, P), any strides -> (N, H, W) float32."""
    rows, columns = axes(frame_size, patch_size, stride, cover)
    return _fold(scores, rows, columns, maximum, False, scores.dtype == torch.float64)


@triton.jit
def fold_scores_backward_kernel(
    grad,
    owners,
    scores_grad,
    count,
    height,
    width,
    steps,
    rows,
    columns,
    last_row,
    last_column,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    MAXIMUM: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = program_number() * ROWS + tl.arange(0, ROWS)
    frame = number // (rows * columns)
    patch = number - frame * (rows * columns)
    # Within a frame 32 bits hold rows and columns of patches and pixels.
    r = (patch // columns).to(tl.int32)
    origin_y = tl.minimum(r * STRIDE_H, last_row)[:, None]
    origin_x = tl.minimum((patch - r * columns).to(tl.int32) * STRIDE_W, last_column)[:, None]
    base = (frame * height * width)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float64 if DOUBLE else tl.float32)
    for step in range(steps):
        within = (step * BLOCK + tl.arange(0, BLOCK))[None, :]
        y = origin_y + within // PATCH_W
        x = origin_x + within % PATCH_W
        valid = (number < count)[:, None] & (within < PATCH_H * PATCH_W)
        pixel = base + y.to(tl.int64) * width + x
        value = tl.load(grad + pixel, mask=valid, other=0.0).to(total.dtype)
        if MAXIMUM:
            owner = tl.load(owners + pixel, mask=valid, other=-1)
            total += tl.where(owner == patch[:, None], value, 0.0)
        else:
            _, count_y = covering(y, PATCH_H, STRIDE_H, rows, last_row)
            _, count_x = covering(x, PATCH_W, STRIDE_W, columns, last_column)
            # Masked lanes lie outside the frame, where nothing covers them.
            total += value / tl.where(valid, count_y * count_x, 1)
    result = tl.sum(total, axis=1)
    tl.store(scores_grad + number, result.to(scores_grad.dtype.element_ty), mask=number < count)


def fold_scores_backward(
    grad: Tensor,
    scores: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    maximum: bool,
) -> Tensor:
    """Gradient of the scores, (N, P); of a tied maximum, the first patch has it all."""
    rows, columns = axes(grad.shape[1:], patch_size, stride, cover)
    result = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    count = scores.shape[0] * rows.count * columns.count
    if count == 0:
        return result
    grad = grad.contiguous()
    # Ties are those of the float32 heatmap, also for float64 scores.
    owners = _fold(scores, rows, columns, True, True, False) if maximum else grad
    tile_rows, block = tile_of(rows.patch * columns.patch)
    wrap_triton(fold_scores_backward_kernel)[grid_of(triton.cdiv(count, tile_rows))](
        grad,
        owners,
        result,
        count,
        rows.size,
        columns.size,
        triton.cdiv(rows.patch * columns.patch, block),
        rows.count,
        columns.count,
        rows.last,
        columns.last,
        PATCH_H=rows.patch,
        PATCH_W=columns.patch,
        STRIDE_H=rows.stride,
        STRIDE_W=columns.stride,
        MAXIMUM=maximum,
        DOUBLE=scores.dtype == torch.float64,
        ROWS=tile_rows,
        BLOCK=block,
    )
    return result
