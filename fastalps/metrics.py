"""Ranking metrics of anomaly scores: ROC curve, AUROC, AUPR, EER; and the paper's scaling.

Scores are higher for what is more anomalous; labels are True (1) for anomalous. Figures are
fractions in [0, 1], not percent. scikit-learn is imported on the first call only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


class Roc(NamedTuple):
    """A ROC curve: float64 arrays of one length, thresholds falling, the first one infinite."""

    false_positive_rate: Array
    true_positive_rate: Array
    thresholds: Array


def roc(scores: Any, anomalous: Any) -> Roc:
    """The ROC curve with a point for every distinct score (none dropped).

    Args:
        scores: (N,) floating or integer tensor, array or sequence; finite; higher = more anomalous.
        anomalous: (N,) bool, or integers 0 and 1; True = anomalous.

    Raises:
        ValueError: lengths differ, there is nothing to rank, only one class is present, a score is
            NaN or infinite, or a label is neither 0 nor 1.
    """
    from sklearn.metrics import roc_curve

    values, labels = _ranking(scores, anomalous)
    return Roc(*roc_curve(labels, values, drop_intermediate=False))


def auroc(scores: Any, anomalous: Any) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(equal) / 2 over random pairs.

    Arguments and errors as for `roc`.
    """
    from sklearn.metrics import roc_auc_score

    values, labels = _ranking(scores, anomalous)
    return float(roc_auc_score(labels, values))


def aupr(scores: Any, anomalous: Any) -> float:
    """Area under the precision-recall curve as average precision, anomalous being the positives.

    AP = sum_n (R_n - R_(n-1)) P_n over falling thresholds, without interpolation. A ranking at
    random gives the share of positives. Arguments and errors as for `roc`.
    """
    from sklearn.metrics import average_precision_score

    values, labels = _ranking(scores, anomalous)
    # Rounding of its sum can exceed 1 by a few units in the last place.
    return min(1.0, float(average_precision_score(labels, values)))


def eer(scores: Any, anomalous: Any) -> float:
    """Equal error rate: where the false-positive rate equals the false-negative rate.

    The ROC curve is taken as straight between its points; the result is the false-positive rate
    where it crosses the line fpr = 1 - tpr. Arguments and errors as for `roc`.
    """
    curve = roc(scores, anomalous)
    return eer_of_roc(curve.false_positive_rate, curve.true_positive_rate)


def eer_of_roc(false_positive_rate: Array, true_positive_rate: Array) -> float:
    """`eer` of a ROC curve that is there already; it must run from (0, 0) to (1, 1)."""
    # The excess rises from -1 at (0, 0) to 1 at (1, 1), so there is one crossing.
    excess = false_positive_rate + true_positive_rate - 1.0
    after = int(np.argmax(excess >= 0))
    before = after - 1
    weight = -excess[before] / (excess[after] - excess[before])
    step = false_positive_rate[after] - false_positive_rate[before]
    return float(false_positive_rate[before] + weight * step)


def minmax(scores: Any) -> Array:
    """Scales scores to [0, 1] as the paper does: (s - min) / (max - min), float64 (N,).

    Equal scores give zeros. A monotone map: no ranking metric changes by it.

    Raises ValueError when scores are empty, NaN or infinite.
    """
    values = _finite_scores(scores)
    low, high = float(values.min()), float(values.max())
    # Halves, since the range of two finite floats may overflow.
    span = high / 2 - low / 2
    return np.zeros_like(values) if span == 0 else (values / 2 - low / 2) / span


def _finite_scores(scores: Any) -> Array:
    values = _as_array(scores)
    if values.ndim != 1:
        raise ValueError(f"scores must be one-dimensional (N,), got shape {values.shape}")
    if values.size == 0:
        raise ValueError("scores must not be empty: there is nothing to rank")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"scores must be numbers, got dtype {values.dtype}")
    values = values.astype(np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"scores must be finite, got {int(bad.sum())} NaN or infinite of {values.size}, "
            f"the first {values[first]} at index {first}"
        )
    return values


def _ranking(scores: Any, anomalous: Any) -> tuple[Array, Array]:
    values = _finite_scores(scores)
    labels = _as_array(anomalous)
    if labels.shape != values.shape:
        raise ValueError(
            f"anomalous must have one label for each score, "
            f"got shape {labels.shape} for {values.size} scores"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("anomalous must hold only 0 (normal) and 1 (anomalous)")
    labels = labels.astype(bool)
    positives = int(labels.sum())
    if positives in (0, labels.size):
        only = "anomalous" if positives else "normal"
        raise ValueError(
            f"anomalous must hold both classes, but all {labels.size} labels are {only}"
        )
    return values, labels


def _as_array(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(values)
