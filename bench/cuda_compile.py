"""The CUDA library built without a GPU, and what ptxas and the shapes say of each kernel."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from bench.compiled import Row
from fastalps.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


class CannotCompile(UserError):
    """A tool is absent here, or cannot read a file; the text says which in one line."""


class Use(NamedTuple):
    """What ptxas says of one compiled kernel; bytes but for `registers` of a thread."""

    kernel: str
    symbol: str
    architecture: str
    stack: int
    spills: int
    registers: int
    shared: int  # Dynamic shared memory is asked for by the launch, and not counted here.

    @property
    def variant(self) -> str:
        """Kernels of doubles may use twice the registers."""
        return "float64" if "_kernelId" in self.symbol else ""


def build_module() -> ModuleType:
    """setup.py as a module: its functions, without running it."""
    if importlib.util.find_spec("setuptools") is None:
        raise CannotCompile("the package setuptools is not installed")
    spec = importlib.util.spec_from_file_location("fastalps_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _building_here() -> Iterator[None]:
    """setup.py names its sources from the repository's root, and takes architectures from the
    environment."""
    folder, chosen = Path.cwd(), os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.chdir(ROOT)
    os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0"
    try:
        yield
    finally:
        os.chdir(folder)
        if chosen is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = chosen


def build_library(folder: Path) -> Path:
    """Builds every kernel for every architecture into `folder`; the build's log is beside it.

    Raises:
        CannotCompile: nvcc, ninja, torch or setuptools is absent.
    """
    build = build_module()
    if build.nvcc() is None:
        raise CannotCompile("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    build.BUILD = folder
    with _building_here():
        try:
            return build.build_cuda(report=True)
        except build.BuildFailure as failure:
            if "ninja was not found" in str(failure) or "torch is not installed" in str(failure):
                raise CannotCompile(str(failure)) from None
            raise


REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>sm_\d+)a?'.*?"
    r"Function properties for (?P=symbol)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernel_name(symbol: str) -> str:
    """The kernel's name in a mangled symbol, which holds each part behind that part's length."""
    name = re.search(r"\d+([a-z_]+_kernel)", symbol)
    return name[1] if name else symbol


def uses(log: str) -> list[Use]:
    """Every report of a kernel in the build's log."""
    found = []
    for match in REPORT.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Use(
                kernel_name(match["symbol"]),
                match["symbol"],
                match["architecture"],
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["registers"]),
                int(shared[1]) if shared else 0,
            )
        )
    return found


def declared_kernels() -> set[str]:
    """The kernels that the sources define."""
    return {
        name
        for source in (ROOT / "csrc/cuda").glob("*.cu")
        for name in re.findall(r"(\w+_kernel)\(", source.read_text(encoding="utf-8"))
    }


SHARED_PROGRAM = """
#include <algorithm>
#include <cstdio>
#include "fused_shapes.h"
int main() {
  int most[8] = {};
  for (int64_t shape = 0; fastalps::cuda::fused::with_shape(shape, [&](auto named) {
         using S = decltype(named);
         const int bytes[] = {S::Encode::kSharedBytes, S::Latent::kSharedBytes,
                              S::Dense::kSharedBytes, S::Expand::kSharedBytes,
                              S::Decode::kSharedBytes,
                              S::template LatentOf<2>::kSharedBytes,
                              S::template DenseOf<4>::kSharedBytes,
                              S::template ExpandOf<2>::kSharedBytes};
         for (int i = 0; i < 8; ++i) most[i] = std::max(most[i], bytes[i]);
       });
       ++shape) {
  }
  for (int bytes : most) std::printf("%d ", bytes);
}
"""


def fused_shared(folder: Path) -> dict[tuple[str, str], int]:
    """Dynamic shared memory of the fused kernels (name, architecture), the most of all shapes, from
    their own header. Two tiles a block have no room on 8.0 and are not launched there."""
    source, program = folder / "shared.cpp", folder / "shared"
    source.write_text(SHARED_PROGRAM, encoding="utf-8")
    include = f"-I{ROOT / 'csrc/cuda'}"
    command = [build_module().cxx(), "-std=c++20", include, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    *narrow, latent, dense, expand = map(int, said.split())
    found = {}
    for architecture in ARCHITECTURES:
        wide = [narrow[0], latent, dense, expand, narrow[4]]
        most = [*narrow[:2], dense, *narrow[3:]] if architecture == "sm_80" else wide
        names = ("encode", "latent", "dense", "expand", "decode")
        for name, shared in zip(names, most, strict=True):
            found[f"fused_{name}_kernel", architecture] = shared
    return found


def cuda_rows(log: str, folder: Path) -> list[Row]:
    """The build's log as lines of the report; `folder` is for files that are made on the way."""
    dynamic = fused_shared(folder)
    groups: dict[tuple[str, str, str], list[Use]] = {}
    for use in uses(log):
        groups.setdefault((use.kernel, use.architecture, use.variant), []).append(use)
    return [
        Row(
            "cuda",
            *key,
            len(group),
            max(use.registers for use in group),
            max(use.spills for use in group),
            max(use.stack for use in group),
            max(use.shared for use in group) + dynamic.get(key[:2], 0),
        )
        for key, group in sorted(groups.items())
    ]


# Opcodes of the disassembly, by what they are for.
MIX = {
    "HMMA": "tensor-core products",
    "HGMMA": "products of groups of warps",
    "LDSM": "ldmatrix",
    "STSM": "stmatrix",
    "LDS": "loads of shared memory",
    "STS": "stores to it",
    "LDG": "loads of global memory",
    "STG": "stores to it",
    "BAR": "barriers",
    "SHFL": "shuffles",
    "MUFU": "special functions",
    "LDL": "loads of spilled registers",
    "STL": "stores of them",
}


def _cuobjdump() -> Path:
    """The toolkit's, or the one that the package triton brings."""
    compiler, triton = build_module().nvcc(), importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", "")]
    folders += [str(Path(compiler).parent)] if compiler else []
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    tool = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if tool is None:
        raise CannotCompile("cuobjdump was not found (the CUDA toolkit and triton bring it)")
    return Path(tool)


def disassembly(library: Path) -> dict[tuple[str, str], list[str]]:
    """The code of each kernel: (symbol, architecture) -> lines of `cuobjdump -sass`.

    Args:
        library: or an object file, with the code of one or several architectures.

    Raises:
        CannotCompile: cuobjdump is absent, or finds no code in the file.
    """
    tool = _cuobjdump()
    # It calls nvdisasm, which lies beside it.
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(tool), "-sass", str(library)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment)
    if said.returncode != 0:
        why = " ".join((said.stderr or said.stdout).split())
        raise CannotCompile(f"{library}: expected compiled CUDA code, and cuobjdump said: {why}")
    found: dict[tuple[str, str], list[str]] = {}
    architecture, lines = "", []
    for line in said.stdout.splitlines():
        if match := re.match(r"\s*(?:arch = |code for )(sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            lines = found.setdefault((match[1], architecture), [])
        else:
            lines.append(line)
    return found


def instruction_mix(library: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Instructions in the code of each kernel: (symbol, architecture) -> opcode -> number.

    Counted as they stand, not as they run; "all" is their sum, without padding. See `disassembly`.
    """
    found: dict[tuple[str, str], dict[str, int]] = {}
    for key, lines in disassembly(library).items():
        counts = found.setdefault(key, {"all": 0})
        for line in lines:
            match = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line)
            if match is None or match[1] == "NOP":
                continue
            counts["all"] += 1
            if match[1] in MIX:
                counts[match[1]] = counts.get(match[1], 0) + 1
    return found
