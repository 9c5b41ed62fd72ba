"""The CUDA library built without a GPU: every kernel for every architecture, and the registration.

One build by setup.py's own functions, in a temporary folder. Run with -s for the table of
registers.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from fastalps import ops

ROOT = Path(__file__).parents[1]
BINDINGS = ROOT / "csrc" / "bindings_cuda.cpp"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# kernel -> the most registers of a thread, twice as many for float64. A multiprocessor has 65,536:
# up to 40, three quarters of its 2,048 threads are resident, up to 64 half of them, enough to hide
# the latency of the memory that these kernels wait for. None may spill or keep a stack.
MOST_REGISTERS = {
    "patch_differences_kernel": 64,
    "count_flags_kernel": 40,
    "scan_counts_kernel": 64,
    "write_index_kernel": 40,
    "fold_scores_kernel": 40,
    "fold_scores_backward_kernel": 64,
    "perturb_latent_kernel": 64,
    "perturb_latent_backward_kernel": 64,
    "reduce_partials_kernel": 40,
    "squared_error_kernel": 64,
    "squared_error_backward_kernel": 64,
    "tile_patches_kernel": 64,
    "tile_patches_any_kernel": 40,
    "tile_patches_backward_kernel": 64,
}


class Use(NamedTuple):
    """What ptxas says of one compiled kernel."""

    kernel: str
    symbol: str
    architecture: str
    stack: int
    spills: int
    registers: int


def build_module() -> ModuleType:
    """setup.py as a module: its functions, without running it."""
    pytest.importorskip("setuptools", reason="the package setuptools is not installed")
    spec = importlib.util.spec_from_file_location("fastalps_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library, freshly built, its build log beside it."""
    build = build_module()
    if build.nvcc() is None:
        pytest.skip("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BUILD", tmp_path_factory.mktemp("native"))
        patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
        patch.chdir(ROOT)
        try:
            return build.build_cuda(report=True)
        except build.BuildFailure as failure:
            if "ninja was not found" in str(failure):
                pytest.skip(str(failure))
            raise


REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>sm_\d+)'.*?"
    r"Function properties for (?P=symbol)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def uses(log: str) -> list[Use]:
    """Every report of a kernel in the build's log."""
    found = []
    for match in REPORT.finditer(log):
        # An Itanium-mangled name holds each of its parts behind that part's length.
        name = re.search(r"\d+([a-z_]+_kernel)", match["symbol"])
        found.append(
            Use(
                name[1] if name else match["symbol"],
                match["symbol"],
                match["architecture"],
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["registers"]),
            )
        )
    return found


def test_every_kernel_is_listed() -> None:
    declared = {
        name
        for source in (ROOT / "csrc/cuda").glob("*.cu")
        for name in re.findall(r"(\w+_kernel)\(", source.read_text(encoding="utf-8"))
    }
    assert declared == set(MOST_REGISTERS)


def test_no_spills_and_few_registers(library: Path) -> None:
    log = library.with_suffix(".log").read_text(encoding="utf-8")
    reports = uses(log)
    assert len(reports) == log.count("Compiling entry function") > 0
    for kernel, most in MOST_REGISTERS.items():
        for architecture in ARCHITECTURES:
            mine = [u for u in reports if (u.kernel, u.architecture) == (kernel, architecture)]
            assert mine, f"{kernel} was not compiled for {architecture}"
            for double in (False, True):
                used = [u.registers for u in mine if ("_kernelId" in u.symbol) is double]
                if not used:
                    continue
                dtype = "float64" if double else "others"
                print(f"| {kernel} | {architecture} | {dtype} | {len(used)} | {max(used)} |")
                assert all(count <= most * (1 + double) for count in used), (kernel, used)
    bad = [use for use in reports if use.spills or use.stack]
    assert not bad, bad


def test_bindings_register_every_op() -> None:
    source = BINDINGS.read_text(encoding="utf-8")
    registered = re.findall(r'm\.impl\(\s*"(\w+)"', source)
    assert sorted(registered) == sorted(ops.SCHEMAS)
    assert "STABLE_TORCH_LIBRARY_IMPL(fastalps, CUDA, m)" in source
    included = re.findall(r"#include <(torch/[^>]+)>", source)
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    assert all(header.startswith(stable) for header in included), included


LOADS = """
import ctypes, sys
import torch
from fastalps import ops
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
for name in ops.SCHEMAS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastalps::{name}", "CUDA"), name
print("loaded")
"""


def test_library_loads_and_registers(library: Path, tmp_path: Path) -> None:
    """The only symbol that a CPU torch lacks is the one that asks for the stream."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if torch.version.cuda is not None or compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux, a C++ compiler and a CPU build of torch")
    source, stand_in = tmp_path / "stream.cpp", tmp_path / "stream.so"
    source.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n',
        encoding="utf-8",
    )
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(stand_in)]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(library), str(stand_in)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.strip() == "loaded", done.stderr
