"""What the programs of bench/ do alike: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from fastalps.errors import UserError
from fastalps.files import discard_output


class Parser(argparse.ArgumentParser):
    """Wrong arguments end in one line and exit code 2, without the usage; help keeps the lines of
    the description, a program's docstring."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see --help\n")


def guarded(run: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a program: its exit code, or 2 for a user's error, or 130 for Ctrl-C, told in a line; 2
    without a word where nobody reads its output any more."""
    try:
        code = run()
        sys.stdout.flush()  # Or it would fail at exit.
        return code
    except BrokenPipeError:
        discard_output()
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
