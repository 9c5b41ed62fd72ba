"""The benchmarks run end to end, and refuse to print a speed for a wrong result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases, run
from bench.harness import Candidate, Case, Settings, Work, relative_error
from tests import ROOT

pytestmark = pytest.mark.usefixtures("kept_threads")

SCRIPT = ROOT / "bench" / "run.py"


def _main(*arguments: str) -> int:
    return run.main(["--smoke", "--fresh-memory", *arguments])


def _case(*candidates: Candidate) -> Case:
    exact = torch.ones(3, dtype=torch.float64)
    work = Work(
        list(candidates),
        lambda _, result: relative_error(result, exact),
        amounts={"images": 3},
        region="nothing",
    )
    return Case("ops/made-up", "a made-up case", lambda settings: work)


def _right() -> Tensor:
    return torch.ones(3)


def _wrong() -> Tensor:
    return torch.ones(3) + 1e-3


def _use(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setattr(cases, "load", lambda groups, settings: [case])


def test_script_runs_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "ops", "--smoke", "--filter", "paired_mse/"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stdout and "ratio" in done.stdout
    record = json.loads(out.read_text())
    assert record["protocol"] == "benchmark" and record["effort"] == "smoke"
    assert {"commit", "date", "environment", "threads", "seed", "peers"} <= record.keys()
    for case in record["metrics"].values():
        assert case["ok"] and case["region"] and case["amounts"]["bytes"] > 0
        ours = case["candidates"]["fastalps"]
        assert ours["error"] <= ours["tolerance"] and ours["dtype"]
        assert ours["seconds"]["p10"] <= ours["seconds"]["median"] <= ours["seconds"]["p90"]
        assert case["candidates"]["eager"]["ratio"]["median"] > 0


@pytest.mark.parametrize("op", ["tile_patches", "sigmoid_mse-", "perturb_", "fold_", "active_"])
def test_every_kind_of_op_case_is_right(op: str) -> None:
    assert _main("ops", "--filter", f"ops/{op}") == 0


def test_scoring_case_names_data_and_absent_peers(tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    options = ("--data", str(tmp_path / "none"), "--out", str(out), "--filter", "gated")
    assert _main("scoring", *options) == 0
    (case,) = json.loads(out.read_text())["metrics"].values()
    assert "random textured frames" in case["details"]["data"]
    assert 0 < case["amounts"]["scored_patches"] < case["amounts"]["patches"]
    assert case["amounts"]["flop"] > 0
    peer = case["candidates"]["compile fp32"]
    assert peer["absent"] and "seconds" not in peer
    assert f"absent: {peer['absent']}" in capsys.readouterr().out


def test_training_case(capsys) -> None:
    assert _main("training", "--filter", "distorter") == 0
    assert "images/s" in capsys.readouterr().out


def test_wrong_result_prints_no_speed_and_exits_1(monkeypatch, capsys, tmp_path: Path) -> None:
    ours = Candidate("fastalps", _wrong, 1e-6, ours=True)
    _use(monkeypatch, _case(ours, Candidate("eager", _right, 1e-6)))
    assert _main("--out", str(tmp_path / "result.json")) == 1
    output = capsys.readouterr()
    assert "FAILED: error 5.0e-04 against float64 exceeds 1e-06" in output.out
    assert "images/s" not in output.out and "ops/made-up" in output.err
    record = json.loads((tmp_path / "result.json").read_text())["metrics"]["ops/made-up"]
    assert not record["ok"] and "seconds" not in json.dumps(record)


@pytest.mark.parametrize("value", [torch.full((3,), torch.nan), torch.ones(2)])
def test_nan_and_wrong_shape_fail(monkeypatch, capsys, value: Tensor) -> None:
    _use(monkeypatch, _case(Candidate("fastalps", lambda: value, 1e-2, ours=True)))
    assert _main() == 1
    assert "images/s" not in capsys.readouterr().out


def test_wrong_or_broken_peer_has_no_speed_but_ours_has(monkeypatch, capsys) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such kernel")

    ours = Candidate("fastalps", _right, 1e-6, ours=True)
    peers = Candidate("wrong", _wrong, 1e-6), Candidate("broken", broken, 1e-6)
    _use(monkeypatch, _case(ours, *peers))
    assert _main() == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line for line in lines if line.startswith("  ") and line.strip()}
    assert "images/s" in by_name["fastalps"]
    assert "FAILED" in by_name["wrong"] and "images/s" not in by_name["wrong"]
    assert "absent: RuntimeError: no such kernel" in by_name["broken"]


def test_compare_prints_ratios(monkeypatch, capsys, tmp_path: Path) -> None:
    _use(monkeypatch, _case(Candidate("fastalps", _right, 1e-6, ours=True)))
    old = tmp_path / "old.json"
    assert _main("--out", str(old)) == 0
    record = json.loads(old.read_text())
    record["metrics"]["ops/made-up"]["candidates"]["fastalps"]["seconds"]["median"] = 1e6
    old.write_text(json.dumps(record))
    capsys.readouterr()
    assert _main("--compare", str(old)) == 0
    table = capsys.readouterr().out.split("new / old")[1]
    line = next(line for line in table.splitlines() if line.startswith("ops/made-up fastalps"))
    assert line.split()[-1] == "0.00x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["opps"], "group: expected one of ops, scoring, training, memory; got 'opps'"),
        (["--threads", "0"], "--threads: expected a number from 1 up, got 0"),
        (["--threads", "many"], "invalid int value: 'many'"),
        (["--filter", "nothing like it"], "no case has 'nothing like it' in its name"),
        (["--compare", "/nowhere/old.json"], "--compare: cannot read /nowhere/old.json"),
        (["--out", "/nowhere/new.json"], "--out: no folder /nowhere"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--quick"], "not allowed with"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(arguments, message, capsys) -> None:
    try:
        code = _main(*arguments)
    except SystemExit as stopped:  # argparse leaves this way
        code = stopped.code
    assert code == 2
    output = capsys.readouterr()
    assert message in output.err and len(output.err.strip().splitlines()) == 1


def test_device_that_is_not_there(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert _main("ops", "--device", "cuda") == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_file_that_is_no_result_is_refused(tmp_path: Path, capsys) -> None:
    for text in ("{", "[]", '{"protocol": "strict"}'):
        path = tmp_path / "old.json"
        path.write_text(text)
        assert _main("--compare", str(path)) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_list_names_cases_without_running(capsys) -> None:
    assert _main("--list") == 0
    listed = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in listed]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == set(cases.GROUPS)


@pytest.mark.parametrize("effort", ["quick", "full"])
def test_names_are_unique_at_every_effort(effort: str) -> None:
    names = [case.name for case in cases.load(cases.GROUPS, Settings(effort))]
    assert len(names) == len(set(names))


def test_a_reader_that_leaves() -> None:
    """`... | head` of any of these programs ends it in silence."""
    program = (
        "from bench.command_line import guarded\n"
        "raise SystemExit(guarded(lambda: [print('x' * 100) for _ in range(9999)] and 0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"x" * 100 + b"\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 2
