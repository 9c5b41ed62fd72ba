"""Which implementations of the ops exist here, and the one place that chooses among them.

Three implementations: `native` (C++ on CPUs, CUDA C++ on NVIDIA GPUs), `triton`, and `reference`
(plain PyTorch, always there). The environment variable FASTALPS_BACKEND, or `use_backend`, asks for
one by name; `auto` takes native where it is loaded, then Triton, then the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalps import reference
from fastalps.errors import BackendUnavailable, UserError

logger = logging.getLogger("fastalps")

BACKENDS = ("auto", "reference", "native", "triton")

# Sets of instructions that the native CPU kernels are compiled for.
CPU_KERNELS = ("default", "avx2", "avx512")

# The compiled library of each device type: its file name without suffix.
LIBRARIES = {"cpu": "fastalps_cpu", "cuda": "fastalps_cuda"}
DEVICES = tuple(LIBRARIES)


@dataclass(frozen=True)
class State:
    """Whether an implementation can run here, and why not."""

    available: bool
    reason: str


def library_path(device_type: str) -> Path | None:
    """The compiled library for `device_type` ("cpu" or "cuda"), or None where none was built."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    path = Path(__file__).parent / "lib" / (LIBRARIES[device_type] + suffix)
    return path if path.exists() else None


@functools.cache
def load_native(device_type: str) -> State:
    """Loads the compiled kernels for `device_type` once; says why where that is not possible."""
    if device_type not in LIBRARIES:
        return State(False, f"there are no compiled kernels for {device_type} devices")
    if device_type == "cuda" and torch.version.cuda is None:
        return State(False, "this torch was built without CUDA")
    path = library_path(device_type)
    if path is None:
        note = Path(__file__).parent / "lib" / f"{LIBRARIES[device_type]}.why.txt"
        why = note.read_text(encoding="utf-8").strip() if note.exists() else "it was not built"
        return State(False, f"no compiled library for {device_type}: {why}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        return State(False, f"{path.name} does not load: {cause}")
    return State(True, path.name)


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 at their import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_state(device_type: str) -> State:
    """Whether Triton kernels can run on `device_type`, and why not."""
    if importlib.util.find_spec("triton") is None:
        return State(False, "the package triton is not installed")
    if triton_interpreted():
        return State(True, "in Triton's interpreter (slow; for tests)")
    if device_type != "cuda":
        return State(False, f"Triton kernels need a CUDA device, not {device_type}")
    if not torch.cuda.is_available():
        return State(False, "no CUDA device is available")
    return State(True, "")


OPS = tuple(
    name
    for name, value in vars(reference).items()
    if callable(value)
    and getattr(value, "__module__", "") == reference.__name__
    and not name.startswith("_")
    and name not in ("compute_dtype", "origins")
)


def _resolve(request: str, op: str, device_type: str) -> Callable[..., Any] | str:
    """What runs `op` on `device_type` when `request` is asked for, or why nothing can."""
    # The raw op is the native kernel where one is loaded, else the reference; it keeps its name in
    # exported graphs either way.
    raw = getattr(torch.ops.fastalps, op).default
    native = load_native(device_type)
    if request == "reference":
        return getattr(reference, op)
    if request == "native":
        return raw if native.available else f"backend native cannot run {op}: {native.reason}"
    triton = triton_state(device_type)
    if request == "triton" and not triton.available:
        return f"backend triton cannot run {op}: {triton.reason}"
    if request == "triton" or (
        not native.available and triton.available and not triton_interpreted()
    ):
        importlib.import_module("fastalps.kernels.registration")
        return getattr(torch.ops.fastalps, f"{op}_triton").default
    return raw


_requested = "auto"
_choices: dict[tuple[str, str], Callable[..., Any] | str] = {}


@functools.cache
def _log_fallbacks() -> None:
    """Says once what `auto` has to do without: a warning where the device is there, else info."""
    for device_type in DEVICES:
        state = load_native(device_type)
        present = device_type == "cpu" or torch.cuda.is_available()
        if not state.available:
            level = logging.WARNING if present else logging.INFO
            logger.log(level, "no native kernels on %s: %s", device_type, state.reason)


def _choose(request: str) -> None:
    """Resolves every op for every device at once: calls, and compilers that trace them, only look
    the answer up."""
    global _requested
    if request == "auto":
        _log_fallbacks()
    choices = {
        (op, device_type): _resolve(request, op, device_type)
        for op in OPS
        for device_type in DEVICES
    }
    _choices.update(choices)
    _requested = request


def initialise() -> None:
    """Chooses the implementations by FASTALPS_BACKEND; called once, when the ops are defined."""
    request = os.environ.get("FASTALPS_BACKEND", "auto")
    if request not in BACKENDS:
        raise UserError(f"FASTALPS_BACKEND: expected one of {', '.join(BACKENDS)}; got {request!r}")
    wish = os.environ.get("FASTALPS_CPU")
    if wish and wish not in CPU_KERNELS:
        raise UserError(f"FASTALPS_CPU: expected one of {', '.join(CPU_KERNELS)}; got {wish!r}")
    if wish and cpu_kernels() not in (wish, "none"):
        raise UserError(
            f"FASTALPS_CPU: expected what this CPU has, {cpu_kernels()} at most; got {wish!r}"
        )
    _choose(request)


def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """What runs `op` on `device_type` now: a callable with the raw signature of the op.

    Raises:
        BackendUnavailable: a backend was asked for by name and cannot run here.
    """
    choice = _choices.get((op, device_type))
    if choice is None:  # A device that no kernel is written for.
        return getattr(torch.ops.fastalps, op).default
    if isinstance(choice, str):
        raise BackendUnavailable(choice)
    return choice


def requested() -> str:
    """The backend asked for: "auto", "reference", "native" or "triton"."""
    return _requested


def engines_wanted() -> bool:
    """Whether the native engines may score: not where another backend was asked for by name."""
    return _requested in ("auto", "native")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called in this block by the implementation `name`.

    Args:
        name: "auto", "reference", "native" or "triton". The choice is made when an op is called
            (or traced), is process-wide, and holds until the block ends.

    Raises:
        ValueError: the name is unknown. An op called in the block raises `BackendUnavailable` when
            the implementation cannot run on its tensors.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {name!r}")
    importlib.import_module("fastalps.ops")
    before = _requested
    _choose(name)
    try:
        yield
    finally:
        _choose(before)


def cpu_kernels() -> str:
    """Which instructions the C++ kernels use here: "default", "avx2" or "avx512"; or "none"."""
    return _capabilities()[0]


def dot_products() -> tuple[str, ...]:
    """The engine's own instructions here: "avx512_bf16" and "amx_bf16" for bf16, "avx512_vnni",
    "avx_vnni" and "amx_int8" for int8."""
    return _capabilities()[1:]


def _capabilities() -> tuple[str, ...]:
    path = library_path("cpu")
    if path is None or not load_native("cpu").available:
        return ("none",)
    capability = ctypes.CDLL(str(path)).fastalps_cpu_capability
    capability.restype = ctypes.c_char_p
    return tuple(capability().decode().split())


def report() -> dict[str, State]:
    """Every implementation's state on this machine."""
    states = {"reference": State(True, "plain PyTorch")}
    for device_type in LIBRARIES:
        states[f"native ({device_type})"] = load_native(device_type)
    states["triton"] = triton_state("cuda")
    return states
