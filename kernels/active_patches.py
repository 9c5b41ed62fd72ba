"""`active_patches`: which patches differ from the background, then only those are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastalps.kernels.launch import axes, float_pair, grid_of, program_number, single, tile_of
from torch import Tensor


@triton.jit
def patch_activity_kernel(
    frames,
    background,
    active,
    limit,
    count,
    steps,
    columns,
    patches,
    last_row,
    last_column,
    frame_stride,
    row_stride,
    column_stride,
    background_row,
    background_column,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = program_number() * ROWS + tl.arange(0, ROWS)
    frame = number // patches
    patch = number - frame * patches
    r = patch // columns
    origin_y = tl.minimum(r * STRIDE_H, last_row)[:, None]
    origin_x = tl.minimum((patch - r * columns) * STRIDE_W, last_column)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.int32)
    for step in range(steps):
        within = (step * BLOCK + tl.arange(0, BLOCK))[None, :]
        y = origin_y + within // PATCH_W
        x = origin_x + within % PATCH_W
        mask = (number < count)[:, None] & (within < PATCH_H * PATCH_W)
        source = frames + frame[:, None] * frame_stride + y * row_stride + x * column_stride
        pixel = tl.load(source, mask=mask, other=0).to(tl.int32)
        still = tl.load(
            background + y * background_row + x * background_column, mask=mask, other=0
        ).to(tl.int32)
        total += tl.abs(pixel - still)
    # One lane's share fits 32 bits; the sum over a patch of 8 megapixels or more does not.
    result = tl.sum(total.to(tl.int64), axis=1) > limit
    tl.store(active + number, result.to(tl.uint8), mask=number < count)


@triton.jit
def cut_active_kernel(
    frames,
    index,
    cut,
    scale,
    shift,
    count,
    blocks,
    columns,
    last_row,
    last_column,
    frame_stride,
    row_stride,
    column_stride,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = program_number()
    number = (program // blocks) * ROWS + tl.arange(0, ROWS)
    within = ((program % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    frame = tl.load(index + 2 * number, mask=number < count, other=0)
    patch = tl.load(index + 2 * number + 1, mask=number < count, other=0)
    r = patch // columns
    y = tl.minimum(r * STRIDE_H, last_row)[:, None] + within // PATCH_W
    x = tl.minimum((patch - r * columns) * STRIDE_W, last_column)[:, None] + within % PATCH_W
    mask = (number < count)[:, None] & (within < PATCH_H * PATCH_W)
    source = frames + frame[:, None] * frame_stride + y * row_stride + x * column_stride
    value = tl.load(source, mask=mask, other=0).to(tl.float32)
    value = value * single(scale) + single(shift)
    target = cut + number[:, None] * (PATCH_H * PATCH_W) + within
    tl.store(target, value.to(cut.dtype.element_ty), mask=mask)


def active_patches(
    frames: Tensor,
    background: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    dtype: torch.dtype,
    scale: float,
    shift: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """uint8 (N, H, W), (H, W) -> (K, 1, ph, pw) and (K, 2) int64."""
    rows, columns = axes(frames.shape[1:], patch_size, stride, cover)
    n, patches = frames.shape[0], rows.count * columns.count
    pixels = rows.patch * columns.patch
    geometry = {
        "PATCH_H": rows.patch,
        "PATCH_W": columns.patch,
        "STRIDE_H": rows.stride,
        "STRIDE_W": columns.stride,
    }
    tile_rows, block = tile_of(pixels)
    blocks = triton.cdiv(pixels, block)
    active = torch.empty((n, patches), dtype=torch.uint8, device=frames.device)
    if n > 0:
        patch_activity_kernel[grid_of(triton.cdiv(n * patches, tile_rows))](
            frames,
            background,
            active,
            math.floor(min(threshold * pixels, 2.0**62)),
            n * patches,
            blocks,
            columns.count,
            patches,
            rows.last,
            columns.last,
            *frames.stride(),
            *background.stride(),
            ROWS=tile_rows,
            BLOCK=block,
            **geometry,
        )
    # The one place where the host waits: the number of kept patches is a shape.
    index = active.nonzero().contiguous()
    kept = index.shape[0]
    cut = torch.empty((kept, 1, rows.patch, columns.patch), dtype=dtype, device=frames.device)
    if kept > 0:
        cut_active_kernel[grid_of(triton.cdiv(kept, tile_rows) * blocks)](
            frames,
            index,
            cut,
            float_pair(scale)[0],
            float_pair(shift)[0],
            kept,
            blocks,
            columns.count,
            rows.last,
            columns.last,
            *frames.stride(),
            ROWS=tile_rows,
            BLOCK=block,
            **geometry,
        )
    return cut, index
