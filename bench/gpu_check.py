"""Proves and times the GPU kernels on this machine, from a source tree, without a network.

Takes whatever Python and torch (2.10 or later, with CUDA) it is run by, and does these steps:

    build      the libraries, in place
    tests      those marked `gpu`
    profile    times of the fused kernels, and their counters where ncu (Nsight Compute) is there
    bench      bench/run.py --device cuda
    sanitizer  the fused kernels under compute-sanitizer, where that is there

What was found goes to bench/results/<machine>/gpu_check.json after every step, and what the steps
printed to *.log beside it: a check that is stopped leaves what it had. What is missing (a compiler,
setuptools, ninja, pytest) is said in one line, recorded, and worked around where possible.

Exit code: 0 when all steps passed, 1 when one failed or could not run (sanitizer and profile may be
skipped), 2 without a GPU.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 10)
# What runs under compute-sanitizer, a hundred times slower: the fused kernels at small sizes.
SANITIZED = ("tests/test_fused.py", "-k", "(test_values and fast-28 and uint8) or test_gate")
SANITIZERS = ("memcheck", "racecheck")
# Tests share the GPU in so many processes. Left to themselves each would start a thread a core, for
# OpenMP and for Inductor: 80 tests took 170 s on 16 cores.
TEST_PROCESSES = 12
FEW_THREADS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
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
    """The last lines, without the places of this tree and of Python: records are made public."""
    for place, name in ((f"{ROOT}/", ""), (f"{sys.prefix}/", "<python>/")):
        text = text.replace(place, name)
    return text.splitlines()[-TAIL_LINES:]


def execute(command: list[str], limit: float, log: Path, **variables: str) -> dict[str, Any]:
    """Runs `command` in the source tree, with more environment variables: `code` (None past the
    limit), `seconds` and `log` (the end of what it printed; all of it goes to the file)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", **variables}
    start = time.perf_counter()
    # A file, not a pipe: it has what was printed however this ends.
    with log.open("wb") as file:
        try:
            code: int | None = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = round(time.perf_counter() - start, 1)
    printed = log.read_text(encoding="utf-8", errors="replace")
    return {"code": code, "seconds": seconds, "log": tail(printed)}


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Builds the libraries in place; without setuptools, only Triton is left."""
    if importlib.util.find_spec("setuptools") is None:
        reason = "setuptools is not installed: no native library is built, Triton is checked alone"
        say(reason)
        return {"skipped": reason}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    step = execute(command, options.limit, options.out / "build.log")
    for line in step["log"]:
        if line.startswith("fastalps: "):
            say(line.removeprefix("fastalps: "))
    # Ninja's own log has what the compilers printed; setup.py prints it only where it fails.
    for log in sorted((ROOT / "build" / "native").glob("*.log")):
        step[log.name] = tail(log.read_text(encoding="utf-8", errors="replace"))
    return step


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


def test(options: argparse.Namespace) -> dict[str, Any]:
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
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += ["--durations=15", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(TEST_PROCESSES)]
        log = options.out / "tests.log"
        step = execute([*command, *files], options.limit, log, **FEW_THREADS)
        step |= counts(report) if report.exists() else {}
    if "passed" in step:
        skipped = sum(step["skipped"].values())
        say(f"{step['passed']} passed, {len(step['failed'])} failed, {skipped} skipped")
        for name in step["failed"]:
            say(f"failed: {name}")
    return step


def sanitize(options: argparse.Namespace) -> dict[str, Any]:
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
        found[check] = execute(command, options.limit, options.out / f"{check}.log")
        found["code"] = found["code"] or found[check]["code"]
        if found[check]["code"] is None:
            found["code"] = None
            break
    return found


def recorded(name: str, command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs a program of bench/ with --out; its own record is kept whole, as `result`."""
    out = (options.out / f"{name}.json").resolve()
    out.unlink(missing_ok=True)
    command = [sys.executable, *command, "--out", str(out)]
    step = execute(command, options.limit, options.out / f"{name}.log")
    if out.exists():
        step["result"] = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
    return step


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Times the fused kernels; with ncu, reads their counters as well."""
    ncu = [] if shutil.which("ncu") is None else ["--ncu"]
    if not ncu:
        say("ncu was not found: the profile has times and no counters")
    step = recorded("profile", ["bench/fused_profile.py", *ncu], options)
    if step["code"] == 2:
        # By its convention: it cannot run here, and its last line says why.
        reason = f"the fused kernels were not profiled: {' '.join(step['log'][-1:])}"
        say(reason)
        return {"skipped": reason}
    return step


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmarks on the GPU."""
    # What goals are stated for comes first: a run that is stopped leaves what it had. Preparing
    # ten models takes minutes.
    command = ["bench/run.py", "scoring", "ops", "training", "--device", "cuda"]
    command += ["--quick"] if options.quick else []
    if options.data is not None:
        command += ["--data", str(options.data.resolve())]
    return recorded("bench", command, options)


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


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "build": build,
    "tests": test,
    "profile": profile,
    "bench": bench,
    "sanitizer": sanitize,
}
# Their tools come with the toolkit, not with torch, and the fused kernels run on some GPUs only: to
# skip these is no failure.
OPTIONAL = ("sanitizer", "profile")


def metrics(steps: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the steps that ran."""
    found: dict[str, Any] = {}
    if tests := steps.get("tests"):
        found["tests_passed"] = tests.get("passed", 0)
        found["tests_failed"] = len(tests.get("failed", ()))
    if "bench" in steps:
        found["bench_passed"] = passed(steps["bench"])
    return found


def check(options: argparse.Namespace) -> int:
    torch = require_gpu()
    sys.path.insert(0, str(ROOT))
    from fastalps.environment import result_record
    from fastalps.files import make_folder, write_json

    name = slug(torch.cuda.get_device_name(0))
    options.out = make_folder(options.out or ROOT / "bench" / "results" / name)
    chosen = [name for name in STEPS if name in options.steps]
    before, report, steps = clocks(), [], {}
    for name in chosen:
        say(f"step {name}")
        steps[name] = STEPS[name](options)
        if "skipped" not in steps[name] and not passed(steps[name]):
            say(f"{name} did not pass: see its log or the JSON")
        if not report:
            # What is built, on and off; after the build, if there is one.
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder) / "report.log"
                report = execute([sys.executable, "-m", "fastalps"], options.limit, log)["log"]
            print("\n".join(report), flush=True)
        record = result_record(
            "gpu_check",
            metrics(steps),
            seed=None,
            steps=chosen,
            backends=report,
            driver=before,
            driver_after=clocks(),
            **steps,
        )
        write_json(options.out / "gpu_check.json", record)
    say(f"wrote {options.out / 'gpu_check.json'}")
    decisive = [
        step for name, step in steps.items() if name not in OPTIONAL or "skipped" not in step
    ]
    return 0 if all(map(passed, decisive)) else 1


def main(argv: list[str] | None = None) -> int:
    """Runs the check; see the module's text for the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        default=list(STEPS),
        metavar="STEP",
        help=f"only these of {', '.join(STEPS)}",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds of each benchmark")
    parser.add_argument("--data", type=Path, help="UCSD Ped2, as for bench/run.py")
    parser.add_argument("--out", type=Path, help="folder of the result, instead of bench/results/…")
    parser.add_argument(
        "--limit", type=float, default=3600, help="seconds after which a step is given up"
    )
    try:
        return check(parser.parse_args(argv))
    except CannotRun as reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
