"""Every Triton kernel compiled to real cubins without a GPU: registers, spills, shared memory.

The figures are ptxas's own (`ptxas -v` on the PTX), as the driver that Triton asks for them is
absent here. Importing this module needs Triton.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from pathlib import Path
from typing import Any

import fastalps.kernels
import triton
from fastalps.kernels import launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.compiled import Row

TARGETS = (80, 90, 100)

PATCH = {"PATCH_H": 30, "PATCH_W": 30, "STRIDE_H": 15, "STRIDE_W": 15}
GATHER = 128 * launch.GATHERED
TILE = {"ROWS": 1, "BLOCK": 1024}
DENSE = {"perturbation_column": 1}  # An integer argument of 1 is a constant at run time, too.
# kernel -> [(pointer dtypes in the order of the arguments, constexprs)]; the other arguments are
# float32 where named in FLOATS, else int32.
FLOATS = {
    "scale",
    "shift",
    "scale_low",
    "shift_low",
    "strength",
    "strength_low",
    "factor",
    "factor_low",
}
SIGNATURES: dict[str, list[tuple[dict[str, str], dict[str, object]]]] = {
    "tile_patches_kernel": [
        (
            {"frames": "u8", "patches": "fp32"},
            {**PATCH, "CHANNELS": 1, "DOUBLE": False, "BLOCK": 1024, "WIDE": False},
        )
    ],
    "tile_patches_backward_kernel": [
        (
            {"grad": "fp32", "frames": "fp32"},
            {**PATCH, "DOUBLE": False, "BLOCK": GATHER, "WIDE": False},
        )
    ],
    "fold_scores_kernel": [
        (
            {"scores": "fp32", "folded": "i64" if owner else "fp32"},
            {
                **PATCH,
                "MAXIMUM": maximum,
                "OWNER": owner,
                "DOUBLE": False,
                "BLOCK": GATHER,
                "WIDE": False,
            },
        )
        for maximum, owner in ((False, False), (True, True))
    ],
    "fold_scores_backward_kernel": [
        (
            {"grad": "fp32", "owners": "i64" if maximum else "fp32", "scores_grad": "fp32"},
            {**PATCH, **TILE, "MAXIMUM": maximum, "DOUBLE": False},
        )
        for maximum in (False, True)
    ],
    "perturb_latent_kernel": [
        (
            {"latent": "bf16", "perturbation": "bf16", "output": "bf16", "energy": "fp32"},
            {**sizes, "CHUNK": 8192, "DOUBLE": False, **DENSE, "latent_column": 1},
        )
        for sizes in (
            {"ROWS": 8, "BLOCK": 128, "FINAL": True, "splits": 1, "steps": 1},
            {**TILE, "FINAL": False},
        )
    ],
    "perturb_latent_backward_kernel": [
        (
            {
                "grad_output": "bf16",
                "grad_energy": "fp32",
                "perturbation": "bf16",
                "result": "bf16",
            },
            {"ROWS": 8, "BLOCK": 128, "DOUBLE": False, **DENSE, "grad_column": 1},
        )
    ],
    "squared_error_kernel": [
        (
            {"values": dtype, "target": dtype, "errors": errors},
            {**TILE, "PASSES": 2, "SIGMOID": True, "DOUBLE": double, "CHUNK": 8192, "FINAL": final},
        )
        for dtype, errors, double, final in (
            ("bf16", "fp32", False, True),
            ("fp32", "fp32", False, False),
            ("fp64", "fp64", True, False),
        )
    ],
    "squared_error_backward_kernel": [
        (
            {"grad": "fp32", "values": "bf16", "target": "fp32", "result": "bf16"},
            {**TILE, "SIGMOID": True, "DOUBLE": False},
        )
    ],
    "mean_kernel": [
        (
            {"partials": "fp32", "means": "fp32"},
            {"ROWS": 16, "BLOCK": 64, "DOUBLE": False},
        )
    ],
    "patch_activity_kernel": [
        (
            {"frames": "u8", "background": "u8", "active": "u8"},
            {**PATCH, **TILE},
        )
    ],
    "cut_active_kernel": [
        (
            {"frames": "u8", "index": "i64", "cut": "fp32"},
            {**PATCH, **TILE},
        )
    ],
}


def kernels() -> dict[str, JITFunction]:
    """Every kernel (a jitted function whose name says so) of the folder."""
    found = {}
    for module in pkgutil.iter_modules(fastalps.kernels.__path__):
        for name, value in vars(importlib.import_module(f"fastalps.kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


def compiled(
    name: str,
    pointers: dict[str, str],
    constants: dict[str, object],
    capability: int,
    integer: str = "i32",
    floating: str = "fp32",
) -> Any:
    """One kernel compiled for a GPU of this compute capability, as Triton hands it out."""
    kernel = kernels()[name]
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = "*" + pointers[argument]
        elif argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = floating if argument in FLOATS else integer
    constexprs = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    # As at run time: pointers of fresh tensors are aligned to 16 bytes.
    attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in pointers}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def resources(ptx: str, capability: int, folder: Path) -> dict[str, int]:
    """ptxas's report of registers and spills for `ptx`."""
    from triton.backends.nvidia import compiler

    file = folder / "kernel.ptx"
    file.write_text(ptx, encoding="utf-8")
    suffix = "a" if capability >= 90 else ""
    run = subprocess.run(
        [
            compiler.get_ptxas(capability).path,
            "-v",
            f"--gpu-name=sm_{capability}{suffix}",
            str(file),
            "-o",
            str(folder / "kernel.cubin"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }
    found = {key: re.search(pattern, run.stderr) for key, pattern in patterns.items()}
    assert all(found.values()), f"ptxas reported something else:\n{run.stderr}"
    return {key: int(match.group(1)) for key, match in found.items()}  # type: ignore[union-attr]


def triton_row(name: str, index: int, capability: int, folder: Path) -> Row:
    """One of `SIGNATURES` compiled for one architecture; `folder` is for ptxas's files."""
    pointers, constants = SIGNATURES[name][index]
    kernel = compiled(name, pointers, constants, capability)
    assert kernel.asm["cubin"][:4] == b"\x7fELF"
    used = resources(kernel.asm["ptx"], capability, folder)
    return Row(
        "triton",
        name,
        f"sm_{capability}",
        "/".join(pointers.values()),
        1,
        used["registers"],
        used["spill_stores"] + used["spill_loads"],
        used["stack"],
        kernel.metadata.shared,
    )


def triton_rows(folder: Path) -> list[Row]:
    """Every signature of every kernel for every architecture."""
    return [
        triton_row(name, index, capability, folder)
        for name, cases in SIGNATURES.items()
        for index in range(len(cases))
        for capability in TARGETS
    ]
