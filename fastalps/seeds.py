"""Seeding of what draws from torch's own generators, one for all threads of the process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# Whoever seeds between another thread's seed and its draws, or takes its seeded state for the one
# to go back to, changes what both draw. Reentrant: what is seeded may seed again.
_seeding = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch's generator of the CPU, and that of a CUDA `device`, start from `seed`.

    Afterwards they are as they were. One thread at a time is inside; others wait.
    """
    cuda = device is not None and device.type == "cuda"
    with _seeding, torch.random.fork_rng([device] if cuda else []):
        # `torch.manual_seed` would seed every CUDA device as well, which nothing undoes.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
