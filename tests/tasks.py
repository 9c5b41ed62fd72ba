"""Tasks that a small model learns in a few epochs, and what is compared of two trainings."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalps import ALPS
from fastalps.data import OneClassData


def stripes(count: int, across: bool, rng: torch.Generator) -> Tensor:
    """Images of bright stripes, level or upright: two classes that a small model tells apart."""
    pattern = torch.arange(8) % 2 * 170
    image = pattern.expand(8, 8) if across else pattern.expand(8, 8).T
    noise = torch.randint(0, 60, (count, 1, 8, 8), generator=rng)
    return (image + noise).to(torch.uint8)


def task_of(name: str, normal: Tensor, odd: Tensor) -> OneClassData:
    """All normal images but the last 40 to learn from; 20 and 20 odd ones to validate and test."""
    labels = torch.arange(40) >= 20
    return OneClassData(
        name,
        normal[:-40],
        torch.cat([normal[-40:-20], odd]),
        labels,
        torch.cat([normal[-20:], odd.flip(0)]),
        labels,
        tuple(map(str, range(40))),
    )


def weights(model: ALPS) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def without_speed(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in history]
