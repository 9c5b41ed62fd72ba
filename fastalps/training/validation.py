"""Validation after an epoch, and the choice of the epoch and the kind of score to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalps import metrics
from fastalps.data import OneClassData
from fastalps.errors import UserError
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, Scores
from fastalps.seeds import seeded

BATCH = 512
# The kind that is fixed in advance where no anomaly may choose it.
FIXED_KIND = "average"


def score_all(model: ALPS, images: Tensor) -> Scores:
    """The scores of uint8 or floating images (N, C, H, W), on the model's device, in batches."""
    device = next(model.parameters()).device
    # A model perturbed by noise must score the same whatever was drawn before.
    with seeded(0, device):
        parts = [model.score(unit_pixels(batch.to(device))) for batch in images.split(BATCH)]
    return Scores(*(torch.cat(kind) for kind in zip(*parts, strict=True)))


@dataclass
class Best:
    """The best epoch so far."""

    epoch: int = 0
    kind: str = FIXED_KIND
    # Compared in order: the first number decides, the second breaks ties. Larger is better.
    quality: tuple[float, float] = (-float("inf"), -float("inf"))
    # Validations since it was found.
    age: int = 0


class Validator:
    """Measures a model on validation images.

    Args:
        data: with validation images; None: nothing is validated.
        selection: "auroc", "loss" or "last".

    Raises:
        ValueError: the selection needs images that `data` does not have.
    """

    def __init__(self, data: OneClassData | None, selection: str) -> None:
        self.selection = selection
        self.images = None if data is None else data.validation
        self.labels = None if data is None else data.validation_labels
        normal = 0 if self.labels is None else int((~self.labels).sum())
        anomalous = 0 if self.labels is None else int(self.labels.sum())
        self.both = normal > 0 and anomalous > 0
        if selection == "auroc" and not self.both:
            raise ValueError(
                f"select: auroc needs normal and anomalous validation images, got {normal} and "
                f"{anomalous}; use select 'loss' or 'last', or the protocol 'strict'"
            )
        if selection == "loss" and not normal:
            raise ValueError(
                "select: loss needs normal validation images, got none; use select 'last'"
            )
        self.empty = normal == 0

    def measure(self, model: ALPS) -> dict[str, float]:
        """The validation columns of the history: mean errors of the normal images, and each
        kind's AUROC where there are anomalous ones."""
        if self.empty:
            return {}
        assert self.images is not None
        assert self.labels is not None
        scores = Scores(*(kind.cpu() for kind in score_all(model, self.images)))
        if not all(torch.isfinite(kind).all() for kind in scores):
            raise UserError(
                "training diverged: scores of validation images are not finite; lower "
                "learning_rate, bound the perturbation, or set amp to off"
            )
        row = {
            f"validation_{kind}": float(values[~self.labels].mean())
            for kind, values in scores._asdict().items()
        }
        if self.both:
            for kind, values in scores._asdict().items():
                row[f"validation_auroc_{kind}"] = metrics.auroc(values, self.labels)
        return row

    def update(self, best: Best, epoch: int, row: dict[str, Any]) -> bool:
        """Whether the epoch of this row of the history is the best so far; then notes it."""
        kind, quality = FIXED_KIND, (float(epoch), 0.0)
        if self.selection == "loss":
            quality = (-row["validation_average"], 0.0)
        if self.selection == "auroc":
            kind = max(Scores._fields, key=lambda name: row[f"validation_auroc_{name}"])
            # Small validation sets tie often: then the better reconstruction wins.
            quality = (row[f"validation_auroc_{kind}"], -row["validation_normal"])
        if quality <= best.quality:
            best.age += 1
            return False
        best.epoch, best.kind, best.quality, best.age = epoch, kind, quality, 0
        return True
