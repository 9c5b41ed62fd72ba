"""`bench/instructions.py`: the program that it counts compiles, and computes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler is installed")
def test_counts_the_engine() -> None:
    command = [sys.executable, str(ROOT / "bench" / "instructions.py"), "--preset", "fast"]
    command += ["--candidates", "engine,engine-direct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if "objects or a compiler are missing" in done.stderr:
        pytest.skip("the library was not built in this checkout")
    assert done.returncode == 0, done.stderr
    counts = [float(line.split()[1]) for line in done.stdout.splitlines()]
    # Eight lanes: no fewer than the multiply-adds of preset fast, no more than ten times them.
    assert len(counts) == 2 and all(0.3 < count < 10 for count in counts)
