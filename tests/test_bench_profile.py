"""`bench/fused_profile.py` without a GPU: one clear line; what it reads from ncu's tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import fused_profile
from fastalps.errors import UserError
from tests import ROOT

SCRIPT = ROOT / "bench" / "fused_profile.py"
# Cut down from the tables of ncu 2025: messages, names, units, launches.
TABLE = """==PROF== Connected to process 7
==PROF== Profiling "fused_encode_kernel": 0%....100% - 9 passes
"ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed_pipe_tensor.sum","lts__t_bytes.sum"
"","","us","inst","Mbyte"
"0","void fused_encode_kernel<Shape<3>>(Work, const uint2 *)","12.50","1,234,567","3.5"
"1","void fused_decode_kernel<Shape<3>>(Work, const uint2 *)","40","n/a","nan"
"2","void fused_other_kernel()","1","2","3"
"""
PARSED = {
    "E": {"ns": 12500.0, "tensor instructions": 1234567.0, "L2 bytes": 3.5e6},
    "D": {"ns": 40000.0},
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch finds no CUDA device here"),
        (["--frames", "0"], "--frames: expected a number from 1 up, got '0'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and message in done.stderr


def test_parses_ncus_table() -> None:
    assert fused_profile.parse_counters(TABLE) == PARSED
    assert fused_profile.parse_counters("") == {}


def test_units() -> None:
    for unit, factor in (("byte", 1), ("Kbyte", 1e3), ("Gbyte", 1e9), ("ns", 1), ("ms", 1e6)):
        assert fused_profile._scale(unit) == factor
    assert fused_profile._scale("%") == fused_profile._scale("Minst") == 1


def _fake_run(done: SimpleNamespace, commands: list[list[str]]):
    def run(command: list[str], **options):
        assert options["env"][fused_profile.ONLY] == "1"
        commands.append(command)
        return done

    return run


def test_counters_of_the_third_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    done = SimpleNamespace(returncode=0, stdout=TABLE, stderr="")
    monkeypatch.setattr(fused_profile.subprocess, "run", _fake_run(done, commands))
    assert fused_profile.counters("fast", 96, "ncu") == PARSED
    (command,) = commands
    assert command[command.index("--launch-skip") + 1] == "10"
    assert command[-4:] == ["--preset", "fast", "--chunk", "96"]


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (1, "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no right\n", "ERR_NVGPUCTRPERM"),
        (0, "==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        (1, "", "it said nothing"),
    ],
)
def test_ncu_that_fails(code: int, output: str, reason: str, monkeypatch) -> None:
    done = SimpleNamespace(returncode=code, stdout=output, stderr="")
    monkeypatch.setattr(fused_profile.subprocess, "run", _fake_run(done, []))
    with pytest.raises(UserError, match=f"ncu failed: .*{reason}|ncu failed: {reason}"):
        fused_profile.counters("fast", None, "ncu")


def test_times_are_kept_where_ncu_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    """Without a GPU: made-up times, and an ncu that may not read counters."""
    asked = []

    def counters(preset: str, chunk: int | None, ncu: str):
        asked.append(preset)
        raise UserError("ncu failed: no right")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_profile.shutil, "which", lambda name: "/usr/bin/ncu")
    monkeypatch.setattr(fused_profile, "_engine", lambda *_: SimpleNamespace(chunk=2112))
    monkeypatch.setattr(fused_profile, "_frames", lambda count: torch.zeros(count, 1, 1))
    times = {"E": 1.0, "whole call": 200.0}
    monkeypatch.setattr(fused_profile, "kernel_times", lambda *_: times)
    monkeypatch.setattr(fused_profile, "counters", counters)
    out = tmp_path / "profile.json"
    options = ["--preset", "fast", "--preset", "paper", "--ncu", "--out", str(out)]
    assert fused_profile.main(options) == 0
    assert asked == ["fast"]
    metrics = json.loads(out.read_text())["metrics"]
    assert [metrics[preset]["ns_a_patch"] for preset in ("fast", "paper")] == [times, times]
    assert metrics["fast"]["no_counters"] == "ncu failed: no right"
    output = capsys.readouterr().out
    assert "= 5.000 million patches/s" in output and "no counters: ncu failed" in output
    monkeypatch.setattr(fused_profile, "counters", lambda *_: PARSED)
    assert fused_profile.main(["--preset", "fast", "--ncu", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"]["fast"]["counters"] == PARSED
    assert "counters of E" in capsys.readouterr().out
    assert fused_profile.main(["--out", str(tmp_path / "none" / "profile.json")]) == 2
