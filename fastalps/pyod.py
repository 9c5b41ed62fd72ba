"""ALPS as a PyOD detector. Needs the extra `fastalps[pyod]`.

The sign is PyOD's: `decision_function` is higher for what is *anomalous*.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from sklearn.utils.validation import check_array, check_is_fitted

try:
    from pyod.models.base import BaseDetector
except ImportError as error:
    raise ImportError(
        "fastalps.pyod needs PyOD, which is not installed; pip install fastalps[pyod]"
    ) from error

import fastalps
from fastalps.detector import Array, Detector, as_array, flattened
from fastalps.sklearn import DTYPES, config_of, seed_of


class ALPS(BaseDetector):
    """Outlier detection by an autoencoder with an adversarially perturbed latent.

    ``decision_function(X)`` is the mean squared reconstruction error of each sample's pixels in
    [0, 1], between 0 and 1: the negative of `fastalps.sklearn.ALPSDetector.score_samples`.

    Args:
        contamination: share of outliers in the training data, in (0, 0.5], or a PyThresh object.
        image_size, preset, latent, perturbation: as for `fastalps.sklearn.ALPSDetector`, as is the
            form of X.
        epochs, batch_size, learning_rate, distorter_every: likewise.
        score_kind, smoothing, device, random_state: likewise.

    Attributes:
        decision_scores_: of the training samples, (n,) float64.
        threshold_: above it a sample is an outlier: their ``1 - contamination`` quantile.
        labels_: 0 (normal) or 1 for each training sample.
        detector_: the model with how X becomes images.
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
        super().__init__(contamination=contamination)
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

    def fit(self, X: Any, y: Any = None) -> ALPS:
        """Trains on X, of at least two samples; y is ignored.

        A fit that fails leaves the detector as it was.

        Raises:
            ValueError: an option out of its range, X of a wrong shape, NaN or infinite values.
        """
        rows, shape = _rows(X, 2)
        # On a copy, of which nothing stays where something fails.
        fitted = copy.copy(self)
        fitted._set_n_classes(y)
        fitted.detector_ = Detector(rows, shape, config_of(self), seed_of(self.random_state))
        fitted.decision_scores_ = fitted.detector_.scores(rows, shape, self.device)
        fitted._process_decision_scores()
        self.__dict__ = fitted.__dict__
        return self

    @property
    def model_(self) -> fastalps.ALPS:
        """The trained model; it takes images in [0, 1]."""
        check_is_fitted(self, "detector_")
        return self.detector_.model

    def decision_function(self, X: Any) -> Array:
        """The error of each sample, (n,) float64: higher = more anomalous."""
        check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        return self.detector_.scores(*_rows(X, 1), self.device)


def _rows(X: Any, smallest: int) -> tuple[Array, tuple[int, int, int] | None]:
    values = check_array(as_array(X), dtype=DTYPES, allow_nd=True, ensure_min_samples=smallest)
    return flattened(values)
