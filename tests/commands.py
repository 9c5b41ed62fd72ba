"""Commands as tests run them, and what they leave behind."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT


def run_in(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, or a module after `-m`, in several processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={processes}"]
    # Threads of several processes must not fight over the cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=environment, check=False
    )


def error_of(capsys) -> str:
    """The error on the screen: exactly one line."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
