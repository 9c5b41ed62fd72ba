"""The fused CUDA kernels on the host: built from the same source, called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastalps import ops
from fastalps.fused.packing import PackedWeights, Sizes, shape_number, sizes
from fastalps.models import ALPS
from fastalps.passes import Passes
from tests import ROOT, host_compiler

KERNELS = ("encode", "latent", "dense", "expand", "decode")
# As launches that fill a device have them: more tiles a block.
WIDE = ("latent, wide", "dense, wide", "expand, wide")
BOUNDS = {"none": 0, "tanh": 1, "norm": 2}


class Problem(ctypes.Structure):
    """`Problem` of tests/emulation/fused.cpp."""

    _fields_ = (
        [("shape", ctypes.c_int64), ("pixels", ctypes.c_void_p)]
        + [
            (name, ctypes.c_int64)
            for name in ("bytes", "frame_stride", "row_stride", "column_stride")
        ]
        + [
            (name, ctypes.c_int64)
            for name in ("patches_per_frame", "columns", "stride_height", "stride_width")
        ]
        + [(name, ctypes.c_int64) for name in ("last_row", "last_column", "total")]
        + [("index", ctypes.c_void_p), ("count", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("begin", "size", "networks", "passes")]
        + [(name, ctypes.c_int64) for name in ("first_perturbed", "bound")]
        + [("slope", ctypes.c_double), ("strength", ctypes.c_double), ("smoothing", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("weights", "biases", "maps", "patches")]
        + [(name, ctypes.c_void_p) for name in ("latents", "errors")]
        + [(name, ctypes.c_int64) for name in ("kernel", "blocks", "descending", "architecture")]
    )


class Counts(NamedTuple):
    """What one kernel executed: instructions, and cycles of shared memory."""

    multiplies: int
    loads: int
    load_cycles: int
    stores: int
    store_cycles: int


def build(
    folder: Path,
    include: Path | None = None,
    shape: int | None = None,
    widths: Sequence[int] | None = None,
) -> ctypes.CDLL | str:
    """The kernels as a host library, or why it cannot be built.

    Args:
        folder: where the library is put.
        include: a folder searched for the kernels' headers before csrc/cuda.
        shape: the only one to build; None = all.
        widths: of a network to build in their place, at number 0; see `fused_build.arguments`.
    """
    if (reason := host_compiler.unavailable()) is not None:
        return reason
    library = folder / "fused_emulation.so"
    folders = [*([include] if include else []), ROOT / "csrc/cuda", ROOT / "tests/emulation"]
    command = [
        str(host_compiler.compiler()),
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    command += [] if shape is None else [f"-DFASTALPS_ONLY_SHAPE={shape}"]
    command += [] if widths is None else [f"-DFASTALPS_FUSED_SHAPE={','.join(map(str, widths))}"]
    command += [host_compiler.FIBERS, *(f"-I{each}" for each in folders)]
    subprocess.run(
        [*command, str(ROOT / "tests/emulation/fused.cpp"), "-o", str(library)], check=True
    )
    loaded = ctypes.CDLL(str(library))
    loaded.fused_emulate.restype = ctypes.c_char_p
    return loaded


class Emulation:
    """The five kernels over the patches of some frames, with their scratch memory at hand."""

    def __init__(
        self,
        library: ctypes.CDLL,
        model: ALPS,
        packed: PackedWeights,
        frames: Tensor,
        stride: tuple[int, int],
        passes: Passes = "both",
        *,
        edge: str = "cover",
        index: Tensor | None = None,
        chunk: int | None = None,
        blocks: int = 1,
        descending: bool = False,
        architecture: int = 90,
    ) -> None:
        config = model.config
        self.library = library
        self.frames, self.packed, self.index = frames, packed, index
        rows, columns = ops.patch_grid(frames.shape[1:], config.image_size, stride, edge)
        self.total = frames.shape[0] * len(rows) * len(columns)
        self.count = torch.tensor([self.total if index is None else len(index)])
        self.passes = 2 if passes == "both" else 1
        self.networks = 1 if passes == "normal" else 2
        self.chunk = self.total if chunk is None else chunk
        self.sizes: Sizes = sizes(config)
        # Other widths than the presets' have a library of their own.
        shape = shape_number(config) or 0
        # Poisoned: what a kernel leaves out shows as NaN.
        self.maps = torch.full((self.chunk, self.sizes.maps), torch.nan, dtype=torch.bfloat16)
        self.patches = torch.full((self.chunk, 2), -1, dtype=torch.int64)
        self.latents = torch.full(
            (self.chunk, self.networks, self.sizes.latent), torch.nan, dtype=torch.float32
        )
        self.errors = torch.full((self.passes, self.total), torch.nan)
        self.problem = Problem(
            shape=shape,
            pixels=frames.data_ptr(),
            bytes=frames.dtype == torch.uint8,
            frame_stride=frames.stride(0),
            row_stride=frames.stride(1),
            column_stride=frames.stride(2),
            patches_per_frame=len(rows) * len(columns),
            columns=len(columns),
            stride_height=stride[0],
            stride_width=stride[1],
            last_row=frames.shape[1] - config.image_size[0],
            last_column=frames.shape[2] - config.image_size[1],
            total=self.total,
            index=None if index is None else index.data_ptr(),
            count=None if index is None else self.count.data_ptr(),
            size=self.chunk,
            networks=self.networks,
            passes=self.passes,
            first_perturbed=passes == "perturbed",
            bound=BOUNDS[config.bound],
            slope=config.negative_slope,
            strength=config.strength,
            smoothing=config.smoothing,
            weights=packed.weights.data_ptr(),
            biases=packed.biases.data_ptr(),
            maps=self.maps.data_ptr(),
            patches=self.patches.data_ptr(),
            latents=self.latents.data_ptr(),
            errors=self.errors.data_ptr(),
            blocks=blocks,
            descending=descending,
            architecture=architecture,
        )

    def run(self, kernel: str) -> Counts:
        """Runs one kernel; raises RuntimeError with what it did wrong."""
        self.problem.kernel = (*KERNELS, *WIDE).index(kernel)
        said = self.library.fused_emulate(ctypes.byref(self.problem)).decode()
        if said:
            raise RuntimeError(f"{kernel}: {said}")
        found = (ctypes.c_int64 * 5)()
        self.library.fused_counts(found)
        return Counts(*found)

    def run_all(self, wide: bool = False) -> Tensor:
        """Every kernel over every chunk: errors (passes, total)."""
        middle = WIDE if wide else KERNELS[1:4]
        for begin in range(0, self.total, self.chunk):
            self.problem.begin = begin
            for kernel in (KERNELS[0], *middle, KERNELS[4]):
                self.run(kernel)
        return self.errors
