"""Whether what is asked for fits into the machine's memory, and what to tell when it does not."""

from __future__ import annotations

import os
import re

import torch

from fastalps.errors import UserError

# In errors of torch's CPU allocator, and of compiled kernels that ask torch for memory.
_MARKS = ("DefaultCPUAllocator", '"aten::new_empty"')


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(what: str, needed: int, remedy: str, copies: int = 1) -> None:
    """Raises UserError where the machine cannot hold something of `needed` bytes.

    Args:
        what: it is, with a verb: "the images take".
        needed: its bytes.
        remedy: what to do about it.
        copies: of it that are held at a time.
    """
    memory = memory_bytes()
    if memory is None or copies * needed <= memory:
        return
    times = "" if copies == 1 else f", {copies} times that while they are read,"
    raise UserError(f"{what} {_gib(needed)}{times} of the {_gib(memory)} of memory; {remedy}")


def _gib(size: int) -> str:
    # A size that was asked for may be more than a float holds.
    return f"{min(size, 2**80) / 2**30:,.1f} GiB"


def memory_text(error: BaseException) -> str | None:
    """What to tell of an error for want of memory, in one line; None of any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory; lower batch_size"
    text = str(error)
    marked = isinstance(error, RuntimeError) and any(mark in text for mark in _MARKS)
    if not (marked or isinstance(error, MemoryError)):
        return None
    found = re.search(r"allocate ([\d.]+ (?:bytes|[KMGTPE]iB))", text)
    asked = f" ({found[1]} more were asked for)" if found else ""
    return (
        f"the machine has too little memory{asked}; use fewer or smaller images or frames, or a "
        "smaller model"
    )
