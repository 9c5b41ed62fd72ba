"""``python -m fastalps``: versions, devices, CPU features, backends and why some are off."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys

import torch

import fastalps
from fastalps import backends, environment
from fastalps.errors import UserError


def _lines() -> list[str]:
    described = environment.describe()
    versions = described["libraries"]
    cpu = described["cpu"]
    lines = [
        f"fastalps      {fastalps.__version__}",
        f"python        {platform.python_version()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
    ]
    lines += [
        f"{name:<13} {version or 'not installed'}"
        for name, version in versions.items()
        if name not in ("fastalps", "torch", "cuda")
    ]
    lines += ["", f"CPU           {cpu['model'] or 'unknown'}"]
    lines.append(
        f"  cores       {cpu['usable_cores']} usable, {described['threads']['intra_op']} used"
    )
    lines.append(f"  features    {' '.join(cpu['features']) or 'none that matter here'}")
    lines.append(f"  kernels     {backends.cpu_kernels()}")
    for index, device in enumerate(described["devices"]):
        memory = device["memory_bytes"] / 2**30
        lines.append(
            f"cuda:{index}        {device['name']}, {memory:.0f} GiB, sm_{device['capability']}"
        )
    if not described["devices"]:
        lines.append("CUDA          no device")
    lines += ["", f"Backends (FASTALPS_BACKEND={os.environ.get('FASTALPS_BACKEND', 'auto')})"]
    for name, state in backends.report().items():
        mark = "on " if state.available else "off"
        lines.append(f"  {name:<13} {mark}  {state.reason}".rstrip())
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m fastalps",
        description="Prints versions, devices, CPU features, and which kernels are on or off, and "
        "why. Commands: fastalps-train, fastalps-score, fastalps-export, each with --help.",
    ).parse_args()
    try:
        # What reads, and checks, the variables that choose implementations.
        importlib.import_module("fastalps.op_definitions")
    except UserError as error:
        print(f"fastalps: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(_lines()))
