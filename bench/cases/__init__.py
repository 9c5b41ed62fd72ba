"""The registry: the modules of each group, each with `cases(settings)`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from bench.harness import Case, Settings

GROUPS = {
    "ops": ("ops",),
    "scoring": ("scoring", "gpu_scoring", "accuracy"),
    "training": ("training",),
    "memory": ("memory",),
}


def load(groups: Iterable[str], settings: Settings) -> list[Case]:
    """The cases of these groups at the settings' effort and device, in order."""
    found: list[Case] = []
    for group in groups:
        for module in GROUPS[group]:
            found += importlib.import_module(f"bench.cases.{module}").cases(settings)
    return found
