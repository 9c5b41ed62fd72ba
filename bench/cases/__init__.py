"""The registry: one module a group, each with `cases(settings)`."""

from __future__ import annotations

import importlib

from bench.harness import Case, Settings

GROUPS = ("ops", "scoring", "training", "memory")


def load(groups: tuple[str, ...], settings: Settings) -> list[Case]:
    """The cases of these groups at the settings' effort, in order."""
    found: list[Case] = []
    for group in groups:
        found += importlib.import_module(f"bench.cases.{group}").cases(settings)
    return found
