"""Timing candidates side by side, and the gate in front of it: first right, then fast."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalps.errors import UserError

# A sample shorter than this drowns in the clock's and the scheduler's noise.
SAMPLE_SECONDS = 5e-3

# A call shorter than this has an untimed one in front of each sample: it brings data and code back
# into the caches, and the other candidate's idle threads to rest.
WARM_SECONDS = 50e-3

# (rounds at most, seconds a case may be timed for): quick enough to wait for, or worth committing.
EFFORT = {"smoke": (1, 0.0), "quick": (5, 1.5), "full": (21, 8.0)}


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    Attributes:
        effort: "smoke" (tiny inputs, one round: proves that it runs, its figures mean nothing),
            "quick" or "full".
        device: "cpu" or "cuda".
        threads: of every candidate alike.
        data: folder of UCSD Ped2, which may be absent.
        seed: of inputs and weights.
    """

    effort: str = "quick"
    device: str = "cpu"
    threads: int = 1
    data: Path = Path("UCSDped2")
    seed: int = 0

    def pick(self, smoke: int, quick: int, full: int) -> int:
        """The value for this effort."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.effort]

    def generator(self) -> torch.Generator:
        """Seeded, on the CPU: every machine draws the same inputs."""
        return torch.Generator().manual_seed(self.seed)


@dataclass
class Candidate:
    """One way to do a case's work.

    Attributes:
        name: as in the table.
        run: does the work once; None where it cannot be had here.
        tolerance: how far its result may be from the float64 reference; None: not checked (the
            copy, which computes nothing).
        absent: why `run` is None.
        dtype: that it computes in.
        ours: whether a failure of it is our failure.
    """

    name: str
    run: Callable[..., Any] | None
    tolerance: float | None = None
    absent: str = ""
    dtype: str = "float32"
    ours: bool = False


@dataclass
class Work:
    """A prepared case: candidates that do the same work on the same inputs.

    Attributes:
        candidates: the first is the one that ratios refer to.
        error: distance of a result of the first arguments from the float64 reference, by the
            candidate's name and result; NaN counts as failed.
        arguments: sets of inputs, taken in turn, so that on a GPU none is in the cache.
        amounts: what one call does, such as {"bytes": ..., "frames": ...}.
        region: what the clock sees.
        details: whatever else identifies the work.
    """

    candidates: list[Candidate]
    error: Callable[[str, Any], float]
    arguments: Sequence[tuple[Any, ...]] = ((),)
    amounts: dict[str, float] = field(default_factory=dict)
    region: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A registered benchmark; `prepare` makes its inputs and candidates when it is to run.

    `measure` replaces preparing and timing for figures that are not times (memory, imports).
    """

    name: str
    about: str
    prepare: Callable[[Settings], Work] | None = None
    measure: Callable[[Settings], dict[str, Any]] | None = None


def relative_error(actual: Tensor, exact: Tensor, floor: float = 1.0) -> float:
    """max |actual - exact| / (floor + |exact|); infinite for another shape.

    With the floor 1 it is at most t exactly when rtol = atol = t accepts the result.
    """
    if actual.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    exact = exact.double().to(actual.device)
    error = ((actual.double() - exact).abs() / (floor + exact.abs())).max().item()
    return error if math.isfinite(error) else math.inf


def run_case(case: Case, settings: Settings, peers: Sequence[str] | None = None) -> dict[str, Any]:
    """Checks and times a case; the JSON record of it. `peers`: parts of the names of candidates
    that are not ours, to have only those.

    Returns:
        `about`, `ok`, and for timed cases `region`, `amounts`, `details` and `candidates`: for
        each its dtype, `error`, `tolerance`, `seconds` (median, p10, p90, rounds) and
        `ratio` (its time over the first candidate's, by rounds: median, p10, p90); or `absent`;
        or `failed`, and then no times. A case that cannot even be prepared has `failed` itself.
    """
    if case.measure is not None:
        return {"about": case.about, **case.measure(settings)}
    assert case.prepare is not None
    try:
        work = case.prepare(settings)
    except UserError:
        raise
    except Exception as failure:  # the other cases shall run
        traceback.print_exc()
        return {"about": case.about, "ok": False, "failed": first_line(failure), "figures": {}}
    if peers is not None:
        work.candidates = [
            c for c in work.candidates if c.ours or any(part in c.name for part in peers)
        ]
    rows = {candidate.name: _check(candidate, work) for candidate in work.candidates}
    ok = not any("failed" in rows[c.name] for c in work.candidates if c.ours)
    # Without a right answer of ours there is nothing to compare with.
    if ok:
        runnable = [c for c in work.candidates if not rows[c.name].keys() & {"failed", "absent"}]
        samples = time_candidates(runnable, work.arguments, settings)
        first = next(iter(samples.values()))
        for name, times in samples.items():
            rows[name]["seconds"] = summary(times) | {"rounds": len(times)}
            rows[name]["ratio"] = summary([a / b for a, b in zip(times, first, strict=True)])
    return {
        "about": case.about,
        "ok": ok,
        "region": work.region,
        "amounts": work.amounts,
        "details": work.details,
        "candidates": rows,
    }


def _check(candidate: Candidate, work: Work) -> dict[str, Any]:
    row: dict[str, Any] = {"dtype": candidate.dtype}
    if candidate.run is None:
        return row | {"absent": candidate.absent}
    try:
        result = candidate.run(*work.arguments[0])
        if candidate.tolerance is None:
            return row
        error = work.error(candidate.name, result)
    except Exception as failure:  # a peer's failure must not end the run; ours fails the case
        message = first_line(failure)
        return row | {"failed" if candidate.ours else "absent": message}
    row |= {"error": error if math.isfinite(error) else None, "tolerance": candidate.tolerance}
    if not error <= candidate.tolerance:
        row["failed"] = f"error {error:.1e} against float64 exceeds {candidate.tolerance:.0e}"
    return row


def first_line(failure: Exception) -> str:
    """An exception on one line, for the table."""
    return f"{type(failure).__name__}: {(str(failure).strip() or 'no message').splitlines()[0]}"


def time_candidates(
    candidates: Sequence[Candidate], arguments: Sequence[tuple[Any, ...]], settings: Settings
) -> dict[str, list[float]]:
    """Seconds a call, by candidate and round; the candidates take turns within each round."""
    rounds, budget = EFFORT[settings.effort]
    clock = _cuda_seconds if settings.device == "cuda" else _cpu_seconds
    repeats, warm, total = {}, {}, 0.0
    for candidate in candidates:
        # The check was its first call; what is short has more to warm up.
        seconds = clock(candidate, arguments, 1)
        if seconds < WARM_SECONDS:
            seconds = clock(candidate, arguments, 1)
        least = 0.0 if settings.effort == "smoke" else SAMPLE_SECONDS
        repeats[candidate.name] = max(1, math.ceil(least / max(seconds, 1e-9)))
        warm[candidate.name] = seconds < WARM_SECONDS
        total += seconds * (repeats[candidate.name] + warm[candidate.name])
    if settings.effort != "smoke":
        rounds = max(3, min(rounds, int(budget / total)))
    samples: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds):
        # Back and forth: none always follows the same neighbour.
        for candidate in candidates if number % 2 == 0 else candidates[::-1]:
            if warm[candidate.name]:
                clock(candidate, arguments, 1)
            samples[candidate.name].append(clock(candidate, arguments, repeats[candidate.name]))
    return samples


def _cpu_seconds(candidate: Candidate, arguments: Sequence[tuple[Any, ...]], repeats: int) -> float:
    assert candidate.run is not None
    start = time.perf_counter()
    for number in range(repeats):
        candidate.run(*arguments[number % len(arguments)])
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(
    candidate: Candidate, arguments: Sequence[tuple[Any, ...]], repeats: int
) -> float:
    assert candidate.run is not None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for number in range(repeats):
        candidate.run(*arguments[number % len(arguments)])
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}


def input_sets(settings: Settings, size: int) -> int:
    """How many sets of inputs of `size` bytes to take in turn: on CUDA, four L2 caches full."""
    if settings.device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, math.ceil(4 * cache / max(size, 1))))


def copy_candidate(size: int, settings: Settings) -> Candidate:
    """`Tensor.copy_` that reads size / 2 bytes and writes as many: what memory gives here."""
    elements = max(1, size // 8)
    sets = input_sets(settings, size)
    pairs = [
        (torch.rand(elements, device=settings.device), torch.rand(elements, device=settings.device))
        for _ in range(sets)
    ]
    turn = 0

    def copy(*_: Any) -> None:
        nonlocal turn
        source, target = pairs[turn % sets]
        target.copy_(source)
        turn += 1

    return Candidate("torch copy_", copy)


def keep_freed_memory() -> bool:
    """Makes malloc keep large blocks that were freed, for every candidate alike; whether it did.

    By default glibc gives them back, and the next result pays for fresh pages: above some 32 MB
    that takes longer than the op, and measures the kernel of the system, not ours.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # of glibc's malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
