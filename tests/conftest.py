"""Fixtures that test files share, and what they ask of the machine."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastalps import ALPS, backends

# `make sanitize` tests another build of the library.
if folder := os.environ.get("FASTALPS_TEST_LIBRARY"):
    backends.library_path = lambda device_type: (
        Path(folder) / "fastalps_cpu.so" if device_type == "cpu" else None
    )

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DATA = Path(os.environ.get("FASTALPS_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def rng(record_property: pytest.RecordProperty) -> torch.Generator:
    """A generator with a fresh seed a run; FASTALPS_TEST_SEED repeats one."""
    seed = int(os.environ.get("FASTALPS_TEST_SEED", random.SystemRandom().randrange(2**31)))
    record_property("seed", seed)
    print(f"FASTALPS_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> ALPS:
    """A random network for images of 12 x 12."""
    from tests.networks import randomise  # It loads the library: not before its path is set.

    return randomise(ALPS(12, preset="fast"), 11)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, PyTorch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers this small only wait for a second thread, long where others want the cores, too."""
    with threads(1):
        yield


@pytest.fixture
def kept_threads() -> Iterator[None]:
    """For programs that choose how many threads this process has."""
    with threads(torch.get_num_threads()):
        yield


def data_folder(name: str) -> Path:
    """The folder of a real data set; skips the test where it is absent."""
    folder = DATA / name
    if not folder.exists():
        pytest.skip(f"real data {name} not found (set FASTALPS_DATA to the folder that holds it)")
    return folder
