"""The C++ compiler that emulates kernels on the host."""

from __future__ import annotations

import shutil
import sys

# Fibers jump between stacks, which the fortified longjmp takes for an error.
FIBERS = "-U_FORTIFY_SOURCE"


def compiler() -> str | None:
    """Its path; None where there is none."""
    return shutil.which("g++") or shutil.which("c++")


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    if sys.platform != "linux":
        return "the emulator's fibers are written for Linux"
    return None if compiler() else "no C++ compiler was found"
