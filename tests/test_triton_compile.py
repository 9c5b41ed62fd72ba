"""Every Triton kernel compiled to real cubins without a GPU: registers, spills, shared memory.

The figures are ptxas's own (`ptxas -v` on the PTX), as the driver that Triton asks for them is
absent here. Run with -s for the table.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="the package triton is not installed")

import fastalps.kernels  # noqa: E402
from fastalps.kernels import launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastalps import backends  # noqa: E402

if backends.triton_interpreted():
    pytest.skip("Triton's interpreter does not compile", allow_module_level=True)

TARGETS = (80, 90, 100)
# 65,536 registers a multiprocessor: at most 80 a thread leave room for 6 programs of 128 threads,
# enough to hide the latency of the memory that these kernels wait for. Twice as many for float64.
MOST_REGISTERS = 80

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
):
    kernel = kernels()[name]
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = "*" + pointers[argument]
        elif argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = "fp32" if argument in FLOATS else integer
    constexprs = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    # As at run time: pointers of fresh tensors are aligned to 16 bytes.
    attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in pointers}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def resources(ptx: str, capability: int, folder) -> dict[str, int]:
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


def test_every_kernel_is_compiled_here():
    assert sorted(kernels()) == sorted(SIGNATURES)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, cases in SIGNATURES.items() for i in range(len(cases))]
)
def test_no_spills(name, index, capability, tmp_path):
    kernel = compiled(name, *SIGNATURES[name][index], capability)
    cubin = kernel.asm["cubin"]
    assert cubin[:4] == b"\x7fELF"
    used = resources(kernel.asm["ptx"], capability, tmp_path)
    print(
        f"\n| {name} | {'/'.join(SIGNATURES[name][index][0].values())} | sm_{capability} "
        f"| {used['registers']} | {used['spill_stores'] + used['spill_loads']} "
        f"| {kernel.metadata.shared} | {len(cubin)} |"
    )
    assert used["spill_stores"] == used["spill_loads"] == used["stack"] == 0
    double = "fp64" in SIGNATURES[name][index][0].values()
    assert used["registers"] <= MOST_REGISTERS * (2 if double else 1)


@pytest.mark.parametrize("name", SIGNATURES)
def test_other_specialisations_compile(name):
    """What the interpreter does not type-check: float64, 64-bit sizes, sizes of 1 (constants)."""
    pointers, constants = SIGNATURES[name][-1]
    wide = {key: True for key in ("DOUBLE", "WIDE") if key in constants}
    doubles = {key: "fp64" if value.startswith("fp") else value for key, value in pointers.items()}
    double = compiled(name, doubles, {**constants, **wide}, 90, "i64")
    ones = {
        key: 1
        for key in kernels()[name].arg_names
        if key not in pointers and key not in constants and key not in FLOATS
    }
    single = compiled(name, pointers, {**constants, **ones}, 90)
    assert double.asm["cubin"][:4] == single.asm["cubin"][:4] == b"\x7fELF"
