"""The kinds of score that a cell records: the paper's three, and with our additions.

`normal`, `perturbed` and `average` are the paper's. `smoothed_` in front: of smoothed residuals
(`fastalps.smoothing`); `relative_` in front of either: relative to the image's contrast
(`fastalps.relative`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fastalps import ALPS
from fastalps.data import OneClassData
from fastalps.metrics import auroc
from fastalps.relative import energy, relative_errors
from fastalps.smoothing import SIZE
from fastalps.training.validation import score_all

SMOOTHED, RELATIVE = "smoothed_", "relative_"


def measured(model: ALPS, images: Tensor) -> dict[str, Tensor]:
    """The kinds that need the model, on the CPU."""
    smoothed = scores_with(model, images, SIZE)
    return scores_with(model, images, 1) | {SMOOTHED + k: v for k, v in smoothed.items()}


def scores_with(model: ALPS, images: Tensor, smoothing: int) -> dict[str, Tensor]:
    """The three scores by the same weights (training does not depend on the smoothing)."""
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, smoothing=smoothing)
    return {kind: values.cpu() for kind, values in score_all(other, images)._asdict().items()}


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
