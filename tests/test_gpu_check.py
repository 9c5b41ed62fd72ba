"""`make gpu-check`: one clear line without a GPU; its bookkeeping, on made-up steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_check

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_check.py"
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


def _fake_execute(codes: dict[str, int]):
    def execute(command: list[str], limit: float):
        script = next(name for name in codes if any(name in part for part in command))
        for part in command:
            if part.startswith("--junitxml="):
                Path(part.partition("=")[2]).write_text(REPORT, encoding="utf-8")
        if "--out" in command:
            out = Path(command[command.index("--out") + 1])
            out.write_text('{"protocol": "benchmark"}', encoding="utf-8")
        return {"code": codes[script], "seconds": 0.1, "log": ["last line"], "output": "all of it"}

    return execute


@pytest.mark.parametrize("code", [0, 1])
def test_writes_what_it_found(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(get_device_name=lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu_check, "require_gpu", lambda: SimpleNamespace(cuda=device))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    codes = {"setup.py": 0, "fastalps": 0, "pytest": code, "bench/run.py": 0}
    monkeypatch.setattr(gpu_check, "execute", _fake_execute(codes))
    assert gpu_check.main(["--out", str(tmp_path)]) == code
    record = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert record["metrics"] == {"tests_passed": 1, "tests_failed": 2, "bench_passed": True}
    assert record["tests"]["failed"] == [
        "tests.test_kernels::test_gradients",
        "tests.test_broken::",
    ]
    assert record["tests"]["skipped"] == {"memory": 1}
    assert record["bench"]["result"] == {"protocol": "benchmark"}
    assert record["build"]["log"] == ["last line"]
    assert record["sanitizer"]["skipped"].startswith("compute-sanitizer was not found")
    assert record["environment"]["libraries"]["torch"] == torch.__version__ and record["date"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]


def test_missing_packages_are_said_and_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert "setuptools is not installed" in gpu_check.build(1.0)["skipped"]
    assert "pytest is not installed" in gpu_check.test(1.0)["skipped"]
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((9, 0), 9), ((0, 9), 9), ((None, 0), None)]
)
def test_sanitizer(codes, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both checks run over tests that exist; the first failure counts, a time-out ends it."""
    ran = []

    def execute(command: list[str], limit: float):
        ran.append(command[command.index("--tool") + 1])
        return {"code": codes[len(ran) - 1], "seconds": 0.1, "log": [], "output": ""}

    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check, "execute", execute)
    assert gpu_check.sanitize(1.0)["code"] == expected
    assert ran == list(gpu_check.SANITIZERS)[: 1 if codes[0] is None else 2]
    assert (gpu_check.ROOT / gpu_check.SANITIZED[0]).exists()


def test_a_step_past_its_limit_is_given_up() -> None:
    step = gpu_check.execute(
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2.0
    )
    assert step["code"] is None and step["seconds"] < 30
    assert step["log"] == ["begun"]


def test_slug() -> None:
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_check.slug("") == "unknown"
