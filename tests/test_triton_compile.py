"""Every Triton kernel compiled to real cubins without a GPU: registers, spills, shared memory.

What each kernel may use is in bench/compile_limits.json. Run with -s for the table.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from bench.compiled import LIMITS, violations
from bench.triton_compile import (
    FLOATS,
    SIGNATURES,
    TARGETS,
    compiled,
    kernels,
    triton_row,
)
from fastalps import backends

if backends.triton_interpreted():
    pytest.skip("Triton's interpreter does not compile", allow_module_level=True)


def test_every_kernel_is_compiled_here():
    assert sorted(kernels()) == sorted(SIGNATURES) == sorted(LIMITS["triton"])


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, cases in SIGNATURES.items() for i in range(len(cases))]
)
def test_no_spills(name, index, capability, tmp_path):
    row = triton_row(name, index, capability, tmp_path)
    print(f"\n| {name} | {row.variant} | sm_{capability} | {row.registers} | {row.shared} |")
    assert not list(violations([row]))


@pytest.mark.parametrize("name", SIGNATURES)
def test_other_specialisations_compile(name):
    """What the interpreter does not type-check: float64, 64-bit sizes, sizes of 1 (constants), and
    float64 scalars, which torch.compile passes."""
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
    traced = compiled(name, pointers, constants, 90, floating="fp64")
    for one in (double, single, traced):
        assert one.asm["cubin"][:4] == b"\x7fELF"
    if "fp64" not in pointers.values():
        # A scalar must not make the arithmetic float64, a sixty-fourth as fast on some devices.
        assert not re.search(r"\b(mul|fma|add)\.\S*f64", traced.asm["ptx"])
