"""Which images of a labelled set train, validate and test a one-class task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastalps.data.containers import OneClassData
from fastalps.data.decode import Pixels
from fastalps.errors import UserError
from fastalps.scalars import is_whole

PROTOCOLS = ("paper", "strict")
VALIDATION_LIMIT = 150
VALIDATION_PART = 5  # one image in so many: 20%

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) or (N, H, W) uint8 with class indices (N,), in a train and a test set."""

    train: Pixels
    train_classes: npt.NDArray[Any]
    test: Pixels
    test_classes: npt.NDArray[Any]


def check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")


def random_state(seed: int) -> np.random.RandomState:
    """Numpy's frozen generator: the same split for a seed under every numpy version."""
    if not is_whole(seed, 0) or seed >= 2**32:
        raise UserError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")
    return np.random.RandomState(seed)


def validation_count(images: int) -> int:
    """Images of `images` to hold out: min(150, 20%), at least 1 of 2 or more."""
    held_out = min(VALIDATION_LIMIT, images // VALIDATION_PART)
    return max(held_out, 1) if images > 1 else 0


def hold_out(
    candidates: Indices, count: int, generator: np.random.RandomState
) -> tuple[Indices, Indices]:
    """Draws `count` of `candidates`; returns (the rest, the drawn), both in their old order."""
    order = generator.permutation(len(candidates))
    return candidates[np.sort(order[count:])], candidates[np.sort(order[:count])]


def one_class(
    name: str,
    images: LabelledImages,
    normal_class: int,
    class_names: Sequence[str],
    protocol: str,
    seed: int,
) -> OneClassData:
    """The one-class task of `normal_class`.

    Validation holds min(150, 20% of the class) normal training images and, under the protocol
    `paper`, as many anomalous training images, drawn evenly from all other classes together;
    `strict` has the same normal ones only. Training is the rest of the normal class, the same for
    both protocols. Test is the whole test set.

    Raises UserError when the class leaves nothing to train on.
    """
    check_protocol(protocol)
    generator = random_state(seed)
    is_normal = images.train_classes == normal_class
    normal = np.flatnonzero(is_normal)
    count = validation_count(len(normal))
    train, validation = hold_out(normal, count, generator)
    if not len(train):
        raise UserError(f"{name} has no normal training images; choose another normal class")
    anomalous = np.empty(0, dtype=np.int64)
    if protocol == "paper":
        _, anomalous = hold_out(np.flatnonzero(~is_normal), count, generator)
    labels = torch.zeros(len(validation) + len(anomalous), dtype=torch.bool)
    labels[len(validation) :] = True
    return OneClassData(
        name=name,
        train=_tensor(images.train[train]),
        validation=_tensor(images.train[np.concatenate([validation, anomalous])]),
        validation_labels=labels,
        test=_tensor(images.test.copy()),
        test_labels=torch.from_numpy(images.test_classes != normal_class),
        test_names=tuple(
            f"{class_names[int(c)]}/{i:05d}" for i, c in enumerate(images.test_classes)
        ),
    )


def _tensor(images: Pixels) -> Tensor:
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
