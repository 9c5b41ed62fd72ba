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
    CannotCompile,
    build_library,
    cuda_rows,
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
        "--log", type=Path, help="ptxas's log of an earlier build of the CUDA library, to read"
    )
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows, wrong = collect(arguments.only, arguments.log, Path(folder))
    except CannotCompile as reason:
        print(f"compile_report: {reason}", file=sys.stderr)
        return 2
    wrong += violations(rows)
    print("\n".join(table(rows)))
    if arguments.json:
        record = {"rows": [row._asdict() for row in rows], "violations": wrong}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
