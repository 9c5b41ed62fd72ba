"""The PyOD adapter: the battery that each of PyOD's own detectors has, and its sign."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

pytest.importorskip("pyod", reason="pyod is not installed (pip install fastalps[pyod])")

from pyod.models.base import BaseDetector
from pyod.utils.data import generate_data

from fastalps.detector import Detector
from fastalps.pyod import ALPS
from fastalps.sklearn import ALPSDetector
from tests.conftest import threads

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"epochs": 10, "latent": 4, "random_state": 42}


@pytest.fixture(scope="module")
def data():
    return generate_data(n_train=300, n_test=100, n_features=10, contamination=0.1, random_state=42)


@pytest.fixture(scope="module")
def fitted(data) -> ALPS:
    with threads(1):
        return ALPS(contamination=0.1, **OPTIONS).fit(data[0])


def in_range(values, low=0, high=1) -> bool:
    return values.min() >= low and values.max() <= high


# PyOD's battery, test by test -------------------------------------------------------------------


def test_parameters(fitted) -> None:
    assert isinstance(fitted, BaseDetector)
    for name in ("decision_scores_", "labels_", "threshold_", "_mu", "_sigma", "model_"):
        assert getattr(fitted, name) is not None


def test_train_scores(fitted, data) -> None:
    assert fitted.decision_scores_.shape == (len(data[0]),)
    assert fitted.decision_scores_.dtype == np.float64
    np.testing.assert_array_equal(fitted.decision_scores_, fitted.decision_function(data[0]))
    np.testing.assert_array_equal(fitted.labels_, fitted.predict(data[0]))
    assert fitted.labels_.sum() == 30


def test_prediction_scores(fitted, data) -> None:
    _, test, _, labels = data
    scores = fitted.decision_function(test)
    assert scores.shape == (len(test),)
    assert roc_auc_score(labels, scores) >= 0.8


def test_prediction_labels(fitted, data) -> None:
    labels = fitted.predict(data[1])
    assert labels.shape == data[3].shape and set(labels) == {0, 1}


@pytest.mark.parametrize("options", [{}, {"method": "linear"}, {"method": "unify"}])
def test_prediction_proba(fitted, data, options) -> None:
    assert in_range(fitted.predict_proba(data[1], **options))
    found, confidence = fitted.predict_proba(data[1], return_confidence=True, **options)
    assert in_range(found) and in_range(confidence) and confidence.shape == data[3].shape


def test_prediction_proba_parameter(fitted, data) -> None:
    with pytest.raises(ValueError, match="something"):
        fitted.predict_proba(data[1], method="something")


def test_prediction_labels_confidence(fitted, data) -> None:
    labels, confidence = fitted.predict(data[1], return_confidence=True)
    assert labels.shape == confidence.shape == data[3].shape
    assert in_range(confidence)


@pytest.mark.filterwarnings("ignore:The cost of rejection must be positive:UserWarning")
def test_prediction_with_rejection(fitted, data) -> None:
    labels = fitted.predict_with_rejection(data[1], return_stats=False)
    assert labels.shape == data[3].shape
    _, (expected, upper, cost) = fitted.predict_with_rejection(data[1], return_stats=True)
    assert 0 <= expected <= 1 and 0 <= upper <= 1 and cost >= 0


@pytest.mark.filterwarnings("ignore:Function fit_predict.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:y should not be presented:UserWarning")
def test_fit_predict_and_its_scores(data) -> None:
    detector = ALPS(epochs=1, latent=4, random_state=0)
    assert detector.fit_predict(data[0]).shape == data[2].shape
    detector.fit_predict_score(data[1], data[3])
    detector.fit_predict_score(data[1], data[3], scoring="roc_auc_score")
    detector.fit_predict_score(data[1], data[3], scoring="prc_n_score")
    with pytest.raises(NotImplementedError):
        detector.fit_predict_score(data[1], data[3], scoring="something")


def test_predict_rank(fitted, data) -> None:
    scores = fitted.decision_function(data[1])
    ranks = fitted._predict_rank(data[1])
    assert (np.diff(ranks[np.argsort(scores)]) >= 0).all()
    assert in_range(ranks, 0, len(data[0]))
    assert in_range(fitted._predict_rank(data[1], normalized=True), -0.1, 1.01)


def test_model_clone(fitted) -> None:
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "decision_scores_")


# Beyond the battery -----------------------------------------------------------------------------


@pytest.mark.parametrize("score_kind", ["normal", "perturbed", "average"])
def test_the_adapters_are_each_others_negative(data, score_kind) -> None:
    options = {**OPTIONS, "epochs": 2, "score_kind": score_kind, "contamination": 0.15}
    theirs, ours = ALPS(**options).fit(data[0]), ALPSDetector(**options).fit(data[0])
    np.testing.assert_array_equal(theirs.decision_function(data[1]), -ours.score_samples(data[1]))
    assert theirs.threshold_ == pytest.approx(-ours.offset_, rel=1e-12)
    np.testing.assert_array_equal(theirs.predict(data[1]) == 1, ours.predict(data[1]) == -1)
    assert theirs.get_params().keys() == ours.get_params().keys()
    assert ALPS().get_params() == ALPSDetector().get_params()


def test_images(rng) -> None:
    images = torch.randint(0, 256, (30, 3, 9, 12), generator=rng, dtype=torch.uint8).numpy()
    detector = ALPS(epochs=1, latent=4, random_state=0).fit(images)
    assert detector.model_.config.image_size == (9, 12)
    assert detector.predict_proba(images).shape == (30, 2)
    flat = ALPS(epochs=1, latent=4, random_state=0, image_size=(9, 12)).fit(images.reshape(30, -1))
    np.testing.assert_array_equal(flat.decision_scores_, detector.decision_scores_)


def test_tensors_and_lists_are_arrays(rng) -> None:
    images = torch.randint(0, 256, (30, 8, 8), generator=rng, dtype=torch.uint8)
    options = {"epochs": 1, "latent": 4, "random_state": 0}
    expected = ALPS(**options).fit(images.numpy()).decision_scores_
    for other in (images, list(images), list(images.numpy())):
        detector = ALPS(**options).fit(other)
        np.testing.assert_array_equal(detector.decision_scores_, expected)
        np.testing.assert_array_equal(detector.decision_function(other), expected)


def test_other_units_than_fitted_are_told(fitted, data) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (data[0], data[1], data[1][data[3] == 0], data[1][data[3] == 1]):
            fitted.predict(rows)
    with pytest.warns(UserWarning, match=r"in feature 0, as when fitted, got .*; scale it"):
        fitted.predict(data[1] * 1000)


def test_pickles(fitted, data) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(
        again.decision_function(data[1]), fitted.decision_function(data[1])
    )


def test_wrong_input(fitted) -> None:
    with pytest.raises(ValueError, match="contamination must be in"):
        ALPS(contamination=0.7)
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        ALPS().fit(np.zeros((1, 5)))
    with pytest.raises(ValueError, match="NaN"):
        ALPS().fit(np.full((5, 5), np.nan))
    with pytest.raises(ValueError, match="X must have 10 values a sample, as when fitted, got 11"):
        fitted.decision_function(np.zeros((2, 11)))
    with pytest.raises(ValueError, match=r"images of 1 x 8 x 8 .* got 1 x 9 x 9"):
        fitted.decision_function(np.zeros((2, 9, 9)))


def test_a_failed_fit_changes_nothing(data, monkeypatch) -> None:
    detector = ALPS(epochs=1, latent=4, random_state=0).fit(data[0])
    expected, attributes = detector.decision_function(data[1]), dict(vars(detector))
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            detector.fit(data[0][:, :5])
    assert vars(detector) == attributes
    np.testing.assert_array_equal(detector.decision_function(data[1]), expected)


def test_without_pyod() -> None:
    code = "import sys; sys.modules['pyod'] = None\nimport fastalps.pyod"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fastalps.pyod needs PyOD, which is not installed; pip install fastalps[pyod]"
    )
