"""Proves and times the GPU kernels on this machine, from a source tree, without a network.

Takes whatever Python and torch (2.10 or later, with CUDA) it is run by: builds the libraries in
place, runs the tests marked `gpu`, the fused kernels under compute-sanitizer where that is there,
and the benchmarks, and writes one JSON file with all that was found to
bench/results/<machine>/gpu_check.json. What is missing (a compiler, setuptools, ninja, pytest) is
said in one line, recorded, and worked around where possible.

Exit code: 0 when all tests and benchmarks passed, 1 when one failed or could not run, 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 10)
# What runs under compute-sanitizer, a hundred times slower: the fused kernels at small sizes.
SANITIZED = ("tests/test_fused.py", "-k", "(test_values and fast-28 and uint8) or test_gate")
SANITIZERS = ("memcheck", "racecheck")
TAIL_LINES = 40
CLOCKS = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm"),
    *("clocks.max.mem", "power.limit", "temperature.gpu", "mig.mode.current"),
)


class CannotRun(Exception):
    """This machine cannot be checked; the text says why in one line."""


def say(text: str) -> None:
    print(f"gpu-check: {text}", flush=True)


def require_gpu() -> Any:
    """The installed torch, once it is known to reach a CUDA device."""
    # No installer has looked at what pyproject.toml requires.
    if sys.version_info < (3, 10):  # noqa: UP036
        raise CannotRun(f"needs Python 3.10 or later, this is {sys.version.split()[0]}")
    try:
        import torch
    except ImportError:
        raise CannotRun(f"torch is not installed in {sys.executable}") from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise CannotRun(f"needs torch 2.10 or later, this is {torch.__version__}")
    if torch.version.cuda is None:
        raise CannotRun(f"needs a CUDA build of torch, this is {torch.__version__}")
    if not torch.cuda.is_available():
        raise CannotRun(f"torch {torch.__version__} finds no CUDA device here")
    return torch


def tail(text: str) -> list[str]:
    return text.splitlines()[-TAIL_LINES:]


def execute(command: list[str], limit: float) -> dict[str, Any]:
    """Runs `command` in the source tree: `code` (None past the limit), `seconds`, `log` (its end)
    and `output` (all of it)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        code, output = None, said if isinstance(said, str) else said.decode(errors="replace")
    seconds = round(time.perf_counter() - start, 1)
    return {"code": code, "seconds": seconds, "log": tail(output), "output": output}


def without_output(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "output"}


def build(limit: float) -> dict[str, Any]:
    """Builds the libraries in place; without setuptools, only Triton is left."""
    if importlib.util.find_spec("setuptools") is None:
        reason = "setuptools is not installed: no native library is built, Triton is checked alone"
        say(reason)
        return {"skipped": reason}
    step = execute([sys.executable, "setup.py", "build_ext", "--inplace"], limit)
    for line in step["log"]:
        if line.startswith("fastalps: "):
            say(line.removeprefix("fastalps: "))
    # Ninja's own log has what the compilers printed; setup.py prints it only where it fails.
    for log in sorted((ROOT / "build" / "native").glob("*.log")):
        step[log.name] = tail(log.read_text(encoding="utf-8", errors="replace"))
    return without_output(step)


def counts(report: Path) -> dict[str, Any]:
    """Numbers of tests by outcome, and who failed or was skipped, from pytest's JUnit XML."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}}
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message") or ""
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def test(limit: float) -> dict[str, Any]:
    """Runs the tests marked `gpu`. Only their files are read: others may need absent packages."""
    if importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed: the GPU tests did not run"
        say(reason)
        return {"skipped": reason}
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        step = execute([sys.executable, "-m", "pytest", *options, *files], limit)
        found = counts(report) if report.exists() else {}
    return {**without_output(step), **found}


def sanitize(limit: float) -> dict[str, Any]:
    """Runs the fused kernels under compute-sanitizer: accesses out of bounds, and races in shared
    memory. `code` is that of the first check that failed, else 0."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or importlib.util.find_spec("pytest") is None:
        missing = "compute-sanitizer was not found" if tool is None else "pytest is not installed"
        reason = f"{missing}: the fused kernels were not checked for bad accesses and races"
        say(reason)
        return {"skipped": reason}
    found: dict[str, Any] = {"code": 0}
    for check in SANITIZERS:
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable]
        command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *SANITIZED]
        found[check] = without_output(execute(command, limit))
        found["code"] = found["code"] or found[check]["code"]
        if found[check]["code"] is None:
            found["code"] = None
            break
    return found


def bench(quick: bool, limit: float) -> dict[str, Any]:
    """Runs the benchmarks on the GPU; their own record is kept whole."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "bench/run.py", "--device", "cuda", "--out", str(out)]
        step = execute([*command, *(["--quick"] if quick else [])], limit)
        if out.exists():
            step["result"] = json.loads(out.read_text(encoding="utf-8"))
    return without_output(step)


def clocks() -> list[dict[str, str]] | None:
    """What nvidia-smi says of each GPU; None where it is absent."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(CLOCKS, row, strict=False)) for row in rows]


def slug(name: str) -> str:
    """A folder's name for a machine: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def passed(step: dict[str, Any]) -> bool:
    return step.get("code") == 0


def check(arguments: argparse.Namespace) -> int:
    torch = require_gpu()
    sys.path.insert(0, str(ROOT))
    from fastalps.environment import result_record
    from fastalps.files import make_folder, write_json

    before = clocks()
    say("building the libraries")
    steps = {"build": build(arguments.limit)}
    report = execute([sys.executable, "-m", "fastalps"], arguments.limit)
    print(report["output"], flush=True)
    say("running the tests marked gpu")
    steps["tests"] = test(arguments.limit)
    if "passed" in steps["tests"]:
        ran = steps["tests"]
        say(
            f"{ran['passed']} passed, {len(ran['failed'])} failed, "
            f"{sum(ran['skipped'].values())} skipped"
        )
        for name in ran["failed"]:
            say(f"failed: {name}")
    say("running the fused kernels under compute-sanitizer")
    steps["sanitizer"] = sanitize(arguments.limit)
    if "skipped" not in steps["sanitizer"] and not passed(steps["sanitizer"]):
        say("compute-sanitizer found something, or a test failed under it: see the JSON")
    say("running the benchmarks")
    steps["bench"] = bench(arguments.quick, arguments.limit)
    if not passed(steps["bench"]):
        say(f"bench/run.py did not pass: {steps['bench']['log'][-1:]}")
    tests = steps["tests"]
    metrics = {
        "tests_passed": tests.get("passed", 0),
        "tests_failed": len(tests.get("failed", ())),
        "bench_passed": passed(steps["bench"]),
    }
    record = result_record(
        "gpu_check",
        metrics,
        seed=None,
        backends=report["log"],
        driver=before,
        driver_after=clocks(),
        **steps,
    )
    name = slug(torch.cuda.get_device_name(0))
    folder = make_folder(arguments.out or ROOT / "bench" / "results" / name)
    write_json(folder / "gpu_check.json", record)
    say(f"wrote {folder / 'gpu_check.json'}")
    # compute-sanitizer comes with the toolkit, not with torch: its absence is no failure.
    decisive = [
        step for name, step in steps.items() if name != "sanitizer" or "skipped" not in step
    ]
    return 0 if all(map(passed, decisive)) else 1


def main(argv: list[str] | None = None) -> int:
    """Runs the check; see the module's text for the exit code."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of each benchmark")
    parser.add_argument("--out", type=Path, help="folder of the result, instead of bench/results/…")
    parser.add_argument(
        "--limit", type=float, default=3600, help="seconds after which a step is given up"
    )
    arguments = parser.parse_args(argv)
    try:
        return check(arguments)
    except CannotRun as reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
