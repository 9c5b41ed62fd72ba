"""The package as a user meets it: `python -m fastalps`, lazy imports, environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fastalps
from fastalps import backends


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_report_names_every_backend_and_why_it_is_off() -> None:
    done = run("-m", "fastalps")
    assert done.returncode == 0, done.stderr
    assert f"fastalps      {fastalps.__version__}" in done.stdout
    listed = done.stdout.split("Backends")[1].splitlines()
    for name, state in backends.report().items():
        line = next(line for line in listed if line.strip().startswith(name))
        assert (" on " if state.available else " off ") in line
        assert state.reason in line
        assert state.available or state.reason


def test_every_public_name_resolves() -> None:
    for name in dir(fastalps):
        assert getattr(fastalps, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        _ = fastalps.anything


def test_import_leaves_heavy_packages_alone() -> None:
    heavy = ("sklearn", "matplotlib", "triton", "scipy", "PIL", "jsonargparse", "torch._dynamo")
    code = (
        "import sys, torch; before = set(sys.modules); import fastalps; fastalps.ops; "
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FASTALPS_BACKEND", "cudnn", "FASTALPS_BACKEND: expected one of auto, reference, native"),
        ("FASTALPS_CPU", "sse9", "FASTALPS_CPU: expected one of default, avx2, avx512; got 'sse9'"),
    ],
)
def test_environment_variables_are_checked(variable, value, message) -> None:
    done = run("-c", "import fastalps.ops", **{variable: value})
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]
    commands = [("-m", "fastalps")]
    commands += [
        ("-c", f"from fastalps.cli import entry; exit(entry.{name}())")
        for name in ("train", "score", "export")
    ]
    for command in commands:
        done = run(*command, **{variable: value})
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert message in line


def test_portable_kernels_can_be_asked_for() -> None:
    if backends.cpu_kernels() == "none":
        pytest.skip("the C++ library was not built")
    code = "from fastalps import backends, ops; print(backends.cpu_kernels())"
    assert run("-c", code, FASTALPS_CPU="default").stdout.strip() == "default"


def test_without_the_compiled_library_everything_works(tmp_path) -> None:
    code = (
        "import pathlib, torch; from fastalps import backends;"
        "backends.library_path = lambda device: None;"
        "from fastalps import ops;"
        "x = torch.rand(3, 5); print(float((ops.per_sample_mse(x, 0 * x)"
        " - x.square().mean(1)).abs().max()) < 1e-6, backends.load_native('cpu').available)"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "True False", done.stderr
    assert "no native kernels on cpu" in done.stderr
