"""Every op: GB/s against the copy that was measured beside it, and against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases.op_inputs import LARGE_BYTES, OPS, OpCase
from bench.harness import (
    Candidate,
    Case,
    Settings,
    Work,
    copy_candidate,
    input_sets,
    relative_error,
)
from fastalps.testing import TOLERANCE

REGION = "inputs on the device to results on the device, the results' allocation included"


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _tolerance(dtype: torch.dtype) -> float:
    assert TOLERANCE[dtype]["rtol"] == TOLERANCE[dtype]["atol"]
    return TOLERANCE[dtype]["rtol"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _rivals(case: OpCase, dtype: torch.dtype, settings: Settings) -> list[Candidate]:
    # Plain expressions in half precision round after every step: they may err that much more.
    tolerance = _tolerance(dtype) * (4 if dtype.itemsize < 4 else 1)
    rivals = [
        Candidate(name, None, absent=run)
        if isinstance(run, str)
        else Candidate(name, run, tolerance, dtype=_short(dtype))
        for name, run in case.rivals.items()
    ]
    if case.compile:
        name, first = "torch.compile", next(iter(case.rivals.values()))
        if settings.effort != "full":
            rivals.append(Candidate(name, None, absent="only in the full run"))
        else:
            torch._dynamo.reset()
            run = torch.compile(first, dynamic=False)
            rivals.append(Candidate(name, run, tolerance, dtype=_short(dtype)))
    return rivals


def _forward(case: OpCase, count: int, dtype: torch.dtype) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        rng = settings.generator()
        first = case.inputs(count, dtype, rng)
        sets = input_sets(settings, _bytes(*first))
        arguments = [first, *(case.inputs(count, dtype, rng) for _ in range(sets - 1))]
        exact = case.reference(first)
        outputs = _tuple(case.call(*first))
        moved = _bytes(*first, *outputs)
        arguments = [tuple(t.to(settings.device) for t in one) for one in arguments]

        def error(_: str, result: Any) -> float:
            return max(map(relative_error, _tuple(result), exact))

        tolerance = _tolerance(outputs[0].dtype)
        ours = Candidate("fastalps", case.call, tolerance, "", _short(dtype), ours=True)
        candidates = [ours, *_rivals(case, dtype, settings), copy_candidate(moved, settings)]
        amounts = {"bytes": moved, case.item: count}
        return Work(candidates, error, arguments, amounts, REGION, {"input_sets": sets})

    return prepare


def _backward(case: OpCase, count: int, dtype: torch.dtype) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        rng = settings.generator()
        tensors = case.inputs(count, dtype, rng)
        wide = tuple(t.double() for t in tensors)
        weights = [torch.randn(o.shape, generator=rng) for o in case.reference(tensors)]

        def gradients(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            leaves = [
                t.detach().requires_grad_(number in case.differentiable)
                for number, t in enumerate(inputs)
            ]
            outputs = _tuple(run(*leaves))
            grads = [w.to(o) for w, o in zip(weights, outputs, strict=True)]
            wanted = [leaves[number] for number in case.differentiable]
            return torch.autograd.grad(outputs, wanted, grads)

        exact = gradients(lambda *given: case.reference(tuple(given)), wide)
        tensors = tuple(t.to(settings.device) for t in tensors)
        weights = [w.to(settings.device) for w in weights]

        def error(_: str, result: Any) -> float:
            return max(map(relative_error, result, exact))

        # Gradients are products of several rounded factors.
        tolerance = 8 * _tolerance(dtype)
        ours = Candidate("fastalps", case.call, tolerance, "", _short(dtype), ours=True)
        candidates = [ours, *_rivals(case, dtype, settings)]
        for candidate in candidates:
            if candidate.run is not None:
                run = candidate.run
                candidate.run = lambda *inputs, run=run: gradients(run, inputs)
                candidate.tolerance = tolerance
        # Forward: inputs in, outputs out. Backward: both and the outputs' gradients (as large as
        # they) in, the inputs' gradients out.
        wanted = [tensors[number] for number in case.differentiable]
        moved = 2 * _bytes(*tensors) + 2 * _bytes(*weights) + _bytes(*wanted)
        candidates.append(copy_candidate(moved, settings))
        region = f"forward and backward pass; {REGION}"
        return Work(candidates, error, [tensors], {"bytes": moved, case.item: count}, region)

    return prepare


def cases(settings: Settings) -> list[Case]:
    """Every op at every size of this effort; backward passes and bfloat16 in the full run."""
    found = []
    for case in OPS:
        times = [1, 4] if case.waits and settings.device == "cuda" else [1]
        sizes = {case.large(4, settings.device, n): n * LARGE_BYTES[settings.device] for n in times}
        counts = [*case.small, *sizes] if settings.effort != "smoke" else [1, 2]
        about = f"{case.op} against {', '.join(case.rivals)}"
        for count in counts:
            where = f"about {sizes[count] // 1_000_000} MB" if count in sizes else "in cache"
            name = f"ops/{case.op}/{count}-{case.item}"
            found.append(Case(name, f"{about}; {where}", _forward(case, count, torch.float32)))
        if settings.effort == "quick":
            continue
        for dtype in case.dtypes[1:]:
            count = case.large(dtype.itemsize, settings.device) if settings.effort == "full" else 2
            name = f"ops/{case.op}/{count}-{case.item}-{_short(dtype)}"
            found.append(Case(name, f"{about}; {_short(dtype)}", _forward(case, count, dtype)))
        if case.differentiable:
            for count in counts:
                name = f"ops/{case.op}-backward/{count}-{case.item}"
                run = _backward(case, count, torch.float32)
                found.append(Case(name, f"{about}; forward and backward", run))
    return found
