"""Peaks of memory, and what `import fastalps` costs: each measured in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Case, Settings, summary

_PROBES = Path(__file__).resolve().parents[1] / "probes.py"

# Of the input: an input-sized temporary would be a third of it or more.
_ERROR_LIMIT = 0.1
# From 1,000 to 100,000 frames; those of 32x32 are 102 MB.
_SCORING_LIMIT = 200_000_000


def _probe(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(_PROBES), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def _record(figures: dict[str, dict[str, Any]], failed: str = "") -> dict[str, Any]:
    record: dict[str, Any] = {"ok": not failed, "figures": figures}
    return record | {"failed": failed} if failed else record


def _absent(settings: Settings) -> str:
    if settings.device != "cpu":
        return "measured on CPUs only"
    return "" if sys.platform == "linux" else "needs Linux's /proc"


def _guarded(
    run: Callable[[Settings], dict[str, Any]],
) -> Callable[[Settings], dict[str, Any]]:
    def measure(settings: Settings) -> dict[str, Any]:
        if reason := _absent(settings):
            return {"ok": True, "absent": reason, "figures": {}}
        try:
            return run(settings)
        except RuntimeError as failure:
            return _record({}, str(failure))

    return measure


def _megabytes(value: float) -> dict[str, Any]:
    return {"value": round(value / 1e6, 3), "unit": "MB"}


def _error_peak(op: str) -> Callable[[Settings], dict[str, Any]]:
    def measure(settings: Settings) -> dict[str, Any]:
        found = _probe("error_peak", op, settings.pick(2000, 10_000, 10_000))
        figures = {
            "inputs": _megabytes(found["input"]),
            "fastalps, extra": _megabytes(found["fastalps"]),
            "eager, extra": _megabytes(found["eager"]),
        }
        share = found["fastalps"] / found["input"]
        failed = f"{share:.0%} of the inputs' size" if share > _ERROR_LIMIT else ""
        return _record(figures, failed)

    return measure


def _scoring_peak(source: str) -> Callable[[Settings], dict[str, Any]]:
    def measure(settings: Settings) -> dict[str, Any]:
        counts = (1000, 10_000, 100_000)
        found = [_probe("scoring_peak", source, count) for count in counts]
        own = [one["extra"] - one["result"] for one in found]
        grown = own[2] - own[0]
        figures = {
            f"{count:,} frames, no scores": _megabytes(value)
            for count, value in zip(counts, own, strict=True)
        }
        figures["scores of 100,000"] = _megabytes(found[2]["result"])
        figures["growth from 1,000 on"] = _megabytes(grown)
        failed = f"{grown / 1e6:.0f} MB of growth" if grown > _SCORING_LIMIT else ""
        return _record(figures, failed)

    return measure


def _imports(settings: Settings) -> dict[str, Any]:
    runs = [_probe("import_times") for _ in range(settings.pick(1, 3, 15))]
    figures = {}
    for label in runs[0]:
        spread = {k: round(v, 3) for k, v in summary([run[label] for run in runs]).items()}
        figures[label] = {"value": spread["median"], "unit": "ms", **spread}
    return _record(figures)


def cases(settings: Settings) -> list[Case]:
    """Temporaries of the errors, growth over a long video, imports."""
    found = [
        Case(
            f"memory/{op}",
            f"extra peak memory of {op}; more than {_ERROR_LIMIT:.0%} of the inputs fails",
            measure=_guarded(_error_peak(op)),
        )
        for op in ("paired_mse", "sigmoid_mse", "paired_sigmoid_mse")
    ]
    if settings.effort == "full":
        found += [
            Case(
                f"memory/scoring-{source}",
                f"extra peak memory of scoring a {source} of 32x32 frames, gated",
                measure=_guarded(_scoring_peak(source)),
            )
            for source in ("stream", "memmap")
        ]
    found.append(
        Case(
            "memory/imports",
            "time to import, each step on top of the one before; medians over fresh interpreters",
            measure=_guarded(_imports),
        )
    )
    return found
