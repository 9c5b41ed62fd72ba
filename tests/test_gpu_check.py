"""`make gpu-check`: one clear line without a GPU; its bookkeeping, on made-up steps."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu_check
from tests import ROOT

SCRIPT = ROOT / "bench" / "gpu_check.py"
REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_kernels" name="test_values[native-cuda]"/>
<testcase classname="tests.test_kernels" name="test_gradients"><failure message="off"/></testcase>
<testcase classname="tests.test_broken" name=""><error message="collection"/></testcase>
<testcase classname="tests.test_kernels" name="test_huge"><skipped message="memory"/></testcase>
</testsuite></testsuites>"""


def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu-check: ") and torch.__version__ in done.stderr


class _FakeExecute:
    """Gives each program its exit code; writes what the real one would."""

    def __init__(self, codes: dict[str, int | None]) -> None:
        self.codes = codes
        self.commands: dict[str, list[str]] = {}
        self.variables: dict[str, dict[str, str]] = {}

    def __call__(self, command: list[str], limit: float, log: Path, **variables: str) -> Any:
        script = next(name for name in self.codes if any(part.endswith(name) for part in command))
        self.commands[script], self.variables[script] = command, variables
        log.write_text("all of it\nlast line\n", encoding="utf-8")
        for part in command:
            if part.startswith("--junitxml="):
                Path(part.partition("=")[2]).write_text(REPORT, encoding="utf-8")
        if "--out" in command:
            out = Path(command[command.index("--out") + 1])
            out.write_text(json.dumps({"of": script}), encoding="utf-8")
        return {"code": self.codes[script], "seconds": 0.1, "log": ["last line"]}


def _fake_machine(
    monkeypatch: pytest.MonkeyPatch, codes: dict[str, int | None], tools: tuple[str, ...] = ()
) -> _FakeExecute:
    device = SimpleNamespace(get_device_name=lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_check, "require_gpu", lambda: SimpleNamespace(cuda=device))
    monkeypatch.setattr(
        gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}" if name in tools else None
    )
    every = {"setup.py": 0, "pytest": 0, "fused_profile.py": 0, "bench/run.py": 0, "fastalps": 0}
    execute = _FakeExecute({**every, **codes})
    monkeypatch.setattr(gpu_check, "execute", execute)
    return execute


def _options(folder: Path, **others: Any) -> Namespace:
    return Namespace(**{"limit": 1.0, "out": folder, "quick": False, "data": None, **others})


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", [0, 1])
def test_writes_what_it_found(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_machine(monkeypatch, {"pytest": code})
    assert gpu_check.main(["--out", str(tmp_path)]) == code
    record = _record(tmp_path)
    assert record["metrics"] == {"tests_passed": 1, "tests_failed": 2, "bench_passed": True}
    assert record["tests"]["failed"] == [
        "tests.test_kernels::test_gradients",
        "tests.test_broken::",
    ]
    assert record["tests"]["skipped"] == {"memory": 1}
    assert record["bench"]["result"] == {"of": "bench/run.py"}
    assert record["profile"]["result"] == {"of": "fused_profile.py"}
    assert record["build"]["log"] == record["backends"] == ["last line"]
    assert record["steps"] == list(gpu_check.STEPS)
    assert record["sanitizer"]["skipped"].startswith("compute-sanitizer was not found")
    assert record["environment"]["libraries"]["torch"] == torch.__version__ and record["date"]
    logs = ["bench.log", "build.log", "profile.log", "tests.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*logs, "gpu_check.json"])
    assert (tmp_path / "bench.log").read_text(encoding="utf-8").startswith("all of it")


def test_only_the_steps_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = _fake_machine(monkeypatch, {})
    assert gpu_check.main(["--out", str(tmp_path), "--steps", "bench", "profile", "--quick"]) == 0
    record = _record(tmp_path)
    assert record["steps"] == ["profile", "bench"] and not record.keys() & {"build", "tests"}
    assert record["metrics"] == {"bench_passed": True}
    assert list(execute.commands) == ["fused_profile.py", "fastalps", "bench/run.py"]
    assert "--quick" in execute.commands["bench/run.py"]
    assert "--ncu" not in execute.commands["fused_profile.py"]


def test_unknown_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--steps", "bake"])
    assert stopped.value.code == 2 and "invalid choice: 'bake'" in capsys.readouterr().err


def test_a_check_that_is_stopped_leaves_what_it_found(tmp_path: Path, monkeypatch) -> None:
    _fake_machine(monkeypatch, {})

    def stop(options: Namespace) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_check.STEPS, "profile", stop)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--out", str(tmp_path)])
    record = _record(tmp_path)
    assert record["build"]["code"] == 0 and record["tests"]["passed"] == 1
    assert "profile" not in record and "profile" in record["steps"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"setup.py": 1}, 1),
        ({"fused_profile.py": 1}, 1),
        ({"fused_profile.py": 2}, 0),  # skipped
        ({"bench/run.py": 1}, 1),
        ({"bench/run.py": None}, 1),
    ],
)
def test_exit_code(codes: dict[str, int | None], expected: int, tmp_path, monkeypatch) -> None:
    _fake_machine(monkeypatch, codes)
    assert gpu_check.main(["--out", str(tmp_path)]) == expected


def test_tests_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = _fake_machine(monkeypatch, {})
    found = {"pytest", "xdist"}
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name in found or None)
    step = gpu_check.test(_options(tmp_path))
    command = execute.commands["pytest"]
    processes = command[command.index("-n") + 1]
    assert processes == str(gpu_check.TEST_PROCESSES) and "--durations=15" in command
    assert execute.variables["pytest"] == {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    assert step["passed"] == 1
    found.remove("xdist")
    gpu_check.test(_options(tmp_path))
    assert "-n" not in execute.commands["pytest"]


def test_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = _fake_machine(monkeypatch, {}, tools=("ncu",))
    assert gpu_check.profile(_options(tmp_path))["result"] == {"of": "fused_profile.py"}
    assert "--ncu" in execute.commands["fused_profile.py"]
    execute.codes["fused_profile.py"] = 2
    skipped = "the fused kernels were not profiled: last line"
    assert gpu_check.profile(_options(tmp_path)) == {"skipped": skipped}


def test_bench_past_its_limit_keeps_its_cases(tmp_path: Path, monkeypatch) -> None:
    execute = _fake_machine(monkeypatch, {"bench/run.py": None})
    step = gpu_check.bench(_options(tmp_path, data=Path("ped2")))
    assert step["code"] is None and step["result"] == {"of": "bench/run.py"}
    command = execute.commands["bench/run.py"]
    assert Path(command[command.index("--data") + 1]).is_absolute()


def test_missing_packages_are_said_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert "setuptools is not installed" in gpu_check.build(_options(tmp_path))["skipped"]
    assert "pytest is not installed" in gpu_check.test(_options(tmp_path))["skipped"]
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((9, 0), 9), ((0, 9), 9), ((None, 0), None)]
)
def test_sanitizer(codes, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both checks run over tests that exist; the first failure counts, a time-out ends it."""
    ran = []

    def execute(command: list[str], limit: float, log: Path):
        ran.append(command[command.index("--tool") + 1])
        return {"code": codes[len(ran) - 1], "seconds": 0.1, "log": []}

    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "execute", execute)
    assert gpu_check.sanitize(_options(tmp_path))["code"] == expected
    assert ran == list(gpu_check.SANITIZERS)[: 1 if codes[0] is None else 2]
    assert (gpu_check.ROOT / gpu_check.SANITIZED[0]).exists()


def test_a_step_past_its_limit_is_given_up(tmp_path: Path) -> None:
    program = "import os, time; print('begun', os.environ['MORE']); time.sleep(60)"
    log = tmp_path / "step.log"
    step = gpu_check.execute([sys.executable, "-c", program], 2.0, log, MORE="7")
    assert step["code"] is None and step["seconds"] < 30
    assert step["log"] == ["begun 7"] == log.read_text(encoding="utf-8").splitlines()


def test_slug() -> None:
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_check.slug("") == "unknown"
