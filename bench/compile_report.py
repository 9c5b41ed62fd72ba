"""What every GPU kernel uses, found without a GPU: a table, checked against limits.

Compiles the CUDA library (nvcc, by setup.py's own functions) and the Triton kernels for sm_80,
sm_90 and sm_100 and prints registers of a thread, spilled bytes, and shared memory of a block, the
most of a kernel's specialisations. The limits are in bench/compile_limits.json.

Exit code: 0 when all keep their limits, 1 with a line for each that does not, 2 when a tool is
absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.compiled import Row, missing, violations  # noqa: E402
from bench.cuda_compile import (  # noqa: E402
    ARCHITECTURES,
    MIX,
    CannotCompile,
    build_library,
    cuda_rows,
    instruction_mix,
    kernel_name,
)

COLUMNS = (
    "source",
    "kernel",
    "architecture",
    "variant",
    "of",
    "registers",
    "spills",
    "stack",
    "shared",
)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows as a Markdown table."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else value for value in row)
        yield "| " + " | ".join(cells) + " |"


def mix_table(compiled: Path) -> Iterator[str]:
    """The fused kernels' instructions in a library or an object file, by opcode; of each kernel and
    architecture the specialisation that has most."""
    largest: dict[tuple[str, str], dict[str, int]] = {}
    for (symbol, architecture), counts in instruction_mix(compiled).items():
        key = (kernel_name(symbol), architecture)
        if key[0].startswith("fused_") and counts["all"] >= largest.get(key, counts)["all"]:
            largest[key] = counts
    yield "| kernel | architecture | all | " + " | ".join(MIX) + " |"
    yield "|" + "---|" * (3 + len(MIX))
    for key, counts in sorted(largest.items()):
        cells = [f"{counts.get(name, 0):,}" for name in ("all", *MIX)]
        yield "| " + " | ".join([*key, *cells]) + " |"


def collect(only: str | None, log: Path | None, folder: Path) -> tuple[list[Row], list[str]]:
    """The rows of what is asked for, and the kernels that are missing among them.

    Args:
        only: "cuda" or "triton"; None = both.
        log: of an earlier build of the CUDA library, read instead of building it again.
        folder: for what is built.

    Raises:
        CannotCompile: a tool is absent.
    """
    rows: list[Row] = []
    absent: list[str] = []
    if only != "triton":
        path = log or build_library(folder).with_suffix(".log")
        rows += cuda_rows(path.read_text(encoding="utf-8"), folder)
        absent += missing(rows, "cuda", ARCHITECTURES)
    if only != "cuda":
        if importlib.util.find_spec("triton") is None:
            raise CannotCompile("the package triton is not installed; use --only cuda")
        from bench.triton_compile import triton_rows

        rows += triton_rows(folder)
        absent += missing(rows, "triton", ARCHITECTURES)
    return rows, absent


def main(argv: list[str] | None = None) -> int:
    """Runs the report; see the module's text for the exit code."""
    parser = argparse.ArgumentParser(prog="compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cuda", "triton"), help="one kind of kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep the CUDA library and its log there"
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="read the log of an earlier build of the library"
    )
    parser.add_argument(
        "--mix",
        type=Path,
        metavar="FILE",
        help="also count the fused kernels' instructions in this library or object file",
    )
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            rows, wrong = collect(arguments.only, arguments.log, folder.resolve())
        mix = list(mix_table(arguments.mix)) if arguments.mix else []
    except CannotCompile as reason:
        print(f"compile_report: {reason}", file=sys.stderr)
        return 2
    wrong += violations(rows)
    print("\n".join([*table(rows), *([""] if mix else []), *mix]))
    if arguments.json:
        record = {"rows": [row._asdict() for row in rows], "violations": wrong}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
