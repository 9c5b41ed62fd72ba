"""Times each fused kernel on a GPU and, with ncu (Nsight Compute), reads its hardware counters.

    python bench/fused_profile.py --out profile.json --ncu

Every patch of Ped2-sized random frames (240x360, 96 patches of 30x30 each) is scored with both
passes; a kernel's time is the sum of its launches (torch.profiler) over the patches. Counters are
of one chunk of patches, the third, so that weights and scratch are in the L2 cache; where ncu fails
(it needs the right to read counters), its reason is kept in their place.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

import fastalps
from bench.command_line import Parser, guarded
from fastalps.environment import result_record
from fastalps.errors import UserError
from fastalps.files import write_json
from fastalps.fused import FusedEngine, why_not
from fastalps.models import PRESETS

PROTOCOL = "fused-profile"
PATCH = 30
CUT = ((PATCH, PATCH), (PATCH, PATCH), "cover")
PATCHES = 96
# Launches of a chunk, and chunks before the one whose counters are read.
LAUNCHES, SKIPPED = 5, 2
NCU_SECONDS = 180
# Set for the run under ncu: a few chunks, nothing else.
ONLY = "FASTALPS_PROFILE_ONLY"
KERNELS = {
    "fused_encode_kernel": "E",
    "fused_latent_kernel": "M, first half",
    "fused_dense_kernel": "M, dense layer",
    "fused_expand_kernel": "M, second half",
    "fused_decode_kernel": "D",
}
# Name of ncu, name in the record; shares are of the peak, in percent.
COUNTERS = {
    "gpu__time_duration.sum": "ns",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor pipe %",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed": "hmma pipe %",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed": "issue slots %",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed": (
        "shared memory %"
    ),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "lts__t_bytes.sum": "L2 bytes",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "dram__bytes.sum": "device memory bytes",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active %",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled: barrier",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": (
        "stalled: L1 and beyond"
    ),
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": (
        "stalled: shared memory"
    ),
    "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio": "stalled: mio queue",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": (
        "stalled: math pipe"
    ),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "stalled: fixed latency",
    "smsp__average_warps_issue_stalled_not_selected_per_issue_active.ratio": "not selected",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio": "stalled: global queue",
    "smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio": (
        "stalled: no instruction"
    ),
    "smsp__average_warps_issue_stalled_dispatch_stall_per_issue_active.ratio": "stalled: dispatch",
    "smsp__average_warps_issue_stalled_branch_resolve_per_issue_active.ratio": "stalled: branch",
}


def _engine(preset: str, chunk: int | None) -> FusedEngine:
    torch.manual_seed(0)
    model = fastalps.ALPS(PATCH, preset=preset).eval()
    device = torch.device("cuda")
    if reason := why_not(model.config, device, "bf16"):
        raise UserError(reason)
    engine = FusedEngine(model, device)
    engine.chunk = engine.chunk if chunk is None else chunk
    return engine


def _frames(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 240, 360), dtype=torch.uint8, device="cuda")


def _stage(name: str) -> str | None:
    return next((stage for kernel, stage in KERNELS.items() if kernel in name), None)


def kernel_times(engine: FusedEngine, frames: torch.Tensor, rounds: int) -> dict[str, float]:
    """Nanoseconds a patch: of each kernel, the sum of its launches, and of a whole call by events;
    medians over rounds."""
    for _ in range(3):
        engine.frame_errors(frames, CUT, "both")
    whole = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        engine.frame_errors(frames, CUT, "both")
        last.record()
        last.synchronize()
        whole.append(first.elapsed_time(last) * 1e6)
    # Without it torch warns that a profile's events are cleared.
    kept = {"acc_events": True} if "acc_events" in inspect.signature(profile).parameters else {}
    sums: list[dict[str, float]] = []
    for _ in range(min(rounds, 3)):
        with profile(activities=[ProfilerActivity.CUDA], **kept) as recorded:
            engine.frame_errors(frames, CUT, "both")
            torch.cuda.synchronize()
        found = dict.fromkeys(KERNELS.values(), 0.0)
        for event in recorded.events():
            if stage := _stage(event.name):
                found[stage] += event.device_time * 1e3
        sums.append(found)
    patches = len(frames) * PATCHES
    times = {
        stage: statistics.median(one[stage] for one in sums) / patches for stage in KERNELS.values()
    }
    return times | {"whole call": statistics.median(whole) / patches}


def counters(preset: str, chunk: int | None, ncu: str) -> dict[str, dict[str, float]]:
    """Counters of each kernel in the third chunk, by running this script under ncu.

    Raises UserError when ncu fails.
    """
    command = [ncu, "--csv", "--page", "raw", "--clock-control", "none"]
    command += ["--kernel-name", "regex:fused_.*_kernel"]
    command += ["--launch-skip", str(SKIPPED * LAUNCHES), "--launch-count", str(LAUNCHES)]
    command += ["--metrics", ",".join(COUNTERS)]
    command += [sys.executable, str(Path(__file__).resolve()), "--preset", preset]
    command += [] if chunk is None else ["--chunk", str(chunk)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, ONLY: "1"},
            timeout=NCU_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise UserError(f"ncu failed: {str(failure).splitlines()[0]}") from failure
    found = {} if done.returncode else parse_counters(done.stdout)
    if not found:
        # Its own messages begin with ==; what the program printed is no reason.
        said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        reasons = [line for line in said if "==ERROR==" in line] or said[-1:]
        raise UserError(f"ncu failed: {reasons[0]}")
    return found


def parse_counters(text: str) -> dict[str, dict[str, float]]:
    """Counters of each kernel from ncu's table (--csv --page raw): names, units, then launches."""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    found: dict[str, dict[str, float]] = {}
    for row in rows[1:]:
        stage = _stage(row["Kernel Name"])
        if stage is None:
            continue
        found[stage] = {}
        for name, label in COUNTERS.items():
            try:
                value = float((row.get(name) or "").replace(",", ""))
            except ValueError:  # n/a: this GPU has no such counter
                continue
            if math.isfinite(value):
                found[stage][label] = value * _scale(rows[0][name])
    return found


def _scale(unit: str) -> float:
    """Factor to bytes or nanoseconds, from the units that ncu chose for a table."""
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if unit == f"{prefix}byte":
            return factor
    return {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}.get(
        unit, 1.0
    )


def _table(preset: str, times: dict[str, float]) -> str:
    lines = [f"{preset}: ns a patch (both scores of 30x30)"]
    lines += [f"  {stage:<16} {value:8.1f}" for stage, value in times.items()]
    return "\n".join([*lines, f"  = {1e3 / times['whole call']:.3f} million patches/s"])


def _counter_table(found: dict[str, dict[str, float]]) -> str:
    lines = []
    for stage, values in found.items():
        lines.append(f"  counters of {stage}:")
        lines += [f"    {label:<24} {value:16,.2f}" for label, value in values.items()]
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(
        prog="bench/fused_profile.py",
        description=__doc__,
    )
    parser.add_argument(
        "--preset", action="append", choices=PRESETS, help="default: network-b, paper and fast"
    )
    parser.add_argument("--frames", type=_count, default=2010, help="default: 2010, as Ped2 tests")
    parser.add_argument("--rounds", type=_count, default=11, help="default: 11")
    parser.add_argument("--chunk", type=_count, help="patches whose maps are in scratch at once")
    parser.add_argument("--ncu", action="store_true", help="also read hardware counters")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    presets = options.preset or ["network-b", "paper", "fast"]
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; this is a profile of GPU kernels")
    if os.environ.get(ONLY):
        engine = _engine(presets[0], options.chunk)
        patches = (SKIPPED + 2) * engine.chunk
        engine.frame_errors(_frames(-(-patches // PATCHES)), CUT, "both")
        torch.cuda.synchronize()
        return 0
    if options.out is not None and not options.out.parent.is_dir():
        raise UserError(f"--out: no folder {options.out.parent}; make it first")
    ncu = shutil.which("ncu") if options.ncu else None
    if options.ncu and ncu is None:
        raise UserError("--ncu: ncu was not found; install Nsight Compute or leave the option out")
    metrics: dict[str, Any] = {}
    for preset in presets:
        engine = _engine(preset, options.chunk)
        times = kernel_times(engine, _frames(options.frames), options.rounds)
        found: dict[str, dict[str, float]] = {}
        metrics[preset] = {"ns_a_patch": times, "chunk": engine.chunk, "counters": found}
        print(_table(preset, times), flush=True)
        if ncu is not None:
            try:
                found |= counters(preset, options.chunk, ncu)
                print(_counter_table(found), flush=True)
            except UserError as failure:
                # The times stand. Of the other networks it would say the same.
                metrics[preset]["no_counters"] = str(failure)
                print(f"  no counters: {failure}", flush=True)
                ncu = None
        if options.out is not None:
            # After each network: a run that is stopped leaves what it found.
            record = result_record(PROTOCOL, metrics, seed=0, frames=options.frames)
            write_json(options.out, record)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
