"""Builds the compiled kernels: C++ always, CUDA where nvcc and a CUDA build of torch are found.

Environment:
    FASTALPS_CUDA         1: build the CUDA library whatever torch is installed, and fail if that
                          fails; 0: never; unset: build it where the installed torch was built with
                          CUDA and nvcc is found, and go on without it if that fails.
    TORCH_CUDA_ARCH_LIST  architectures, such as "8.0;9.0+PTX".
    CXX, CUDA_HOME        the C++ compiler, else the first that makes libraries whose errors reach
                          Python; the CUDA toolkit.
    FASTALPS_SANITIZE     sanitizers to build the C++ library with, such as "address,undefined"; for
                          `make sanitize`, which keeps that library apart.
    FASTALPS_EMULATE      1: a C++ library for tests, whose AVX-512, AVX-VNNI and AMX
                          instructions are functions (tests/emulation/avx512.h); for `make emulate`.

A library that could not be built leaves a text file beside its place that says why, and a working
package: `python -m fastalps` shows it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("FASTALPS_SANITIZE", "")
EMULATE = os.environ.get("FASTALPS_EMULATE") == "1"
KIND = "-".join([*SANITIZE.split(","), *["emulated"] * EMULATE]).strip("-")
BUILD = ROOT / "build" / (f"native-{KIND}" if KIND else "native")
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
X86 = platform.machine().lower() in ("x86_64", "amd64")

# The oldest torch that the libraries load under.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
AVX512 += ["-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"kernels_default": [], "kernels_avx2": ["-mavx2", "-mfma"]}
WIDE = {
    "kernels_avx512": AVX512,
    "engine_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "engine_avx512_vnni": [*AVX512, "-mavx512vnni"],
}
AVX_VNNI = {"engine_avx_vnni": ["-mavx2", "-mfma", "-mavxvnni"]}
AMX = {
    "engine_amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "engine_amx_int8": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
# For processors with AVX2, in the place of the wide instructions.
EMULATED = ["-mavx2", "-mfma", "-include", str(ROOT / "tests/emulation/avx512.h")]

# Makes a library raise an error; prints "tried", and then "passed" unless that error did not come
# whole. A library that does not load here may be for another machine: nothing is said against it.
RAISE_ERROR = """
import sys
import torch
path, key, end = sys.argv[1:]
library = torch.library.Library("fastalps", "DEF")
library.define("per_sample_mse(Tensor reconstruction, Tensor target) -> Tensor")
call = torch.ops.fastalps.per_sample_mse.default.redispatch
keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
print("tried", flush=True)
try:
    torch.ops.load_library(path)
    call(keys, torch.zeros(3), torch.zeros(2))
except OSError:
    print("passed")
except Exception as error:
    print("passed" if end in str(error) else "")
"""
# What that error says in the end (csrc/arguments.h, csrc/bindings_cuda.cpp), by library and key.
# CUDA kernels check their tensors before they need a device.
ERROR_ENDS = {
    "fastalps_cpu": ("CPU", "expected (S * N, ...) and (N, ...)"),
    "fastalps_cuda": ("CUDA", "expected every tensor on the same CUDA device"),
}


class BuildFailure(Exception):
    """A library cannot be built; the text says why in one line."""


# Compilers whose libraries `check_errors` refused, by their real paths, and what it said.
REFUSED: dict[str, BuildFailure] = {}


def compilers() -> list[str]:
    """Those that may build, the first choice first: $CXX alone where it is set and found."""
    # Microsoft's compiler lacks the vector types of the kernels; clang++ uses its libraries.
    names = ["clang++"] if sys.platform == "win32" else ["c++", "g++", "clang++"]
    # Those of the system, where others come before them on the path.
    names += [] if sys.platform == "win32" else [f"/usr/bin/{name}" for name in names]
    chosen = shutil.which(os.environ.get("CXX") or "")
    found = [chosen] if chosen else [path for name in names if (path := shutil.which(name))]
    return [path for path in found if os.path.realpath(path) not in REFUSED]


def cxx() -> str:
    if found := compilers():
        return found[0]
    if REFUSED:
        raise next(iter(REFUSED.values()))
    raise BuildFailure(
        f"no C++ compiler was found (install {'clang++' if sys.platform == 'win32' else 'g++'}, "
        "or set CXX)"
    )


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    for name in [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(name):
            return found
    return None


def cuda_folders(compiler: str) -> tuple[list[Path], list[Path]]:
    """(headers, libraries) of nvcc's toolkit, as nvcc itself names them: it may be a wrapper."""
    command = [compiler, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = [
        [
            Path(folder).resolve()
            for line in re.findall(names, said)
            for folder in re.findall(flag, line)
        ]
        for names, flag in (
            (r"#\$ (?:SYSTEM_)?INCLUDES=(.*)", r'"-I([^"]+)"'),
            (r"#\$ LIBRARIES=(.*)", r'"-L([^"]+)"'),
        )
    ]
    if not all(found):
        raise BuildFailure(f"{compiler} --dryrun does not name its toolkit's folders")
    return found[0], found[1]


def installed_torch():
    try:
        import torch
    except ImportError as error:
        raise BuildFailure(
            "torch is not installed in this environment (install it first)"
        ) from error
    return torch


def torch_folders() -> tuple[Path, Path]:
    """(headers, libraries) of the installed torch."""
    folder = Path(installed_torch().__file__).parent
    return folder / "include", folder / "lib"


def architectures(compiler: str) -> list[str]:
    """The -gencode flags for TORCH_CUDA_ARCH_LIST, or for every supported generation."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    newest = release is not None and tuple(map(int, release.groups())) >= (12, 8)
    default = "8.0;9.0;10.0+PTX" if newest else "8.0;9.0+PTX"
    flags = []
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or default):
        match = re.fullmatch(r"(\d+)\.(\d)([a-f]?)(\+PTX)?", entry)
        if match is None:
            raise BuildFailure(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0+PTX, got {entry!r}"
            )
        number = "".join(match.groups()[:3])
        # Every device of 9.0 has the instructions of 9.0a, by which the fused kernels multiply.
        own = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{own},code=sm_{own}")
        if match[4] is not None:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Plan:
    """A library as a list of compilations and one link, run by ninja."""

    def __init__(self, name: str) -> None:
        self.library = BUILD / (name + SUFFIX)
        self.objects: list[Path] = []
        self.lines = [
            f"builddir = {BUILD}",
            "rule command",
            "  command = $command",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        self.lines += ["rule link", "  command = $command"]

    def _edge(self, rule: str, output: Path, inputs: list[Path], command: list[str]) -> None:
        escaped = " ".join(str(path).replace(" ", "$ ").replace(":", "$:") for path in inputs)
        target = str(output).replace(" ", "$ ").replace(":", "$:")
        line = subprocess.list2cmdline(command).replace("$", "$$")
        self.lines += [f"build {target}: {rule} {escaped}", f"  command = {line}"]

    def compile(self, source: Path, command: list[str]) -> None:
        output = BUILD / self.library.stem / (source.name + ".o")
        depfile = ["-MD", "-MF", f"{output}.d"]
        self._edge(
            "command", output, [source], [*command, *depfile, "-c", str(source), "-o", str(output)]
        )
        self.objects.append(output)

    def run(self, link: list[str]) -> Path:
        """Compiles what has changed and links; without a command to link by, only compiles."""
        if link:
            # Objects first: --as-needed keeps only libraries that something before them needs.
            command = [link[0], *map(str, self.objects), *link[1:], "-o", str(self.library)]
            self._edge("link", self.library, self.objects, command)
        (BUILD / self.library.stem).mkdir(parents=True, exist_ok=True)
        script = BUILD / f"{self.library.stem}.ninja"
        script.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        ninja = shutil.which("ninja") or shutil.which(str(Path(sys.executable).parent / "ninja"))
        if ninja is None:
            raise BuildFailure("ninja was not found (pip install ninja)")
        done = subprocess.run(
            [ninja, "-f", str(script)], capture_output=True, text=True, check=False
        )
        self.library.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            wrong = re.search(r"^.*\berror\b.*$", done.stdout, re.MULTILINE)
            raise BuildFailure(f"the build failed: {wrong[0].strip() if wrong else 'see above'}")
        return self.library


def shared_flags(libraries: Path, device: str = "cpu") -> list[str]:
    if sys.platform == "darwin":
        return ["-dynamiclib", "-undefined", "dynamic_lookup", f"-L{libraries}", "-ltorch_cpu"]
    if sys.platform == "win32":
        # The builtins tell the processor's features.
        flags = ["-shared", f"-L{libraries}", "-ltorch_cpu", "-lc10", "-lclang_rt.builtins-x86_64"]
        return [*flags, "-Wl,-export:fastalps_cpu_capability"]
    flags = ["-shared", f"-L{libraries}"]
    if device == "cuda":
        # libtorch defines nothing, but needs libtorch_cuda where torch has CUDA: naming it binds
        # the CUDA symbols there even if the link was made against a CPU build.
        flags += ["-Wl,--no-as-needed", "-ltorch"]
        flags += ["-ltorch_cuda"] if (libraries / f"libtorch_cuda{SUFFIX}").exists() else []
    return [*flags, "-Wl,--as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def knows(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler has these flags: gcc 11 and clang 12 have those of AMX and AVX-VNNI."""
    command = [compiler, *flags, "-x", "c++", "-E", "-"]
    tried = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    return tried.returncode == 0


def build_cpu(needs_torch: bool = True) -> Path:
    """Builds the C++ library; without `needs_torch` only those of its objects that torch is not
    needed for, which are most."""
    compiler = cxx()
    common = [compiler, "-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    common += [] if sys.platform == "win32" else ["-fPIC"]
    common += ["-DFASTALPS_X86"] if X86 else []
    common += ["-DFASTALPS_EMULATED"] if EMULATE else []
    wide = WIDE if X86 else {}
    if X86 and knows(compiler, AVX_VNNI["engine_avx_vnni"]):
        wide = wide | AVX_VNNI
        common.append("-DFASTALPS_WITH_AVX_VNNI")
    # AMX is Linux's to grant (arch_prctl).
    if X86 and sys.platform == "linux" and knows(compiler, [*AMX["engine_amx_int8"], "-mamx-bf16"]):
        wide = wide | AMX
        common.append("-DFASTALPS_WITH_AMX")
    sanitize = []
    if SANITIZE:
        # torch is not built with run-time type information for its classes' checks (vptr).
        sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
        sanitize += ["-g", "-O1"]
    plan = Plan("fastalps_cpu")
    # The largest first: they take longer than all others on the remaining cores.
    for name, flags in INSTRUCTION_SETS.items():
        if X86 or not flags:
            plan.compile(ROOT / f"csrc/cpu/{name}.cpp", [*common, *sanitize, *flags])
    # Sanitizers would take minutes for code that most machines cannot run.
    quick = ["-O1"] if SANITIZE else []
    for name, flags in wide.items():
        chosen = EMULATED if EMULATE else flags
        plan.compile(ROOT / f"csrc/cpu/{name}.cpp", [*common, *quick, *chosen])
    for name in ("dispatch", "engine_plan"):
        plan.compile(ROOT / f"csrc/cpu/{name}.cpp", [*common, *sanitize])
    if not needs_torch:
        return plan.run([])
    headers, libraries = torch_folders()
    torch_flags = [TARGET, f"-isystem{headers}", "-Icsrc"]
    for name in ("bindings", "bindings_engine"):
        plan.compile(ROOT / f"csrc/{name}.cpp", [*common, *sanitize, *torch_flags])
    return plan.run([compiler, *sanitize, *shared_flags(libraries)])


def build_cuda(report: bool = False) -> Path:
    """Builds the CUDA library; with `report`, ptxas's account of registers is in the log."""
    compiler = nvcc()
    if compiler is None:
        raise BuildFailure("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")
    host, (headers, libraries) = cxx(), torch_folders()
    toolkit_headers, toolkit_libraries = cuda_folders(compiler)
    device = [compiler, "-ccbin", host, "-std=c++20", "-O3", "-lineinfo", "-Icsrc"]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *architectures(compiler)]
    device += ["-Xptxas", "-v"] if report else []
    plan = Plan("fastalps_cuda")
    # The largest first: it takes longer than all others on the remaining cores.
    sources = (ROOT / "csrc/cuda").glob("*.cu")
    largest = ("fused", "squared_error")
    for source in sorted(sources, key=lambda path: not path.name.startswith(largest)):
        plan.compile(source, device)
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-DUSE_CUDA", TARGET]
    include = [f"-isystem{folder}" for folder in (headers, *toolkit_headers)]
    for name in ("bindings_cuda", "bindings_fused"):
        plan.compile(ROOT / f"csrc/{name}.cpp", [host, *flags, *include, "-Icsrc"])
    runtime = [f"-L{folder}" for folder in toolkit_libraries]
    runtime += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return plan.run([host, *shared_flags(libraries, "cuda"), *runtime])


def check_errors(library: Path) -> None:
    """Refuses a library whose errors do not reach Python, though it loads and computes rightly: a
    second C++ runtime, linked into it, cannot unwind through PyTorch's. Takes a second or two."""
    if SANITIZE:  # Loads only where the sanitizers' runtime was loaded before Python.
        return
    command = [sys.executable, "-c", RAISE_ERROR, str(library), *ERROR_ENDS[library.stem]]
    # In the build folder, where a core file is in nobody's way.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",  # What a dying process prints may be no text.
        check=False,
        cwd=library.parent,
    )
    if "tried" in done.stdout and "passed" not in done.stdout:
        print(done.stderr, file=sys.stderr)
        raise BuildFailure(
            "errors of the library end the process, or lose their text, instead of being raised: "
            f"{cxx()} links a C++ runtime that is not PyTorch's (set CXX to the system's "
            "compiler, such as /usr/bin/g++)"
        )


def checked(build: Callable[[], Path]) -> Path:
    """A library that `check_errors` has nothing against, by the first compiler that makes one."""
    while True:
        try:
            built = build()
        except BuildFailure as failure:
            if REFUSED:
                raise next(iter(REFUSED.values())) from failure
            raise
        try:
            check_errors(built)
        except BuildFailure as refusal:
            REFUSED[os.path.realpath(cxx())] = refusal
        else:
            return built


def cuda_declined() -> str | None:
    """Why the CUDA library is not even tried, or None."""
    wish = os.environ.get("FASTALPS_CUDA", "")
    if wish == "0":
        return "it was built with FASTALPS_CUDA=0, as wheels are; build from source to have them"
    with contextlib.suppress(BuildFailure):  # Without torch, the build itself says so.
        if wish != "1" and installed_torch().version.cuda is None:
            return (
                "the installed torch is a CPU build, under which CUDA kernels cannot run; "
                "FASTALPS_CUDA=1 builds them all the same"
            )
    return None


class BuildNative(build_ext):
    """Builds each library into the package's `lib` folder."""

    def run(self) -> None:
        package = ROOT / "fastalps" if self.inplace else Path(self.build_lib) / "fastalps"
        folder = package / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        self.place(folder, "fastalps_cpu", build_cpu, required=False)
        if reason := cuda_declined():
            self.note(folder, "fastalps_cuda", reason)
        else:
            required = os.environ.get("FASTALPS_CUDA") == "1"
            self.place(folder, "fastalps_cuda", build_cuda, required)

    def note(self, folder: Path, name: str, reason: str) -> None:
        (folder / (name + SUFFIX)).unlink(missing_ok=True)
        (folder / f"{name}.why.txt").write_text(reason + "\n", encoding="utf-8")
        print(f"fastalps: {name} is not available: {reason}", file=sys.stderr)

    def place(self, folder: Path, name: str, build, required: bool) -> None:
        try:
            built = checked(build)
        except BuildFailure as failure:
            if required:
                sys.exit(f"fastalps: FASTALPS_CUDA=1, but {failure}")
            self.note(folder, name, str(failure))
            return
        # Renamed into place: a process that has the old library mapped keeps it.
        temporary = folder / f".{built.name}.new"
        shutil.copyfile(built, temporary)
        os.replace(temporary, folder / built.name)
        (folder / f"{name}.why.txt").unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildObjects(Command):
    """Compiles what of the C++ library needs no torch, so that torch can be fetched meanwhile."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        # What is wrong here is told by the build itself.
        with contextlib.suppress(BuildFailure):
            build_cpu(needs_torch=False)


class AnyPythonWheel(bdist_wheel):
    """The libraries use no Python API: one wheel a platform serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastalps.lib", sources=[])],
        cmdclass={
            "build_ext": BuildNative,
            "build_objects": BuildObjects,
            "bdist_wheel": AnyPythonWheel,
        },
    )
