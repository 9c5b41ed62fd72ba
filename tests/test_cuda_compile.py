"""The CUDA library built without a GPU: every kernel for every architecture, and the registration.

One build by setup.py's own functions, in a temporary folder. What each kernel may use is in
bench/compile_limits.json; `python bench/compile_report.py` prints the table.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import compile_report
from bench.compiled import LIMITS, Row, limits_of, violations
from bench.cuda_compile import (
    ARCHITECTURES,
    CannotCompile,
    build_library,
    declared_kernels,
    disassembly,
    instruction_mix,
    kernel_name,
    uses,
)
from bench.schedule import instructions, spacing, with_products
from fastalps.op_definitions import SCHEMAS
from tests import ROOT

BINDINGS = ROOT / "csrc" / "bindings_cuda.cpp"
FUSED = ROOT / "csrc" / "bindings_fused.cpp"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA library, freshly built, its build log beside it."""
    try:
        return build_library(tmp_path_factory.mktemp("native"))
    except CannotCompile as reason:
        pytest.skip(str(reason))


def test_every_kernel_is_listed() -> None:
    assert declared_kernels() == set(LIMITS["cuda"])


def test_report(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel for every architecture, none beyond its limits: no spills, few registers."""
    log = library.with_suffix(".log")
    text = log.read_text(encoding="utf-8")
    assert "wgmma.mma_async instructions are serialized" not in text
    assert len(uses(text)) == text.count("Compiling entry function") > 0
    out = tmp_path / "report.json"
    code = compile_report.main(["--only", "cuda", "--log", str(log), "--json", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["violations"] == []
    found = {(row["kernel"], row["architecture"]) for row in record["rows"]}
    assert found == {(k, a) for k in LIMITS["cuda"] for a in ARCHITECTURES}
    assert said.out.count("\n") == 2 + len(record["rows"])
    fused = [row for row in record["rows"] if row["kernel"].startswith("fused_")]
    assert all(row["shared"] > 32 * 1024 for row in fused)


# On sm_90 groups of warps multiply in these, and do not wait for one product after the other.
BY_GROUPS = ("fused_encode_kernel", "fused_decode_kernel")


def test_fused_kernels_use_tensor_cores(library: Path) -> None:
    """In the disassembly: products by tensor cores, operands by ldmatrix, nothing spilt but where a
    limit says so."""
    try:
        mix = instruction_mix(library.parent / library.stem / "fused.cu.o")
    except CannotCompile as reason:
        pytest.skip(str(reason))
    found = {(kernel_name(symbol), architecture) for symbol, architecture in mix}
    names = {name for name in LIMITS["cuda"] if name.startswith("fused_")}
    assert found == {(name, architecture) for name in names for architecture in ARCHITECTURES}
    # Of wide networks M with two tiles is not compiled where it does not fit.
    empty = {key for key, counts in mix.items() if counts["all"] < 16}
    assert {(kernel_name(symbol), architecture) for symbol, architecture in empty} == {
        ("fused_latent_kernel", "sm_80"),
        ("fused_expand_kernel", "sm_80"),
    }
    assert all("ShapeILi2E" in symbol for symbol, _ in empty)
    for key, counts in mix.items():
        if key in empty:
            continue
        groups = key[1] == "sm_90" and kernel_name(key[0]) in BY_GROUPS
        assert (counts.get("HGMMA", 0) >= 9) == groups, (key, counts)
        assert counts.get("HMMA", 0) >= 4 and (groups or counts.get("LDSM", 0) >= 1), (key, counts)
        if limits_of("cuda", kernel_name(key[0]), key[1])["spills"] == 0:
            assert "LDL" not in counts and "STL" not in counts, (key, counts)


def test_products_stand_close_together(library: Path) -> None:
    """In the code of sm_90 of the widest networks, as launches that fill a device have it: a branch
    between products, which waits for their sums, would show."""
    try:
        code = disassembly(library.parent / library.stem / "fused.cu.o")
    except CannotCompile as reason:
        pytest.skip(str(reason))
    # Cycles from product to product, where 6 is back to back, and waits for all sums.
    for shape, most, drains in (
        ("fused_latent_kernelINS0_5fused11LatentShapeILi2ELi8ELi64ELi128ELi256E", 6.7, 3),
        ("fused_expand_kernelINS0_5fused11ExpandShapeILi2ELi8ELi256ELi128ELi64E", 7.2, 5),
        ("fused_decode_kernelINS0_5fused11DecodeShapeILi30ELi64ELi32ELi16ELi16E", 7.2, 1),
    ):
        (lines,) = (
            lines
            for (symbol, architecture), lines in code.items()
            if shape in symbol and architecture == "sm_90"
        )
        found = with_products(list(instructions(lines)))
        assert sum(each.products for each in found) >= 150
        assert spacing(found) <= most, shape
        assert sum(each.drains for each in found) <= drains, shape


def test_violations_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Row("cuda", "count_flags_kernel", "sm_90", "", 1, 40, 0, 0, 100)
    assert not list(violations([good, good._replace(registers=80, variant="float64")]))
    for change, told in (
        ({"registers": 41}, "41 registers, the limit is 40"),
        ({"spills": 4}, "4 bytes of spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 99999}, "99999 bytes of shared memory"),
        ({"kernel": "new_kernel"}, "no limit for it"),
    ):
        (line,) = violations([good._replace(**change)])
        assert told in line
    # A build that lacks kernels, and one of which spills.
    log = tmp_path / "build.log"
    log.write_text(
        "ptxas info    : Compiling entry function '_Z18count_flags_kernelv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z18count_flags_kernelv\n"
        "    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 36 registers, used 1 barriers, 64 bytes smem\n",
        encoding="utf-8",
    )
    assert compile_report.main(["--only", "cuda", "--log", str(log)]) == 1
    said = capsys.readouterr().err
    assert "count_flags_kernel on sm_90: 20 bytes of spills, the limit is 0" in said
    assert "cuda fused_encode_kernel was not compiled for sm_80" in said


@pytest.mark.parametrize("source", [BINDINGS, FUSED], ids=lambda path: path.stem)
def test_bindings_use_the_stable_abi(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    assert "STABLE_TORCH_LIBRARY_IMPL(fastalps, CUDA, m)" in text
    included = re.findall(r"#include <(torch/[^>]+)>", text)
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    assert all(header.startswith(stable) for header in included), included


def test_bindings_register_every_op() -> None:
    registered = re.findall(r'm\.impl\(\s*"(\w+)"', BINDINGS.read_text(encoding="utf-8"))
    assert sorted(registered) == sorted(SCHEMAS)


LOADS = """
import ctypes, sys
import torch
from fastalps import fused
from fastalps.op_definitions import SCHEMAS
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
for name in (*SCHEMAS, "fused_errors"):
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
