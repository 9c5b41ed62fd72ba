"""How each data set is trained: one recipe for all its classes and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastalps.relative import EXPONENT

# Chosen by single-seed trials (docs/quality.md says which and with what result).
# Of the recipe's model: what each changes.
VARIANTS: dict[str, dict[str, Any]] = {
    "alps": {},
    "noise": {"perturbation": "noise"},
    "none": {"perturbation": "none"},
    "fast": {"preset": "fast"},
}
BASELINES = ("ocsvm", "iforest", "pca")
METHODS = (*VARIANTS, *BASELINES)


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    Attributes:
        model: of `fastalps.ALPS`, besides size and channels.
        training: of `fastalps.TrainConfig`, besides the seed.
        strict_score: the kind that the protocol `strict` fixes for our own row (`kinds.py`).
        exponent: of the contrast that errors are relative to.
    """

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    strict_score: str = "average"
    exponent: float = EXPONENT


_MODEL = {"preset": "paper"}
_TRAINING = {
    "epochs": 10,
    "batch_size": 32,
    "schedule": "cosine",
    "average_decay": 0.998,
    "distorter_every": 2,
    "device": "cpu",
}
RECIPES = {
    "mnist": Recipe(_MODEL, _TRAINING, "relative_smoothed_normal"),
    "fashion-mnist": Recipe(_MODEL, _TRAINING, "relative_smoothed_normal", exponent=1 / 3),
}
VIDEO = Recipe(
    {"preset": "fast"},
    {
        "epochs": 6,
        "batch_size": 32,
        "schedule": "cosine",
        "average_decay": 0.998,
        "distorter_every": 2,
        "device": "cpu",
    },
)
# One class and a few epochs: proves that the path works, its figures mean nothing.
QUICK = {"epochs": 2, "validate_every": 1}
