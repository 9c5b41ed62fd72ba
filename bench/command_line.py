"""What the programs of bench/ do alike: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from fastalps.errors import UserError


class Parser(argparse.ArgumentParser):
    """Wrong arguments end in one line and exit code 2, without the usage."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see --help\n")


def guarded(run: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a program: its exit code, or 2 for a user's error, or 130 for Ctrl-C, told in a line."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
