"""ALPS as a scikit-learn outlier detector.

The sign is scikit-learn's: `score_samples` and `decision_function` are higher for what is *normal*.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

import fastalps
from fastalps.detector import Array, Detector, DetectorConfig, as_array, flattened

DTYPES = (np.float64, np.float32, np.uint8)


class ALPSDetector(OutlierMixin, BaseEstimator):
    """Outlier detection by an autoencoder with an adversarially perturbed latent.

    ``score_samples(X) = -error`` with the mean squared reconstruction error of each sample's pixels
    in [0, 1], between -1 and 0; ``decision_function = score_samples - offset_``; ``predict`` is +1
    (normal) where that is at least 0, else -1. `offset_` is the ``100 * contamination``-th
    percentile of the training samples' scores, so that this share of them is outlying.

    X is (n, height, width), (n, channels, height, width), or (n, features): flattened images, or
    just features; `fastalps.detector` says how they become images, and how they are scaled.

    Args:
        contamination: share of outliers in the training data, in (0, 0.5].
        image_size: of flattened images: pixels or (height, width); "auto": square where n_features
            is the square of 8 or more, features otherwise; None: always features.
        preset: "paper", "fast" or "network-b", see `fastalps.ALPS`.
        latent: size of the latent vector; None = the preset's.
        perturbation: "adversarial", "noise" or "none" (a plain autoencoder).
        epochs: passes over X.
        batch_size: samples a step, at least 2.
        learning_rate: of Adam.
        distorter_every: the distorter is trained in every n-th epoch.
        score_kind: "normal", "perturbed" or "average" error.
        smoothing: side in pixels of the neighbourhood over which differences are averaged before
            they are squared; odd, 1: none. 3 ranks textured images better (`fastalps.smoothing`).
        device: "auto", "cpu", "cuda", "cuda:1", ...; for fitting and for scoring.
        random_state: seed, generator or None.

    Attributes:
        offset_: float.
        detector_: the model with how X becomes images.
        n_features_in_: values in a sample.
        feature_names_in_: where X was a table with names.
    """

    def __init__(
        self,
        contamination: float = 0.1,
        image_size: str | int | Sequence[int] | None = "auto",
        preset: str = "fast",
        latent: int | None = None,
        perturbation: str = "adversarial",
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        distorter_every: int = 5,
        score_kind: str = "average",
        smoothing: int = 1,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.contamination = contamination
        self.image_size = image_size
        self.preset = preset
        self.latent = latent
        self.perturbation = perturbation
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.distorter_every = distorter_every
        self.score_kind = score_kind
        self.smoothing = smoothing
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> ALPSDetector:
        """Trains on X, of at least two samples; y is ignored.

        A fit that fails leaves the estimator as it was.

        Raises:
            ValueError: an option out of its range, X of a wrong shape, NaN or infinite values.
        """
        number = isinstance(self.contamination, numbers.Real)
        if not number or not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination must be in (0, 0.5], got {self.contamination!r}")
        # On a copy, of which nothing stays where something fails.
        fitted = copy.copy(self)
        rows, shape = fitted._rows(X, reset=True)
        fitted.detector_ = Detector(rows, shape, config_of(self), seed_of(self.random_state))
        scores = -fitted.detector_.scores(rows, shape, self.device)
        fitted.offset_ = float(np.percentile(scores, 100 * self.contamination))
        self.__dict__ = fitted.__dict__
        return self

    @property
    def model_(self) -> fastalps.ALPS:
        """The trained model; it takes images in [0, 1]."""
        check_is_fitted(self, "detector_")
        return self.detector_.model

    def score_samples(self, X: Any) -> Array:
        """The negative error of each sample, (n,) float64: higher = more normal."""
        check_is_fitted(self)
        return -self.detector_.scores(*self._rows(X, reset=False), self.device)

    def decision_function(self, X: Any) -> Array:
        """``score_samples(X) - offset_``, (n,) float64: negative = outlier."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> Array:
        """+1 for normal samples, -1 for outliers, (n,) int."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def _rows(self, X: Any, reset: bool) -> tuple[Array, tuple[int, int, int] | None]:
        X, shape = as_array(X), None
        if len(getattr(X, "shape", ())) > 2:
            X, shape = flattened(check_array(X, dtype=DTYPES, allow_nd=True, estimator=self))
        smallest = 2 if reset else 1
        rows = validate_data(self, X, reset=reset, dtype=DTYPES, ensure_min_samples=smallest)
        return rows, shape


def config_of(estimator: Any) -> DetectorConfig:
    """The options of an adapter, by their names."""
    return DetectorConfig(
        **{name: getattr(estimator, name) for name in DetectorConfig.__dataclass_fields__}
    )


def seed_of(random_state: Any) -> int:
    """A seed drawn as scikit-learn draws: None, an int or a numpy generator."""
    return int(check_random_state(random_state).randint(2**31 - 1))
