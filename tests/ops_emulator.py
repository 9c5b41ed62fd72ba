"""The CUDA kernels of the ops on the host: csrc/cuda/*.cu and their bindings, compiled by a C++
compiler with tests/emulation/cuda in place of CUDA's headers.

Only launches are rewritten, and one instruction that has no name in CUDA C++. The ops are
`fastalps::<op>_emulated`, with the gradients of the ops themselves.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastalps.op_definitions import FAKES, SCHEMAS, gradient
from tests import ROOT, host_compiler

EMULATION = ROOT / "tests/emulation"
KERNELS = ROOT / "csrc/cuda"
REWRITTEN = (
    (re.compile(r"\s*<<<"), " % emulation::Launch("),
    (re.compile(r">>>\("), ")("),
    # Its error, which Newton's iteration takes away, is that of 20 bits.
    (
        re.compile(r'asm\("rcp\.approx\.ftz\.f64 %0, %1;" : "=d"\((\w+)\) : "d"\((\w+)\)\);'),
        r"\1 = 1.0f / static_cast<float>(\2);",
    ),
)

_library = torch.library.Library("fastalps", "FRAGMENT")
_raw = torch.library.Library("fastalps_emulated", "DEF")


@functools.cache
def unavailable() -> str | None:
    """Builds and registers the ops, once a process; why that cannot be done here, or None."""
    if (reason := host_compiler.unavailable()) is not None:
        return reason
    with tempfile.TemporaryDirectory() as folder:
        load(build(Path(folder)))
    return None


def build(folder: Path) -> Path:
    """Compiles every op's kernels and the bindings to a library in `folder`."""
    include = Path(torch.__file__).parent / "include"
    sources = folder / "csrc/cuda"
    sources.mkdir(parents=True)
    (folder / "csrc/dtype.h").write_text((ROOT / "csrc/dtype.h").read_text())
    units = [EMULATION / "bindings.cpp"]
    for path in sorted(KERNELS.iterdir()):
        if path.name.startswith("fused"):
            continue
        text = path.read_text()
        for pattern, replacement in REWRITTEN:
            text = pattern.sub(replacement, text)
        copied = sources / (path.name.replace(".cu", ".cpp") if path.suffix == ".cu" else path.name)
        copied.write_text(text)
        if copied.suffix == ".cpp":
            units.append(copied)
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    flags += [host_compiler.FIBERS, "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    flags += [f"-I{each}" for each in (EMULATION / "cuda", include)]

    def compile_unit(unit: Path) -> Path:
        target = folder / f"{unit.stem}.o"
        command = [str(host_compiler.compiler()), *flags, "-c", str(unit), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    library = folder / "ops_emulation.so"
    link = ["-shared", *map(str, objects), f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([str(host_compiler.compiler()), *link, "-o", str(library)], check=True)
    return library


def load(library: Path) -> None:
    """Registers `fastalps::<op>_emulated` for every op, on tensors of the CPU."""
    for name, schema in SCHEMAS.items():
        _raw.define(f"{name}{schema}")
    torch.ops.load_library(str(library))
    for name, schema in SCHEMAS.items():
        emulated, qualified = f"{name}_emulated", f"fastalps::{name}_emulated"
        _library.define(f"{emulated}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(emulated, getattr(torch.ops.fastalps_emulated, name).default, "CPU")
        torch.library.register_fake(qualified, FAKES[name], lib=_library)
        if (pair := gradient(name, "_emulated")) is not None:
            torch.library.register_autograd(qualified, pair[1], setup_context=pair[0], lib=_library)
