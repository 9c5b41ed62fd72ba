"""What a result was made with: hardware, versions, commit. Portable; unknown values are None."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fastalps

LIBRARIES = ("numpy", "triton", "scikit-learn", "safetensors")

# Names as in Linux's /proc/cpuinfo, against those of torch.cpu.get_capabilities().
_FEATURES = {
    "avx2": "avx2",
    "fma": "fma3",
    "avx512f": "avx512_f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",
    "sve": "sve",
    "bf16": "bf16",
}


def cpu_model() -> str | None:
    """The processor's name, such as "AMD EPYC 9355 32-Core Processor"."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    for key in ("model name", "Model", "Hardware"):
        if value := _proc_cpuinfo().get(key):
            return value
    return platform.processor() or platform.machine() or None


def cpu_features() -> dict[str, bool]:
    """Which vector extensions this process can use: avx2, avx512_bf16, amx_bf16, ...

    False also stands for "cannot tell".
    """
    flags = set((_proc_cpuinfo().get("flags") or _proc_cpuinfo().get("Features") or "").split())
    # The kernel is asked first, since it also knows what it switched off (AMX needs its consent).
    if flags:
        flags |= {"neon"} if "asimd" in flags else set()
        return {name: name in flags for name in _FEATURES}
    capabilities = _torch_capabilities()
    return {name: bool(capabilities.get(theirs)) for name, theirs in _FEATURES.items()}


def find_device(name: torch.device | str) -> torch.device:
    """A device by its name; "auto" = a CUDA device where there is one, else the CPU.

    Raises ValueError for another kind of device, and for one that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda[:n], got {str(name)!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ValueError(f"device: {name} is not here ({count} CUDA devices); use cpu or auto")
    return device


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware, not by conversion to float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    features = cpu_features()
    return features["avx512_bf16"] or features["amx_bf16"] or features["bf16"]


def commit() -> str | None:
    """The git commit of this source tree, "+changes" when it has uncommitted ones.

    None for an installed package, or without git.
    """
    package = str(Path(__file__).parent)
    # An installed copy may lie within somebody else's repository: only a tracked file counts.
    if _output("git", "-C", package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = _output("git", "-C", package, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _output("git", "-C", package, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changes else head


def describe() -> dict[str, Any]:
    """Hardware and library versions, ready for JSON:

    `platform`, `python`, `cpu` (model, features, logical_cores, usable_cores), `threads` (of
    torch), `devices` (name, memory_bytes, capability of each CUDA device), `libraries`.
    """
    features = cpu_features()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": {
            "model": cpu_model(),
            "features": [name for name, present in features.items() if present],
            "logical_cores": os.cpu_count(),
            "usable_cores": usable_cores(),
        },
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
        },
        "devices": cuda_devices(),
        "libraries": {
            "fastalps": fastalps.__version__,
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in LIBRARIES},
        },
    }


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cuda_devices() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each CUDA device; an empty list without any."""
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def result_record(
    protocol: str, metrics: Mapping[str, Any], *, seed: int | None, **details: Any
) -> dict[str, Any]:
    """The record that a result is written as, ready for JSON.

    Args:
        protocol: name of the protocol the figures follow, such as "strict".
        metrics: the figures.
        seed: of the run; None when nothing was random.
        details: whatever else identifies the result (data set, model, options).

    Returns:
        `protocol`, `seed`, `date` (UTC, ISO 8601), `commit`, `environment` (see `describe`), the
        details and `metrics`, in this order.
    """
    return {
        "protocol": protocol,
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": describe(),
        **details,
        "metrics": dict(metrics),
    }


def _proc_cpuinfo() -> dict[str, str]:
    """Fields of the first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    fields = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def _torch_capabilities() -> Mapping[str, Any]:
    # Not every torch from 2.10 on has it.
    query = getattr(torch.cpu, "get_capabilities", None)
    try:
        return query() if query is not None else {}
    except RuntimeError:
        return {}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints, stripped; None when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip()
