"""What a compiled kernel uses, and the limits that it has to keep: bench/compile_limits.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LIMITS: dict[str, dict[str, dict[str, int]]] = json.loads(
    Path(__file__).with_name("compile_limits.json").read_text(encoding="utf-8")
)["limits"]


class Row(NamedTuple):
    """One line of the report: a kernel on an architecture, the most of its specialisations."""

    source: str  # "cuda" or "triton"
    kernel: str
    architecture: str
    variant: str
    count: int  # of specialisations
    registers: int  # of a thread
    spills: int  # bytes
    stack: int  # bytes
    shared: int  # bytes a block, static and dynamic


def limits_of(source: str, kernel: str, architecture: str) -> dict[str, int]:
    """Registers, shared memory and spills that a kernel may use there: an architecture may have a
    limit of its own."""
    limit = LIMITS[source][kernel]
    return {
        key: limit.get(f"{key} {architecture}", limit.get(key, 0))
        for key in ("registers", "shared", "spills")
    }


def violations(rows: Iterable[Row]) -> Iterator[str]:
    """A line for each limit that is exceeded."""
    for row in rows:
        name = f"{row.source} {row.kernel} on {row.architecture} {row.variant}".rstrip()
        if row.kernel not in LIMITS[row.source]:
            yield f"{name}: bench/compile_limits.json has no limit for it"
            continue
        # A double takes two registers, and twice the bytes.
        double = 2 if "float64" in row.variant or "fp64" in row.variant else 1
        most = limits_of(row.source, row.kernel, row.architecture)
        for what, found, limited in (
            ("registers", row.registers, most["registers"] * double),
            ("bytes of shared memory", row.shared, most["shared"] * double),
            ("bytes of spills", row.spills, most["spills"]),
            ("bytes of stack", row.stack, most["spills"]),
        ):
            if found > limited:
                yield f"{name}: {found} {what}, the limit is {limited}"


def missing(rows: Iterable[Row], source: str, architectures: Iterable[str]) -> Iterator[str]:
    """A line for each kernel with a limit that was not compiled for an architecture."""
    found = {(row.kernel, row.architecture) for row in rows if row.source == source}
    for kernel in LIMITS[source]:
        for architecture in architectures:
            if (kernel, architecture) not in found:
                yield f"{source} {kernel} was not compiled for {architecture}"
