"""Trained models that come with the package; docs/pretrained.md is their model card."""

from __future__ import annotations

from pathlib import Path

import torch

from fastalps.checkpoint import load
from fastalps.errors import UserError
from fastalps.models import ALPS

# What each was trained on.
PRETRAINED = {
    "mnist-0": "the zeros of MNIST: 28 x 28 gray images, bright strokes on black",
    "ucsd-ped2-motion": "pedestrians of UCSD Ped2: 30 x 30 patches of change between frames",
}
# In place of a run's folder, on the command line.
PREFIX = "pretrained:"
_FOLDER = Path(__file__).parent / "weights"


def pretrained_path(name: str) -> Path:
    """The file of a pretrained model; UserError for another name."""
    if name not in PRETRAINED:
        raise UserError(f"there is no pretrained model {name!r}; choose {', '.join(PRETRAINED)}")
    return _FOLDER / f"{name}.safetensors"


def load_pretrained(name: str, device: str | torch.device = "cpu") -> ALPS:
    """Reads a trained model that comes with the package.

    Args:
        name: "mnist-0" or "ucsd-ped2-motion"; docs/pretrained.md says on what, how and how well
            each was trained, and what it is not for.
        device: where to put it.

    Returns:
        The model, in eval mode, with its `calibration` (a threshold) and `quantization` (int8).

    Raises:
        UserError: no such model.
    """
    return load(pretrained_path(name), device)
