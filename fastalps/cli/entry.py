"""The commands' entry points: what they need is imported in here, since Ctrl-C may come by then."""

from __future__ import annotations

import importlib
import sys

from fastalps.errors import UserError

# As shells count it: 128 plus the number of the signal.
INTERRUPTED = 130
USAGE_ERROR = 2


def _run(name: str) -> int:
    try:
        # torch alone takes seconds.
        main = importlib.import_module(f"fastalps.cli.{name}").main
    except KeyboardInterrupt:
        print(f"fastalps-{name}: stopped", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        # A variable of the environment that is read as the ops are defined.
        print(f"fastalps-{name}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return int(main())


def train() -> int:
    """`fastalps-train`."""
    return _run("train")


def score() -> int:
    """`fastalps-score`."""
    return _run("score")


def export() -> int:
    """`fastalps-export`."""
    return _run("export")
