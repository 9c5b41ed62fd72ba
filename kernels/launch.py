"""What every Triton kernel of this folder shares: grids, tiles, patch geometry, the final mean."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# Elements of a program's tile: with Triton's 4 warps 8 a thread, so that 16-bit inputs are read in
# whole 16-byte loads, and few enough that two float64 accumulators stay in registers.
TILE = 1024
# Elements of one sample that one program sums. A larger sample is split, at fixed places, so that a
# small batch of large samples still fills a GPU and a result depends on neither batch nor device.
CHUNK = 8 * TILE
# Elements a thread of kernels in which a pixel gathers its patches: they hold so many addresses
# that 8 take 92 to 158 registers, and spill; 2 take 31 to 50 (ptxas, sm_80 and sm_100, float32).
GATHERED = 2
# CUDA's limit on the x dimension of a grid is 2^31 - 1; the rest goes to y.
GRID_X = 2**30


@dataclass(frozen=True)
class Axis:
    """The patches along one axis: `count` of them, the last one's origin at `last`; `reach` is the
    most patches that can cover one pixel."""

    size: int
    patch: int
    stride: int
    count: int
    last: int
    reach: int


def axes(
    frame_size: Sequence[int], patch_size: Sequence[int], stride: Sequence[int], cover: bool
) -> tuple[Axis, Axis]:
    """The patch grid's two axes. Patches and strides are plain ints, as kernels specialise on them:
    divisions by them are then multiplications."""

    def axis(size: int, patch: int, step: int) -> Axis:
        # A stride beyond the frame cuts the same patches, and cannot overflow 32 bits.
        patch, step = int(patch), int(min(step, size))
        count = (size - patch + (step - 1 if cover else 0)) // step + 1
        last = min((count - 1) * step, size - patch)
        reach = min(count, -(-patch // step) + 1)
        return Axis(size, patch, step, count, last, reach)

    rows, columns = (axis(*each) for each in zip(frame_size, patch_size, stride, strict=True))
    return rows, columns


def grid_of(programs: int) -> tuple[int, ...]:
    """A launch grid of at least `programs` programs; `program_number` counts through it."""
    if programs <= GRID_X:
        return (programs,)
    return GRID_X, triton.cdiv(programs, GRID_X)


def tile_of(size: int) -> tuple[int, int]:
    """(rows, columns) of a tile over rows of `size` elements: short rows share a program."""
    columns = 16
    while columns < size and columns < TILE:
        columns *= 2
    return TILE // columns, columns


def block_of(size: int, each: int = 8) -> tuple[int, int]:
    """(block, warps) of a flat block over `size` elements, `each` elements a thread."""
    block = 32
    while block < size and block < 128 * each:
        block *= 2
    return block, max(1, block // (32 * each))


def is_wide(size: int) -> bool:
    """Whether offsets up to `size` (and one tile more) overflow 32 bits."""
    return size > 2**31 - 1 - TILE


def float_pair(value: float) -> tuple[float, float]:
    """(high, low) float32 parts: Triton passes floats as float32; float64 kernels add the two."""
    value = float(value)
    high = ctypes.c_float(value).value
    return (high, value - high) if math.isfinite(high) else (high, 0.0)


@triton.jit
def single(scalar):
    # Triton passes floats as float32, torch.compile as float64, in which all would be computed.
    return tl.cast(scalar, tl.float32)


@triton.jit
def program_number():
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def block_offsets(block, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    # 64-bit divisions cost several times 32-bit ones, so only huge planes pay for them.
    if WIDE:
        offsets = block * BLOCK + tl.arange(0, BLOCK)
    else:
        offsets = block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    return offsets


@triton.jit
def covering(position, patch: tl.constexpr, stride: tl.constexpr, count, last):
    """First patch over a position along one axis, and how many cover it (they are consecutive)."""
    first = (tl.maximum(position - (patch - 1), 0) + (stride - 1)) // stride
    final = tl.where(position >= last, count - 1, position // stride)
    return first, final - first + 1


@triton.jit
def mean_kernel(
    partials,
    means,
    count,
    splits,
    size,
    steps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    rows = program_number() * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float64 if DOUBLE else tl.float32)
    for step in range(steps):
        columns = step * BLOCK + tl.arange(0, BLOCK)
        mask = (rows < count)[:, None] & (columns < splits)[None, :]
        total += tl.load(partials + rows[:, None] * splits + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=1) / size
    tl.store(means + rows, result.to(tl.float32), mask=rows < count)


def mean_of_partials(partials: Tensor, size: int) -> Tensor:
    """(rows, splits) sums over parts of `size` elements a row -> (rows,) float32 means."""
    count, splits = partials.shape
    means = torch.empty((count,), dtype=torch.float32, device=partials.device)
    rows, block = tile_of(splits)
    wrap_triton(mean_kernel)[grid_of(triton.cdiv(count, rows))](
        partials,
        means,
        count,
        splits,
        size,
        triton.cdiv(splits, block),
        ROWS=rows,
        BLOCK=block,
        DOUBLE=partials.dtype == torch.float64,
    )
    return means
