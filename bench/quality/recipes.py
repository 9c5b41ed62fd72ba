"""How each data set is trained: one recipe for all its classes and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Chosen by single-seed trials (docs/quality.md says which and with what result).
VARIANTS = ("alps", "noise", "none")
BASELINES = ("ocsvm", "iforest", "pca")
METHODS = (*VARIANTS, *BASELINES)
PERTURBATION = {"alps": "adversarial", "noise": "noise", "none": "none"}


@dataclass(frozen=True)
class Recipe:
    """A model and its training.

    Attributes:
        model: of `fastalps.ALPS`, besides size and channels.
        training: of `fastalps.TrainConfig`, besides the seed.
    """

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


_IMAGES = Recipe(
    model={"preset": "paper"},
    training={
        "epochs": 60,
        "batch_size": 64,
        "average_decay": 0.998,
        "distorter_every": 5,
        "validate_every": 2,
        "checkpoint_every": 5,
        "device": "cpu",
    },
)
RECIPES = {"mnist": _IMAGES, "fashion-mnist": _IMAGES}
# One class and a few epochs: proves that the path works, its figures mean nothing.
QUICK = {"epochs": 2, "validate_every": 1}
