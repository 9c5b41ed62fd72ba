"""The paper's tables on real data, with our rows beside the paper's.

Each class, seed and method is a cell: trained and tested once for both protocols, and kept as JSON
under bench/results/quality/. Finished cells are never run again, and a run may be stopped at any
moment: cells that had begun go on from their last checkpoint. Table I compares ALPS, its preset
"fast", and scikit-learn's one-class detectors, table II the variants for video and a baseline that
learns nothing, table III a plain autoencoder, one with random latent noise, and ALPS, at equal
budget.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.command_line import Parser, guarded
from bench.data import DATA, HELP
from bench.quality import cells, pictures, tables, video
from bench.quality.recipes import BASELINES, METHODS, RECIPES, VARIANTS
from fastalps.environment import usable_cores
from fastalps.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality"
FIGURES = {
    "mnist": "figure-2-mnist.png",
    "fashion-mnist": "figure-3-fashion-mnist.png",
    "ucsd-ped2": "figure-4-ucsd-ped2.png",
}
AnyCell = cells.Cell | video.VideoCell
TABLE_METHODS = {1: ("alps", "fast", *BASELINES), 3: ("none", "noise", "alps")}


def _parser() -> Parser:
    parser = Parser(
        prog="bench/paper.py",
        description=__doc__,
    )
    parser.add_argument(
        "--table",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="of the paper: 1 images, 2 UCSD Ped2, 3 ablation (default: 1)",
    )
    parser.add_argument(
        "--dataset", choices=tuple(RECIPES), default="mnist", help="of tables 1 and 3"
    )
    parser.add_argument(
        "--protocol",
        choices=cells.PROTOCOLS,
        default="paper",
        help="whose figures to print; both are computed (default: paper; table 2: strict alone)",
    )
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        default=list(range(cells.CLASSES)),
        metavar="K",
        help="normal classes, 0 to 9 (default: all)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="train with the seeds 0 to N - 1 (default: 3)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: the table's)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="cells side by side, a thread each (default: as many as cores)",
    )
    parser.add_argument(
        "--stack",
        action=argparse.BooleanOptionalAction,
        help="train all classes of a seed and method together, one such stack at a time; of tables "
        "1 and 3 (default: where there is a CUDA device, which then trains)",
    )
    parser.add_argument(
        "--print-only", action="store_true", help="print the table of finished cells, run none"
    )
    parser.add_argument(
        "--summary",
        action="store_true",
        help="of tables 1 and 3, print the main figures of finished cells under both protocols: "
        "ALPS by class, the means of every method; run none",
    )
    parser.add_argument("--quick", action="store_true", help="two epochs; the figures mean nothing")
    parser.add_argument(
        "--root",
        type=Path,
        default=DATA,
        metavar="DIR",
        help=HELP,
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="gets a JSON file a cell and protocol, and figures (default: bench/results/quality)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "runs" / "quality",
        metavar="DIR",
        help="gets checkpoints, scores.csv and pictures of each cell (default: runs/quality)",
    )
    # What the program calls itself with, one process a cell or stack of them.
    parser.add_argument(
        "--cell", nargs=3, metavar=("CLASS,...", "SEED", "METHOD"), help=argparse.SUPPRESS
    )
    return parser


def _run_cells(options: argparse.Namespace, wanted: Sequence[AnyCell]) -> list[str]:
    """Runs the cells, `jobs` processes at a time; returns the failures."""
    missing = [cell for cell in wanted if not cell.done(options.results)]
    waiting, left, failures = _groups(options, missing), len(missing), []
    running: dict[subprocess.Popen[bytes], list[AnyCell]] = {}
    print(f"{len(wanted) - left} of {len(wanted)} cells are there; {left} to run", flush=True)
    try:
        while waiting or running:
            while len(running) < options.jobs and (ready := _ready(options, waiting, running)):
                waiting.remove(ready)
                running[_start(options, ready)] = ready
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                for cell in running.pop(process):
                    left -= 1
                    if process.returncode:
                        failures.append(cell.name)
                    record = cells.read(cell, options.results, options.protocol)
                    told = tables.summary(record) if record else "failed"
                    print(f"{cell.name}: {told} ({left} of {len(missing)} left)", flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failures


def _stacks(options: argparse.Namespace, cell: AnyCell) -> bool:
    """Whether the cell is trained in a stack."""
    return options.stack and isinstance(cell, cells.Cell) and cell.method in VARIANTS


def _groups(options: argparse.Namespace, missing: Sequence[AnyCell]) -> list[list[AnyCell]]:
    """The cells of a process each: those of a stack, or one; in order."""

    def key(cell: AnyCell) -> object:
        return (cell.seed, cell.method) if _stacks(options, cell) else cell

    return [list(group) for _, group in groupby(missing, key)]


def _ready(
    options: argparse.Namespace,
    waiting: Sequence[list[AnyCell]],
    running: dict[subprocess.Popen[bytes], list[AnyCell]],
) -> list[AnyCell] | None:
    """The first group that may begin: a stack fills the device, so another one waits."""
    busy = any(_stacks(options, group[0]) for group in running.values())
    return next((g for g in waiting if not (busy and _stacks(options, g[0]))), None)


def _start(options: argparse.Namespace, group: Sequence[AnyCell]) -> subprocess.Popen[bytes]:
    first = group[0]
    told = first.arguments if isinstance(first, video.VideoCell) else cells.arguments(group)
    command = [sys.executable, str(Path(__file__).resolve()), *told]
    for name in ("root", "results", "scratch"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--stack"] if _stacks(options, first) else []
    return subprocess.Popen(command + (["--quick"] if options.quick else []))


def _run(options: argparse.Namespace) -> int:
    if options.cell:
        # Small networks: two cells on a core each beat one cell on two.
        torch.set_num_threads(1)
        what, seed, method = options.cell[0], int(options.cell[1]), options.cell[2]
        folders = (options.root, options.results, options.scratch, options.quick)
        if options.table == 2:
            video.run(video.VideoCell(what, seed), *folders)
        else:
            group = [cells.Cell(options.dataset, int(c), seed, method) for c in what.split(",")]
            cells.run(group, *folders, stacked=bool(options.stack))
        return 0
    for value in options.classes:
        if not 0 <= value < cells.CLASSES:
            raise UserError(f"--classes: expected 0 to {cells.CLASSES - 1}, got {value}")
    if options.seeds < 1 or options.jobs < 1:
        raise UserError("--seeds and --jobs: expected numbers from 1 up")
    if options.stack and options.table == 2:
        raise UserError("--stack: table 2 has models of two shapes; leave it out")
    if options.stack is None:
        options.stack = torch.cuda.is_available()
    seeds = range(options.seeds)
    if options.summary and options.table == 2:
        raise UserError("--summary: of tables 1 and 3; leave it out")
    if options.table == 2:
        options.protocol = video.PROTOCOL
        pairs = [video.VideoCell(v, seed) for seed in seeds for v in video.VARIANTS]
        failures = [] if options.print_only else _run_cells(options, pairs)
        print("\nUCSD Ped2, no anomaly seen before test, AUROC / EER in %\n")
        print("\n".join(tables.video_table(seeds, options.results)))
        _draw(options, [video.VideoCell(v, 0) for v in video.VARIANTS], video.VARIANTS)
        return 1 if failures else 0
    if options.summary:
        print(f"{options.dataset}, AUROC in %, ± standard deviation over seeds\n")
        found = tables.summary_table(options.dataset, options.classes, seeds, options.results)
        print("\n".join(found))
        return 0
    methods = tuple(options.methods or TABLE_METHODS[options.table])
    wanted = [
        cells.Cell(options.dataset, c, seed, method)
        # A whole seed first: a table with one seed everywhere beats one with three somewhere.
        for seed in seeds
        for method in methods
        for c in options.classes
    ]
    failures = [] if options.print_only else _run_cells(options, wanted)
    print(f"\n{options.dataset}, protocol {options.protocol}, AUROC in %\n")
    print(
        "\n".join(
            tables.table(
                options.dataset, options.protocol, methods, options.classes, seeds, options.results
            )
        )
    )
    if "alps" in methods:
        cells_shown = [cells.Cell(options.dataset, c, 0) for c in options.classes]
        _draw(options, cells_shown, [str(c) for c in options.classes])
    return 1 if failures else 0


def _draw(options: argparse.Namespace, shown: Sequence[AnyCell], names: Sequence[str]) -> None:
    """The paper's figure of this data set, from the examples that seed 0 left in the scratch."""
    path = options.results / FIGURES[shown[0].dataset]
    folders = [options.scratch / cell.name for cell in shown]
    missing = pictures.figure(path, folders, names, shown[0].dataset)
    if len(missing) < len(shown):
        left = f"; without {', '.join(missing)}" if missing else ""
        print(f"\n{path}{left}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options), "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
