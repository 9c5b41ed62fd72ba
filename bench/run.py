"""Benchmarks of fastalps: first right, then fast.

Every case first compares each candidate's result with a float64 reference; a candidate whose check
fails is shown without a speed, and if it is ours the exit code is 1. Then the candidates take turns
(A B C, C B A, ...) on the same random data with equal threads; medians and spread are shown.

groups:
  ops       every fused op on UCSD-sized frames (240x360), patches (30x30) and latents, in cache and
            at about 100 MB (400 on CUDA); GB/s against Tensor.copy_ measured beside it; against
            plain PyTorch expressions, F.unfold and Tensor.unfold, kornia, torch.compile (full run);
            backward passes and bfloat16 in the full run
  scoring   uint8 frames to both scores of every patch (fastalps.Scorer), all patches and only those
            that move; against the same network in PyTorch eager (fp32, bf16, NCHW, channels-last),
            torch.compile (full run), on CPUs ONNX Runtime and OpenVINO where installed. On CUDA:
            UCSD Ped2's whole test set, on the device and from pinned memory, and a single frame.
            What precisions do to errors and AUROC of the pretrained networks, where data are there
  training  one step of the autoencoder and of the distorter at batch 128, 28x28; against a plain
            PyTorch loop; the same of ten models, stacked, on streams (CUDA) and one by one
  memory    extra peak memory of the error ops; of scoring 100,000 frames (full run); import times
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import cases, peers, table
from bench.command_line import Parser, guarded
from bench.data import DATA
from bench.harness import EFFORT, Settings, keep_freed_memory, run_case
from fastalps import backends
from fastalps.environment import result_record, usable_cores
from fastalps.errors import UserError
from fastalps.files import write_json

PROTOCOL = "benchmark"


def _parser() -> Parser:
    parser = Parser(
        prog="bench/run.py",
        description=__doc__,
        epilog=table.COLUMNS,
    )
    names = ", ".join(cases.GROUPS)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{names} (default: all)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where it all runs (default: cpu)"
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="few rounds: about two minutes in all")
    effort.add_argument(
        "--smoke", action="store_true", help="tiny inputs, one round: the figures mean nothing"
    )
    parser.add_argument("--threads", type=int, help="of every candidate (default: the cores)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases named so in part")
    parser.add_argument(
        "--peers",
        metavar="TEXT,TEXT",
        help="of the candidates, only ours and those named so in part (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="also print new / old for each case"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA / "UCSDped2",
        help="UCSD Ped2, for real frames (default: UCSDped2 in FASTALPS_DATA, else in "
        "../shared/data; where it is absent, random ones)",
    )
    parser.add_argument(
        "--fresh-memory",
        action="store_true",
        help="let malloc return large results to the system, as glibc does by default: each then "
        "pays for new pages. Otherwise freed memory is kept, for all candidates alike",
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    for group in options.groups:
        if group not in cases.GROUPS:
            raise UserError(f"group: expected one of {', '.join(cases.GROUPS)}; got {group!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use cpu")
    threads = usable_cores() if options.threads is None else options.threads
    if threads < 1:
        raise UserError(f"--threads: expected a number from 1 up, got {threads}")
    if options.out is not None and not options.out.parent.is_dir():
        raise UserError(f"--out: no folder {options.out.parent}; make it first")
    effort = "quick" if options.quick else "smoke" if options.smoke else "full"
    return Settings(effort, options.device, threads, options.data)


def _load() -> float | None:
    """Processes that wanted a core in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _old_cases(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--compare: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--compare: {path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("protocol") != PROTOCOL:
        raise UserError(f"--compare: {path} was not written by bench/run.py --out")
    return record["metrics"]


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    old = _old_cases(options.compare)
    chosen = [
        case
        for case in cases.load(tuple(options.groups) or cases.GROUPS, settings)
        if options.filter in case.name
    ]
    if not chosen:
        raise UserError(f"--filter: no case has {options.filter!r} in its name; see --list")
    if options.list:
        for case in chosen:
            print(f"{case.name:<44} {case.about}")
        return 0
    wanted = None if options.peers is None else options.peers.split(",")
    torch.set_num_threads(settings.threads)
    kept = not options.fresh_memory and keep_freed_memory()
    where = f"{settings.device}, {settings.threads} threads, kernels: {backends.cpu_kernels()}"
    print(f"{settings.effort} run on {where}; freed memory is {'kept' if kept else 'given back'}")
    tf32 = None
    if settings.device == "cuda":
        # By default cuDNN's convolutions round fp32 to 10 bits, which no fp32 check would pass.
        tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        print(f"{torch.cuda.get_device_name()}; TF32 is off for every candidate")
    load = _load()
    if load is not None and load > 0.5:
        print(f"other work runs here (load {load:.1f} on {usable_cores()} cores): mind the spread")
    print(table.COLUMNS)
    results: dict[str, Any] = {}
    rounds, seconds = EFFORT[settings.effort]
    for case in chosen:
        results[case.name] = run_case(case, settings, wanted)
        print()
        print("\n".join(table.case_lines(case.name, results[case.name])), flush=True)
        if options.out is None:
            continue
        # After each case: a run that is stopped leaves what it found.
        record = result_record(
            PROTOCOL,
            results,
            seed=settings.seed,
            effort=settings.effort,
            rounds_at_most=rounds,
            seconds_a_case=seconds,
            device=settings.device,
            threads=settings.threads,
            tf32=tf32,
            freed_memory_kept=kept,
            load_before=load,
            cpu_kernels=backends.cpu_kernels(),
            peers=peers.versions(),
        )
        write_json(options.out, record)
    if old is not None:
        print()
        print("\n".join(table.comparison_lines(old, results)))
    failed = [name for name, result in results.items() if not result["ok"]]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    # torch.compile and exporters talk to their developers.
    warnings.filterwarnings("ignore", module=r"torch\..*")
    return guarded(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
