"""The kinds of score that a cell records: the paper's three, and with our additions.

`normal`, `perturbed` and `average` are the paper's. `smoothed_` in front: of smoothed residuals
(`fastalps.smoothing`); `relative_` in front of either: relative to the image's contrast
(`fastalps.relative`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastalps import ALPS
from fastalps.data import OneClassData
from fastalps.metrics import auroc
from fastalps.relative import energy, relative_errors
from fastalps.smoothing import smoothed_scores
from fastalps.training.validation import score_all

SMOOTHED, RELATIVE = "smoothed_", "relative_"


def measured(model: ALPS, images: Tensor) -> dict[str, Tensor]:
    """The kinds that need the model, on the CPU."""
    plain, smoothed = score_all(model, images), smoothed_scores(model, images)
    kinds = plain._asdict() | {SMOOTHED + k: v for k, v in smoothed._asdict().items()}
    return {kind: values.cpu() for kind, values in kinds.items()}


def all_kinds(found: Mapping[str, Tensor], images: Tensor, exponent: float) -> dict[str, Tensor]:
    """Those found, and the same relative to the images' contrast."""
    energies = energy(images)
    relative = {RELATIVE + k: relative_errors(v, energies, exponent) for k, v in found.items()}
    return dict(found) | relative


def best_kind(model: ALPS, data: OneClassData, exponent: float) -> str:
    """The kind that ranks the validation images best."""
    kinds = all_kinds(measured(model, data.validation), data.validation, exponent)
    areas = {k: auroc(v, data.validation_labels) for k, v in kinds.items()}
    return max(areas, key=lambda kind: areas[kind])
