"""What the loaders return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneClassData:
    """A one-class task: train on normal images, tell anomalous from normal ones at test time.

    Attributes:
        name: of the task, such as "mnist[2]".
        train: uint8 (N, C, H, W), gray levels 0 to 255, normal images only.
        validation: uint8 (V, C, H, W), images held out of training; never test images.
        validation_labels: bool (V,), True = anomalous.
        test: uint8 (M, C, H, W).
        test_labels: bool (M,), True = anomalous.
        test_names: M names that tell the test images apart, in their order.

    Raises ValueError when shapes, dtypes or counts do not agree.
    """

    name: str
    train: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor
    test_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in ("train", "validation", "test"):
            images: Tensor = getattr(self, field)
            if images.dtype != torch.uint8 or images.dim() != 4:
                raise ValueError(
                    f"{field} must be a uint8 (N, C, H, W) tensor, "
                    f"got {images.dtype} {tuple(images.shape)}"
                )
            if images.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"{field} has images of (C, H, W) = {tuple(images.shape[1:])}, "
                    f"but train has {tuple(self.train.shape[1:])}"
                )
        for field in ("validation", "test"):
            _check_labels(f"{field}_labels", getattr(self, f"{field}_labels"), getattr(self, field))
        if len(self.test_names) != len(self.test):
            raise ValueError(f"{len(self.test_names)} test_names for {len(self.test)} test images")


@dataclass(frozen=True)
class Clip:
    """One video as gray frames, with its ground truth where that is known.

    Attributes:
        name: of the clip, such as "Test001".
        frames: uint8 (T, H, W), gray levels 0 to 255; may be a private (copy-on-write) memory map.
        labels: bool (T,), True = the frame is anomalous; None = unknown.
        masks: bool (T, H, W), True = the pixel is anomalous; None = unknown.

    Raises ValueError when shapes, dtypes or counts do not agree.
    """

    name: str
    frames: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.frames.dtype != torch.uint8 or self.frames.dim() != 3:
            raise ValueError(
                f"frames must be a uint8 (T, H, W) tensor, "
                f"got {self.frames.dtype} {tuple(self.frames.shape)}"
            )
        if self.labels is not None:
            _check_labels("labels", self.labels, self.frames)
        if self.masks is not None and (
            self.masks.shape != self.frames.shape
            or self.masks.dtype not in (torch.bool, torch.uint8)
        ):
            raise ValueError(
                f"masks must be a bool or uint8 tensor of the frames' shape "
                f"{tuple(self.frames.shape)}, got {self.masks.dtype} {tuple(self.masks.shape)}"
            )


def _check_labels(field: str, labels: Tensor, items: Tensor) -> None:
    if labels.dtype != torch.bool or labels.shape != items.shape[:1]:
        raise ValueError(
            f"{field} must be a bool tensor of shape ({len(items)},), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
