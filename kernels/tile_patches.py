"""`tile_patches` and its gradient: patches are cut, converted and scaled in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastalps.kernels.launch import (
    GATHERED,
    axes,
    block_of,
    block_offsets,
    covering,
    float_pair,
    grid_of,
    is_wide,
    program_number,
    single,
)
from torch import Tensor
from torch.library import wrap_triton


@triton.jit
def tile_patches_kernel(
    frames,
    patches,
    scale,
    shift,
    scale_low,
    shift_low,
    groups,
    blocks,
    rows,
    columns,
    last_row,
    last_column,
    frame_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    # A group is one row of patches of one frame: contiguous in the output, and within it every
    # division is by a constant.
    program = program_number()
    group = program // blocks
    offset = block_offsets(program % blocks, BLOCK, WIDE)
    frame = group // rows
    mask = offset < tl.where(group < groups, columns * (CHANNELS * PATCH_H * PATCH_W), 0)

    column = offset // (CHANNELS * PATCH_H * PATCH_W)
    within = offset - column * (CHANNELS * PATCH_H * PATCH_W)
    channel = within // (PATCH_H * PATCH_W)
    within = within - channel * (PATCH_H * PATCH_W)
    i = within // PATCH_W
    y = tl.minimum((group % rows) * STRIDE_H, last_row) + i
    x = tl.minimum(column * STRIDE_W, last_column) + (within - i * PATCH_W)

    source = frames + frame * frame_stride + channel.to(tl.int64) * channel_stride
    source += y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride
    value = tl.load(source, mask=mask, other=0).to(tl.float64 if DOUBLE else tl.float32)
    if DOUBLE:
        value = value * scale + value * scale_low + shift + shift_low
    else:
        value = value * single(scale) + single(shift)
    if patches.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    target = patches + group * columns * (CHANNELS * PATCH_H * PATCH_W) + offset
    tl.store(target, value.to(patches.dtype.element_ty), mask=mask)


def tile_patches(
    frames: Tensor,
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    dtype: torch.dtype,
    scale: float,
    shift: float,
) -> Tensor:
    """(N, C, H, W), any strides -> (N, P, C, ph, pw)."""
    rows, columns = axes(frames.shape[2:], patch_size, stride, cover)
    n, channels = frames.shape[0], int(frames.shape[1])
    shape = (n, rows.count * columns.count, channels, rows.patch, columns.patch)
    patches = torch.empty(shape, dtype=dtype, device=frames.device)
    if n == 0 or channels == 0:
        return patches
    size = columns.count * channels * rows.patch * columns.patch
    block, warps = block_of(size)
    blocks = triton.cdiv(size, block)
    (scale, scale_low), (shift, shift_low) = float_pair(scale), float_pair(shift)
    wrap_triton(tile_patches_kernel)[grid_of(n * rows.count * blocks)](
        frames,
        patches,
        scale,
        shift,
        scale_low,
        shift_low,
        n * rows.count,
        blocks,
        rows.count,
        columns.count,
        rows.last,
        columns.last,
        *frames.stride(),
        CHANNELS=channels,
        PATCH_H=rows.patch,
        PATCH_W=columns.patch,
        STRIDE_H=rows.stride,
        STRIDE_W=columns.stride,
        DOUBLE=frames.dtype == torch.float64,
        BLOCK=block,
        WIDE=is_wide(size),
        num_warps=warps,
    )
    return patches


@triton.jit
def tile_patches_backward_kernel(
    grad,
    frames,
    scale,
    scale_low,
    planes,
    channels,
    pixels,
    blocks,
    width,
    rows,
    columns,
    last_row,
    last_column,
    reach_h,
    reach_w,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Each pixel gathers from the patches over it: no atomics, so runs repeat bit for bit.
    program = program_number()
    plane = program // blocks
    offset = block_offsets(program % blocks, BLOCK, WIDE)
    mask = offset < tl.where(plane < planes, pixels, 0)
    y = offset // width
    x = offset - y * width
    first_y, count_y = covering(y, PATCH_H, STRIDE_H, rows, last_row)
    first_x, count_x = covering(x, PATCH_W, STRIDE_W, columns, last_column)
    base = (plane // channels) * rows * columns * channels + plane % channels
    total = tl.zeros((BLOCK,), tl.float64 if DOUBLE else tl.float32)
    for a in range(reach_h):
        r = first_y + a
        i = y - tl.minimum(r * STRIDE_H, last_row)
        for b in range(reach_w):
            c = first_x + b
            j = x - tl.minimum(c * STRIDE_W, last_column)
            source = base + (r * columns + c).to(tl.int64) * channels
            source = source * (PATCH_H * PATCH_W) + i * PATCH_W + j
            valid = mask & (a < count_y) & (b < count_x)
            total += tl.load(grad + source, mask=valid, other=0.0).to(total.dtype)
    total = total * scale + total * scale_low if DOUBLE else total * single(scale)
    if frames.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    target = frames + plane * pixels + offset
    tl.store(target, total.to(frames.dtype.element_ty), mask=mask)


def tile_patches_backward(
    grad: Tensor,
    frame_size: Sequence[int],
    patch_size: Sequence[int],
    stride: Sequence[int],
    cover: bool,
    dtype: torch.dtype,
    scale: float,
) -> Tensor:
    """(N, P, C, ph, pw) -> (N, C, H, W): scale times the sum over the patches of each pixel."""
    rows, columns = axes(frame_size, patch_size, stride, cover)
    n, channels, pixels = grad.shape[0], grad.shape[2], rows.size * columns.size
    frames = torch.empty((n, channels, rows.size, columns.size), dtype=dtype, device=grad.device)
    if n == 0 or channels == 0:
        return frames
    block, warps = block_of(pixels, GATHERED)
    blocks = triton.cdiv(pixels, block)
    wrap_triton(tile_patches_backward_kernel)[grid_of(n * channels * blocks)](
        grad.contiguous(),
        frames,
        *float_pair(scale),
        n * channels,
        channels,
        pixels,
        blocks,
        columns.size,
        rows.count,
        columns.count,
        rows.last,
        columns.last,
        rows.reach,
        columns.reach,
        PATCH_H=rows.patch,
        PATCH_W=columns.patch,
        STRIDE_H=rows.stride,
        STRIDE_W=columns.stride,
        DOUBLE=torch.float64 in (grad.dtype, dtype),
        BLOCK=block,
        WIDE=is_wide(pixels),
        num_warps=warps,
    )
    return frames
