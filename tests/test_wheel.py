"""What `make wheel` built: its files, and how it works where nothing but it was installed.

FASTALPS_DIST names the folder of sdist and wheel; without it, these tests skip, as a build takes a
minute. torch is not installed once more: the environment of this Python version sees the packages
of the one that runs the tests (but not its fastalps), that of another version those of an
interpreter that has torch. `make wheel-check` installs everything.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastalps

SCRIPT = Path(__file__).with_name("installed_package.py")
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
VERSIONS = ("3.10", "3.13")


def built(pattern: str) -> Path:
    """The one file of FASTALPS_DIST that fits the pattern."""
    folder = os.environ.get("FASTALPS_DIST")
    if not folder:
        pytest.skip("FASTALPS_DIST is not set (make wheel; FASTALPS_DIST=dist make test)")
    found = list(Path(folder).resolve().glob(pattern))
    assert len(found) == 1, f"expected one {pattern} in {folder}, found {found}"
    return found[0]


def interpreter(version: str) -> str:
    """A Python of that version; skips the test where there is none."""
    if version == OWN:
        return sys.executable
    versions = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python{version}"))
    for path in (shutil.which(f"python{version}"), *versions):
        # A shim is there even where the version that it stands for is not.
        if (
            path
            and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            return path
    pytest.skip(f"no Python {version} on this machine")


def environment(folder: Path, python: str) -> str:
    """An environment with the wheel in it and nothing else; returns its interpreter."""
    run([python, "-m", "venv", "--without-pip", str(folder)])
    binaries, suffix = ("Scripts", ".exe") if sys.platform == "win32" else ("bin", "")
    inside = str(folder / binaries / f"python{suffix}")
    pip = [sys.executable, "-m", "pip", "--python", inside, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(built("*.whl"))])
    return inside


def run(command: list[str], cwd: Path | None = None) -> str:
    """Standard output of a command that must not fail."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean, cwd=cwd, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_files_of_the_wheel() -> None:
    wheel = built("*.whl")
    assert wheel.name.startswith(f"fastalps-{fastalps.__version__}-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read(next(n for n in names if n.endswith("top_level.txt"))) == b"fastalps\n"
    assert {name.split("/")[0] for name in names} == {
        "fastalps",
        f"fastalps-{fastalps.__version__}.dist-info",
    }
    assert any(name.startswith("fastalps/lib/fastalps_cpu.") for name in names)
    assert not [name for name in names if "libtorch" in name or "libc10" in name]
    for name in ("csrc/cpu/vec.h", "csrc/cuda/device.h", "kernels/launch.py", "py.typed"):
        assert f"fastalps/{name}" in names


def test_files_of_the_sdist() -> None:
    with tarfile.open(built("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "csrc/bindings.cpp",
        "kernels/launch.py",
        "tests/test_wheel.py",
        "docs/performance.md",
        "bench/run.py",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
    ):
        assert name in names
    unwanted = ("bench/results/", "fastalps/lib/", "data/", "runs/", "build/")
    assert not [n for n in names if n.startswith(unwanted) or n.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("version", dict.fromkeys((OWN, *VERSIONS)))
def test_scores_where_nothing_but_the_wheel_is(tmp_path, version) -> None:
    built("*.whl")
    python = interpreter(version)
    code = "import sysconfig, torch; print(sysconfig.get_paths()['platlib'])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{python} has no torch (make wheel-check installs one)")
    inside = environment(tmp_path / "env", python)
    home = run([inside, "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])"])
    # A line of a .pth file is a folder to import from; .pth files in that folder are not read, so
    # that a fastalps installed in place is not seen.
    (Path(home.strip()) / "dependencies.pth").write_text(done.stdout, encoding="utf-8")
    assert "native (cpu) on" in run([inside, str(SCRIPT)], tmp_path)


@pytest.mark.parametrize("version", [v for v in VERSIONS if v != OWN])
def test_other_pythons_take_the_wheel(tmp_path, version) -> None:
    built("*.whl")
    inside = environment(tmp_path / "env", interpreter(version))
    package = Path(
        run([inside, "-c", "import fastalps; print(fastalps.__file__)"], tmp_path).strip()
    )
    assert package.is_relative_to(tmp_path)
    run([inside, "-m", "compileall", "-q", str(package.parent)])
    for command in ("train", "score", "export"):
        assert list(Path(inside).parent.glob(f"fastalps-{command}*"))
