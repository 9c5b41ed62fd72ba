"""What the adapters for scikit-learn and PyOD share: arrays to images, training, scores.

Arrays of these shapes are taken:

- (N, H, W) and (N, C, H, W), each size at least 8: images.
- (N, F), with ``image_size`` (H, W) and F = C * H * W: images, flattened row by row, channel by
  channel.
- (N, F), with ``image_size="auto"`` and F the square of 8 or more: square gray images.
- (N, F) otherwise: F features, which become the first pixels of the smallest square image of at
  least 8x8 that holds them; the other pixels are 0.

The network takes pixels in [0, 1]. uint8 is divided by 255. Images of floating pixels are taken as
they are where all that is fitted lies in [0, 1]. Else the smallest and the largest value fitted
(of all pixels; of each feature by itself) become 0.25 and 0.75, and what then lies outside [0, 1]
counts as its border: values up to half the fitted range away still count in full. Values that look
to be in other units than fitted are told of by a warning, see `fastalps.units`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalps.environment import find_device
from fastalps.inputs import by, pair
from fastalps.models import ALPS, SMALLEST_IMAGE, check_kind, model_config
from fastalps.scoring import Scorer
from fastalps.seeds import seeded
from fastalps.training import TrainConfig, Trainer
from fastalps.units import Units

Array = np.ndarray[Any, Any]

# What is converted at a time: images in float64 take eight times the bytes of their gray levels.
CHUNK_BYTES = 1 << 26


def as_array(values: Any) -> Any:
    """Tensors and lists (of images, of tensors, of rows) as arrays; anything else as it is.

    Raises:
        ValueError: a list of different sizes.
    """
    # scikit-learn takes torch's dtypes for none that it knows, and lists for tables.
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not isinstance(values, (list, tuple)):
        return values
    if any(isinstance(value, Tensor) for value in values):
        values = [as_array(value) for value in values]
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"X must be samples of one size, got a list of different ones ({error}); resize them"
        ) from None


def flattened(values: Array) -> tuple[Array, tuple[int, int, int] | None]:
    """(N, F) and, of images (N, H, W) or (N, C, H, W), their (C, H, W); None of features.

    Raises:
        ValueError: another number of dimensions.
    """
    if values.ndim == 2:
        return values, None
    if values.ndim not in (3, 4):
        raise ValueError(
            f"X must be (N, features), (N, H, W) or (N, C, H, W), got shape {values.shape}"
        )
    shape = values.shape[1:] if values.ndim == 4 else (1, *values.shape[1:])
    return values.reshape(len(values), math.prod(shape)), shape


@dataclass(frozen=True, eq=False)
class Layout:
    """How the rows of an array become images.

    Attributes:
        shape: (C, H, W) of the images.
        features: values in a row; fewer than pixels where they are features, not images.
        unit: the pixels are in [0, 1] once uint8 is divided by 255.
        low, span: smallest value fitted, and the largest less it: one, or of each feature; 0 and 1
            where unit.
        units: what was fitted, to tell values in others.
    """

    shape: tuple[int, int, int]
    features: int
    unit: bool
    low: Array
    span: Array
    units: Units

    @classmethod
    def learn(
        cls,
        rows: Array,
        shape: tuple[int, int, int] | None,
        image_size: str | int | Sequence[int] | None,
    ) -> Layout:
        """The layout of (N, F) rows, which are images of `shape` where that is not None.

        Raises:
            ValueError: sizes that do not fit or are below 8, values too far apart for float64.
        """
        features = rows.shape[1]
        wanted = _wanted(image_size)
        if shape is None:
            shape = _image_shape(features, image_size, wanted)
        elif wanted is not None and wanted != shape[1:]:
            raise ValueError(f"X must have images of {by(wanted)} pixels, got {by(shape[1:])}")
        images = shape is not None
        if shape is None:
            side = max(SMALLEST_IMAGE, math.isqrt(features - 1) + 1)
            shape = (1, side, side)
        if min(shape[1:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"X must have images of at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, got "
                f"{by(shape[1:])}; enlarge them, or flatten them and set image_size=None"
            )
        axis = None if images else 0
        low = np.asarray(rows.min(axis), dtype=np.float64)
        high = np.asarray(rows.max(axis), dtype=np.float64)
        if images and (rows.dtype == np.uint8 or (low >= 0 and high <= 1)):
            # Pixels may have all of [0, 1], whatever part of it was fitted.
            scale = 1 / 255 if rows.dtype == np.uint8 else 1.0
            units = Units.learn(rows, 0.0, 1.0, images, scale)
            return cls(shape, features, True, np.zeros(()), np.ones(()), units)
        with np.errstate(over="ignore"):
            span = high - low
        if not np.isfinite(span).all():
            raise ValueError("X must have values that float64 can tell apart; scale it")
        units = Units.learn(rows, low, high, images)
        # A constant feature keeps its units: any other value of it is a deviation.
        return cls(shape, features, False, low, np.where(span > 0, span, 1.0), units)

    def pixels(self, rows: Array) -> Tensor:
        """(N, F) -> float32 (N, C, H, W) in [0, 1].

        Raises ValueError for another number of values in a row.
        """
        if rows.shape[1] != self.features:
            raise ValueError(
                f"X must have {self.features} values a sample, as when fitted, got {rows.shape[1]}"
            )
        pixels = torch.zeros(len(rows), math.prod(self.shape))
        step = max(1, CHUNK_BYTES // (8 * self.features))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            pixels[part, : self.features] = torch.from_numpy(self._scaled(rows[part]))
        return pixels.reshape(len(rows), *self.shape)

    def check_units(self, rows: Array) -> None:
        """Warns of (N, F) values in other units than fitted, see `Units.differ`."""
        # The units of bytes are known.
        if self.unit and rows.dtype == np.uint8:
            return
        if (ranges := self.units.differ(rows)) is None:
            return
        fitted, found = ranges
        if self.unit:
            fitted = "uint8 (0 to 255) or floating (0 to 1)"
        warnings.warn(f"X must be {fitted}, as when fitted, got {found}; scale it", stacklevel=4)

    def _scaled(self, rows: Array) -> Array:
        values = rows.astype(np.float64)
        if not self.unit:
            with np.errstate(over="ignore"):
                values = 0.25 + 0.5 * ((values - self.low) / self.span)
        elif rows.dtype == np.uint8:
            values /= 255
        return values.clip(0, 1).astype(np.float32)


def _wanted(image_size: str | int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None or (isinstance(image_size, str) and image_size == "auto"):
        return None
    try:
        if isinstance(image_size, str):
            raise ValueError
        return pair(image_size)
    except (TypeError, ValueError):
        raise ValueError(
            f'image_size must be "auto", None, pixels or (height, width), got {image_size!r}'
        ) from None


def _image_shape(
    features: int, image_size: str | int | Sequence[int] | None, wanted: tuple[int, int] | None
) -> tuple[int, int, int] | None:
    """(C, H, W) of flattened images, None for features."""
    if wanted is not None:
        pixels = math.prod(wanted)
        if pixels < 1 or features % pixels:
            raise ValueError(
                f"X must have a multiple of {by(wanted)} = {pixels} values a sample, got "
                f"{features}; change image_size"
            )
        return features // pixels, *wanted
    side = math.isqrt(features)
    square = side * side == features and side >= SMALLEST_IMAGE
    return (1, side, side) if square and image_size == "auto" else None


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is made with; see `fastalps.sklearn.ALPSDetector`."""

    image_size: str | int | Sequence[int] | None
    preset: str
    latent: int | None
    perturbation: str
    epochs: int
    batch_size: int
    learning_rate: float
    distorter_every: int
    score_kind: str
    smoothing: int
    device: str


class Detector:
    """An ALPS model trained on an array, and the scores that it gives to arrays.

    Pickles carry the weights as arrays: one that was trained on a GPU is read on a CPU.

    Args:
        rows, shape: the training data, see `flattened`.
        config: the options.
        seed: of weights, shuffling and noise.

    Raises:
        ValueError, TypeError: an option out of its range, data that do not fit.
        UserError: training diverged.
    """

    def __init__(
        self,
        rows: Array,
        shape: tuple[int, int, int] | None,
        config: DetectorConfig,
        seed: int,
    ) -> None:
        check_kind("score_kind", config.score_kind)
        self.score_kind = config.score_kind
        self.layout = Layout.learn(rows, shape, config.image_size)
        channels, height, width = self.layout.shape
        overrides: dict[str, Any] = {
            "perturbation": config.perturbation,
            "smoothing": config.smoothing,
        }
        if config.latent is not None:
            overrides["latent"] = config.latent
        training = TrainConfig(
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            distorter_every=config.distorter_every,
            device=config.device,
            seed=seed,
        )
        options = model_config((height, width), channels, config.preset, **overrides)
        # The caller's random numbers are none of ours to spend.
        with seeded(seed):
            model = ALPS.from_config(options).float()  # Whatever torch's default dtype is.
        place = find_device(config.device)
        # On CPUs training draws from generators of its own; on CUDA, noise is the device's.
        with seeded(seed, place) if place.type == "cuda" else contextlib.nullcontext():
            Trainer(training, progress=False).fit(model, self.layout.pixels(rows))
        self.model = model
        self.seed = seed
        self._scorer: Scorer | None = None

    def scores(self, rows: Array, shape: tuple[int, int, int] | None, device: str) -> Array:
        """Mean squared errors (N,) float64, higher = more anomalous.

        Args:
            rows, shape: see `flattened`.
            device: where to compute, as in `TrainConfig`.

        Raises:
            ValueError: images of another shape than fitted; no such device.
        """
        if shape is not None and shape != self.layout.shape:
            raise ValueError(
                f"X must have images of {by(self.layout.shape)} (channels x height x width), as "
                f"when fitted, got {by(shape)}"
            )
        pixels = self.layout.pixels(rows)
        self.layout.check_units(rows)
        place = find_device(device)
        if self._scorer is None or self._scorer.device != place:
            # bf16 would round scores to a hundredth: too coarse to rank close ones.
            self._scorer = Scorer(self.model, self.score_kind, "fp32", device=place)
        # Noise is drawn alike at each call; without it nothing is drawn, and no thread waits.
        noisy = self.model.config.perturbation == "noise"
        with seeded(self.seed, place) if noisy else contextlib.nullcontext():
            scores = self._scorer.score_images(pixels)
        return scores.cpu().numpy().astype(np.float64)

    def __getstate__(self) -> dict[str, Any]:
        weights = {
            name: value.detach().cpu().contiguous().numpy()
            for name, value in self.model.state_dict().items()
        }
        state = {**self.__dict__, "model": (self.model.config, weights)}
        del state["_scorer"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        config, weights = state["model"]
        with torch.device("meta"):
            # Without memory: nothing is drawn for weights that are replaced at once.
            model = ALPS.from_config(config)
        # Copied: arrays of a pickle may be read-only maps of a file.
        tensors = {name: torch.tensor(value) for name, value in weights.items()}
        model.load_state_dict(tensors, assign=True)
        self.__dict__.update(state, model=model.eval(), _scorer=None)
