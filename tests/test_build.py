"""setup.py refuses a library whose errors do not reach Python: tried on libraries that are linked
anew, with other flags, from the objects of the build. What architectures it compiles for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution

from bench.cuda_compile import build_module
from tests import ROOT

# What a compiler does that brings its own C++ runtime.
OWN_RUNTIME = ("-static-libstdc++", "-static-libgcc")
REFUSED = "instead of being raised: .* links a C\\+\\+ runtime that is not PyTorch's"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    if sys.platform != "linux":
        pytest.skip("the flags are those of compilers on Linux")
    return build_module()


@pytest.fixture(autouse=True)
def no_compiler_refused(build, monkeypatch) -> None:
    monkeypatch.setattr(build, "REFUSED", {})


def linked(build: ModuleType, folder: Path, flags: tuple[str, ...], device: str = "cpu") -> Path:
    """The library as setup.py links it, with further flags."""
    objects = sorted((ROOT / "build/native" / f"fastalps_{device}").glob("*.o"))
    if not any(file.name.startswith("bindings") for file in objects):
        pytest.skip(f"build/native has no objects of fastalps_{device} (setup.py build_ext)")
    options = build.shared_flags(build.torch_folders()[1], device)
    if device == "cuda":
        if (compiler := build.nvcc()) is None:
            pytest.skip("nvcc was not found: its toolkit has what the library is linked to")
        options += [f"-L{path}" for path in build.cuda_folders(compiler)[1]]
        options += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    library = folder / f"fastalps_{device}.so"
    command = [build.cxx(), *map(str, objects), *flags, *options, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"does not link here: {done.stderr.strip().splitlines()[-1]}")
    return library


@pytest.mark.parametrize("flags", [(), OWN_RUNTIME[1:]], ids=["usual", "libgcc"])
def test_errors_that_are_raised(build, tmp_path, flags) -> None:
    build.check_errors(linked(build, tmp_path, flags))


@pytest.mark.parametrize("flags", [OWN_RUNTIME, OWN_RUNTIME[:1]], ids=["dies", "loses text"])
def test_errors_that_are_not(build, tmp_path, flags) -> None:
    library = linked(build, tmp_path, flags)
    with pytest.raises(build.BuildFailure, match=REFUSED):
        build.check_errors(library)


def test_the_next_compiler_is_tried(build, tmp_path, monkeypatch) -> None:
    """One that comes first on the path and brings its own runtime, before the usual ones."""
    usual = build.cxx()
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {usual} "$@" {" ".join(OWN_RUNTIME)}\n', encoding="utf-8")
    wrapper.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert build.cxx() == str(wrapper)
    build.checked(lambda: linked(build, tmp_path, ()))
    assert list(build.REFUSED) == [str(wrapper)] and build.cxx() != str(wrapper)
    # What was chosen by name is not replaced.
    monkeypatch.setenv("CXX", str(wrapper))
    with pytest.raises(build.BuildFailure, match=REFUSED):
        build.checked(lambda: linked(build, tmp_path, ()))


def test_a_refused_library_leaves_a_working_package(build, tmp_path) -> None:
    package = tmp_path / "fastalps"
    shutil.copytree(ROOT / "fastalps", package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    (package / "lib/fastalps_cpu.so").touch()  # Of an earlier build.
    command = build.BuildNative(Distribution())

    def place(required: bool) -> None:
        name = "fastalps_cpu"
        command.place(package / "lib", name, lambda: linked(build, tmp_path, OWN_RUNTIME), required)

    place(required=False)
    assert [file.name for file in (package / "lib").iterdir()] == ["fastalps_cpu.why.txt"]
    (line,) = (package / "lib/fastalps_cpu.why.txt").read_text(encoding="utf-8").splitlines()
    done = subprocess.run(
        [sys.executable, "-m", "fastalps"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert f"no compiled library for cpu: {line}" in done.stdout
    with pytest.raises(SystemExit, match=REFUSED):
        place(required=True)


def test_cuda_library_without_a_device(build, tmp_path, monkeypatch) -> None:
    usual, own = tmp_path / "usual", tmp_path / "own"
    for folder, flags in ((usual, ()), (own, OWN_RUNTIME)):
        folder.mkdir()
        linked(build, folder, flags, "cuda")
    if torch.version.cuda is None:
        # Loads under no CPU build of torch, so nothing is said of it there; with the one symbol
        # that such a torch lacks, it does.
        build.check_errors(own / "fastalps_cuda.so")
        source, stand_in = tmp_path / "stream.c", tmp_path / "stream.so"
        source.write_text(
            "int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }\n",
            encoding="utf-8",
        )
        command = [build.cxx(), "-x", "c", "-shared", "-fPIC", str(source), "-o", str(stand_in)]
        subprocess.run(command, check=True)
        monkeypatch.setenv("LD_PRELOAD", str(stand_in))
    build.check_errors(usual / "fastalps_cuda.so")
    with pytest.raises(build.BuildFailure, match=REFUSED):
        build.check_errors(own / "fastalps_cuda.so")


def test_architectures(build, tmp_path, monkeypatch) -> None:
    """9.0 is compiled as 9.0a, for its own instructions; its PTX is for devices that come later."""
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    compiler.chmod(0o755)
    flag = "-gencode=arch=compute_"
    for wanted, found in (
        ("8.0", ["80,code=sm_80"]),
        ("9.0", ["90a,code=sm_90a"]),
        ("9.0a", ["90a,code=sm_90a"]),
        ("8.0;9.0+PTX", ["80,code=sm_80", "90a,code=sm_90a", "90,code=compute_90"]),
        ("", ["80,code=sm_80", "90a,code=sm_90a", "90,code=compute_90"]),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        assert build.architectures(str(compiler)) == [flag + each for each in found]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "hopper")
    with pytest.raises(build.BuildFailure, match=r"expected entries like 8\.0 or 9\.0"):
        build.architectures(str(compiler))
