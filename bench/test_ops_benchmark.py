"""The ops under pytest-benchmark: `make bench-ops`.

The inputs are those of `bench/run.py ops`; every result is checked against float64 first.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases.op_inputs import OPS, OpCase
from bench.harness import relative_error
from fastalps.testing import TOLERANCE

pytest.importorskip("pytest_benchmark")

CASES = [
    pytest.param(case, name, count, id=f"{case.op}-{count}-{name.replace(' ', '-')}")
    for case in OPS
    for count in (*case.small, case.large(4, "cpu"))
    for name in ("fastalps", *(n for n, run in case.rivals.items() if callable(run)))
]


@pytest.mark.parametrize(("case", "name", "count"), CASES)
def test_op(benchmark, case: OpCase, name: str, count: int) -> None:
    inputs = case.inputs(count, torch.float32, torch.Generator().manual_seed(0))
    run = case.call if name == "fastalps" else case.rivals[name]
    result = run(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    for one, exact in zip(results, case.reference(inputs), strict=True):
        assert relative_error(one, exact) <= TOLERANCE[torch.float32]["rtol"]
    benchmark.group = f"{case.op}, {count} {case.item}"
    benchmark(run, *inputs)
