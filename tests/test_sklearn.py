"""The scikit-learn adapter: its own checks, pipelines, searches, pickles, kinds of input."""

from __future__ import annotations

import contextlib
import pickle
import threading
import warnings

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastalps
from fastalps import ALPS
from fastalps.detector import Detector, Layout, flattened
from fastalps.sklearn import ALPSDetector

pytestmark = pytest.mark.usefixtures("one_thread")

# Checks that fail, each with its reason: none does.
EXCEPTIONS: dict[str, str] = {}


def quick(**options) -> ALPSDetector:
    return ALPSDetector(**{"epochs": 2, "latent": 4, "random_state": 0, **options})


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 8, 8) of one digit; of all, and whether they are that one."""
    data = load_digits()
    same = data.target == 3
    return data.images[same][:140], data.images[~same | (same.cumsum() > 140)], data.target


@parametrize_with_checks(
    [ALPSDetector(epochs=1, latent=4)], expected_failed_checks=lambda estimator: EXCEPTIONS
)
def test_scikit_learns_own_checks(estimator, check) -> None:
    check(estimator)


def test_signs_and_offset(digits) -> None:
    images = digits[0]
    detector = quick(contamination=0.2).fit(images)
    scores = detector.score_samples(images)
    assert scores.dtype == np.float64 and scores.shape == (140,)
    assert scores.min() >= -1 and scores.max() < 0
    assert detector.offset_ == np.percentile(scores, 20)
    np.testing.assert_array_equal(detector.decision_function(images), scores - detector.offset_)
    labels = detector.predict(images)
    np.testing.assert_array_equal(labels, np.where(scores >= detector.offset_, 1, -1))
    assert (labels == -1).sum() == 28
    np.testing.assert_array_equal(clone(detector).fit_predict(images), labels)


def test_it_detects(digits) -> None:
    normal, images, _ = digits
    detector = ALPSDetector(epochs=20, random_state=0).fit(normal)
    odd = np.arange(len(images)) % 2 == 1
    noise = np.random.default_rng(0).permuted(images.reshape(len(images), -1), axis=1)
    mixed = np.where(odd[:, None], noise, images.reshape(len(images), -1))
    assert roc_auc_score(~odd, detector.score_samples(mixed)) > 0.8
    # The other direction of the sign: normal digits lie above the rest.
    labels = np.r_[np.ones(140), np.zeros(odd.sum())]
    scores = detector.score_samples(np.r_[normal.reshape(140, -1), noise[odd]])
    assert roc_auc_score(labels, scores) > 0.9


def test_tabular_outliers() -> None:
    generator = np.random.default_rng(1)
    normal = generator.normal(size=(200, 5)) * [1, 10, 100, 0.1, 1]
    outliers = generator.uniform(-6, 6, size=(40, 5)) * [1, 10, 100, 0.1, 1]
    scores = (
        ALPSDetector(epochs=20, random_state=0).fit(normal).score_samples(np.r_[normal, outliers])
    )
    assert roc_auc_score(np.r_[np.ones(200), np.zeros(40)], scores) > 0.8


def test_random_state(digits) -> None:
    images = digits[0][:40]
    one = quick().fit(images).score_samples(images)
    state = torch.get_rng_state()
    np.testing.assert_array_equal(quick().fit(images).score_samples(images), one)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(quick(random_state=1).fit(images).score_samples(images), one)
    generator = np.random.RandomState(5)
    assert quick(random_state=generator).fit(images).offset_ != 0


def test_threads_fit_as_one_does(digits, monkeypatch) -> None:
    images = digits[0][:40]
    detectors = [quick(random_state=seed) for seed in range(2)]
    expected = [clone(one).fit(images).score_samples(images) for one in detectors]
    state = torch.get_rng_state()
    together, made = threading.Barrier(2), ALPS.from_config

    def slow(config):
        # Both threads at the same place, unless one waits for the other to have its weights.
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        return made(config)

    monkeypatch.setattr(ALPS, "from_config", slow)
    fits = (joblib.delayed(one.fit)(images) for one in detectors)
    joblib.Parallel(n_jobs=2, backend="threading")(fits)
    assert torch.equal(torch.get_rng_state(), state)
    for one, scores in zip(detectors, expected, strict=True):
        np.testing.assert_array_equal(one.score_samples(images), scores)


def test_noise_comes_from_random_state(digits) -> None:
    images = digits[0][:40]
    noisy = [quick(perturbation="noise", random_state=seed).fit(images) for seed in (0, 0, 1)]
    state = torch.get_rng_state()
    scores = [one.score_samples(images) for one in noisy]
    assert torch.equal(torch.get_rng_state(), state)
    for same in (noisy[0], noisy[1], pickle.loads(pickle.dumps(noisy[0]))):
        np.testing.assert_array_equal(same.score_samples(images), scores[0])
    assert not np.array_equal(scores[0], scores[2])


# At home in scikit-learn ------------------------------------------------------------------------


def test_pipeline_search_and_clone(digits) -> None:
    normal, images, _ = digits
    rows = np.r_[normal[:60].reshape(60, -1), images[:20].reshape(20, -1)]
    labels = np.r_[np.ones(60), -np.ones(20)]
    shuffled = np.random.default_rng(0).permutation(80)
    pipeline = make_pipeline(StandardScaler(), quick())
    search = GridSearchCV(
        pipeline,
        {"alpsdetector__latent": np.arange(2, 6, 2), "alpsdetector__epochs": np.array([1])},
        scoring="roc_auc",
        cv=2,
        error_score="raise",
    )
    search.fit(rows[shuffled], labels[shuffled])
    assert search.best_params_["alpsdetector__latent"] in (2, 4)
    assert set(search.predict(rows)) <= {-1, 1}
    copy = clone(search.best_estimator_[-1])
    assert copy.get_params() == search.best_estimator_[-1].get_params()
    with pytest.raises(NotFittedError):
        copy.predict(rows)
    with pytest.raises(NotFittedError):
        _ = copy.model_


def test_pickles(digits, tmp_path) -> None:
    images = digits[0][:40]
    detector = quick().fit(images)
    expected = detector.score_samples(images)
    joblib.dump(detector, tmp_path / "detector.joblib")
    again = (
        pickle.loads(pickle.dumps(detector)),
        joblib.load(tmp_path / "detector.joblib", mmap_mode="r"),
    )
    for copy in again:
        np.testing.assert_array_equal(copy.score_samples(images), expected)
        assert copy.offset_ == detector.offset_
        # The weights are its own: training goes on.
        copy.model_.train()
        copy.model_(torch.rand(2, 1, 8, 8)).reconstruction.sum().backward()
    # Arrays, not tensors: nothing in the file says on which device it was trained.
    assert b"torch" not in pickle.dumps(detector)


def test_the_model_is_usable_by_itself(digits, tmp_path) -> None:
    images = (digits[0][:40] * 15.9).astype(np.uint8)
    detector = quick().fit(images)
    fastalps.save(detector.model_, tmp_path / "model.safetensors")
    scorer = fastalps.Scorer(fastalps.load(tmp_path / "model.safetensors"), precision="fp32")
    np.testing.assert_allclose(
        scorer.score_images(images[:, None]), -detector.score_samples(images), rtol=1e-5
    )


# Kinds of input ---------------------------------------------------------------------------------


def test_shapes_mean_the_same(digits) -> None:
    images = digits[0][:40]
    detector = quick().fit(images)
    expected = detector.score_samples(images)
    for other in (images[:, None], images.reshape(40, 64), images.reshape(40, 64).tolist()):
        np.testing.assert_array_equal(quick().fit(other).score_samples(other), expected)
        np.testing.assert_array_equal(detector.score_samples(other), expected)
    assert detector.n_features_in_ == 64
    wide = quick(image_size=(8, 16)).fit(np.tile(images, 2).reshape(40, -1))
    assert wide.model_.config.image_size == (8, 16)
    coloured = quick(image_size=8).fit(np.repeat(images[:, None], 3, 1).reshape(40, -1))
    assert coloured.model_.config.channels == 3
    assert quick(image_size=None).fit(images.reshape(40, 64)).model_.config.image_size == (8, 8)


def test_tensors_and_lists_are_arrays(digits) -> None:
    images = (digits[0][:40] * 15.9).astype(np.uint8)
    detector = quick().fit(images)
    expected = detector.score_samples(images)
    tensor = torch.from_numpy(images)
    for other in (tensor, list(tensor), list(images), tuple(images), tensor.reshape(40, 64)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(detector.score_samples(other), expected)
            np.testing.assert_array_equal(quick().fit(other).score_samples(other), expected)
    values = images.astype(float)
    detector = quick().fit(values)
    weights = torch.from_numpy(values).requires_grad_()
    for same in (values.tolist(), weights, weights.bfloat16()):  # Whole numbers to 256 are exact.
        np.testing.assert_array_equal(detector.score_samples(same), detector.score_samples(values))
    with pytest.raises(ValueError, match=r"X must be samples of one size, got .*; resize them"):
        quick().fit([np.zeros((8, 8)), np.zeros((9, 9))])


@pytest.mark.parametrize(
    ("features", "side"), [(1, 8), (20, 8), (63, 8), (65, 9), (80, 9), (82, 10), (300, 18)]
)
def test_features_fill_the_smallest_square(features, side) -> None:
    rows = np.random.default_rng(0).normal(size=(30, features))
    layout = Layout.learn(rows, None, "auto")
    assert layout.shape == (1, side, side)
    pixels = layout.pixels(rows).reshape(30, -1)
    assert pixels.min() >= 0 and pixels.max() <= 0.75 + 1e-6
    assert (pixels[:, features:] == 0).all()
    used = pixels[:, :features]
    torch.testing.assert_close(used.min(0).values, torch.full((features,), 0.25))
    torch.testing.assert_close(used.max(0).values, torch.full((features,), 0.75))


def test_scales() -> None:
    generator = np.random.default_rng(0)
    gray = generator.integers(0, 200, (6, 8, 8)).astype(np.uint8)
    rows, shape = flattened(gray)
    unit = Layout.learn(rows, shape, "auto")
    assert unit.unit
    torch.testing.assert_close(unit.pixels(rows)[:, 0], torch.from_numpy(gray / 255).float())
    # Floats within [0, 1] are pixels, whatever their extremes.
    low = Layout.learn(rows / 1000, shape, "auto")
    assert low.unit and low.pixels(rows / 1000).max() < 0.2
    torch.testing.assert_close(low.pixels(rows), unit.pixels(rows))
    # Others have the scale of what was fitted, one for all pixels; the border is half of it away.
    other = Layout.learn(rows.astype(float), shape, "auto")
    assert not other.unit
    top = rows.max()
    found = other.pixels(np.full((1, 64), top * 1.25)).unique().tolist()
    assert found == pytest.approx([0.875], abs=0.01)
    assert other.pixels(np.full((1, 64), 1e300)).unique().tolist() == [1]
    # A constant feature is in the middle of nowhere, and anything else differs from it.
    constant = Layout.learn(np.full((5, 3), 7.0), None, "auto")
    assert constant.pixels(np.full((1, 3), 7.0))[0, 0, 0, :3].tolist() == [0.25] * 3
    assert constant.pixels(np.full((1, 3), 7.5))[0, 0, 0, :3].tolist() == [0.5] * 3


def test_other_units_than_fitted_are_told(digits) -> None:
    images = digits[0][:20] / 16
    detector = quick().fit(images)
    with pytest.warns(UserWarning, match=r"must be uint8 .* or floating .*, as when fitted"):
        detector.score_samples(images * 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score_samples(images * 1.2)
        detector.score_samples((images * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("scale", "unit", "told"),
    [
        (255 / 16, 1, "X must be 0 to 16, as when fitted, got 0 to 255; scale it"),
        (1 / 16, 1, "X must be 0 to 16, as when fitted, got 0 to 1; scale it"),
        (1 / 255, 16, r"X must be uint8 \(0 to 255\) or floating \(0 to 1\), .* got 0 to 0.0039"),
    ],
)
def test_images_in_other_units_are_told(digits, scale, unit, told) -> None:
    images = digits[0] / unit
    for other in (images, images.reshape(140, -1)):
        detector = quick(epochs=1).fit(other)
        with pytest.warns(UserWarning, match=told):
            detector.predict(other * scale)


def test_features_in_other_units_are_told() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 5))
    rows[:, 4] = 7
    detector = quick(epochs=1).fit(rows)
    for scale in (1000, [1, 1, 1000, 1, 1], 1e-3):
        with pytest.warns(UserWarning, match=r"X must be -.* in feature \d, as when fitted, got -"):
            detector.score_samples(rows[:10] * scale)
    with pytest.warns(UserWarning, match="in feature 1, as when fitted"):
        detector.score_samples(rows + np.array([0, 273, 0, 0, 0]))


def test_ordinary_values_are_of_the_same_units(digits) -> None:
    generator = np.random.default_rng(0)
    heavy = generator.lognormal(sigma=2, size=(1000, 300))
    clusters = generator.normal(size=(300, 4)) + np.arange(300)[:, None] // 100 * 100
    sparse = (generator.random((200, 20)) < 0.05).astype(float)
    images = digits[0]
    blank, bright = np.zeros((3, 8, 8)), np.where(np.arange(64) == 9, 500, images.reshape(-1, 64))
    cases = [
        (heavy[:900], [heavy[900:], heavy[900:910], heavy[900:901]]),
        (clusters, [clusters[100:120], clusters[280:], clusters[:3] * 50]),
        # What is normal among outliers, and outliers among what is normal.
        (np.r_[clusters[:90], clusters[:10] * 100], [clusters[:90]]),
        (clusters[:100], [np.r_[clusters[:60], clusters[:50] * 1e4]]),
        (sparse, [sparse[:10] * 0, sparse[:10] * 0 + 1]),
        (images, [digits[1], images[:1], blank, np.r_[images, bright[:20].reshape(-1, 8, 8)]]),
        (images / 160, [images / 16, blank, (images * 15).astype(np.uint8) // 15]),
        (np.full((10, 8, 8), 7.0), [images]),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fitted, others in cases:
            rows, shape = flattened(fitted)
            layout = Layout.learn(rows, shape, None)
            for other in (fitted, *others):
                layout.check_units(flattened(other)[0])


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 8, 8), "minimum of 2 is required"),
        ({}, (1, 5), "minimum of 2 is required"),
        ({}, (0, 8, 8), "minimum of 1 is required"),
        ({}, (9,), "Expected 2D array"),
        ({}, (4, 1, 1, 8, 8), r"X must be \(N, features\)"),
        ({}, (4, 7, 9), "at least 8 x 8 pixels, got 7 x 9"),
        ({"image_size": 9}, (4, 8, 8), "X must have images of 9 x 9 pixels, got 8 x 8"),
        ({"image_size": 9}, (4, 80), "multiple of 9 x 9 = 81 values a sample, got 80"),
        ({"image_size": "big"}, (4, 64), 'image_size must be "auto", None'),
        ({"image_size": (8, 8, 8)}, (4, 64), 'image_size must be "auto", None'),
        ({"contamination": 0.7}, (4, 64), r"contamination must be in \(0, 0.5\], got 0.7"),
        ({"contamination": "auto"}, (4, 64), r"contamination must be in \(0, 0.5\], got 'auto'"),
        ({"epochs": 0}, (4, 64), "epochs: expected an integer of at least 1"),
        ({"batch_size": 1}, (4, 64), "batch_size: expected at least 2, which batch norm needs"),
        ({"score_kind": "best"}, (4, 64), "score_kind: expected one of normal"),
        ({"preset": "huge"}, (4, 64), "preset: expected one of"),
        ({"device": "cuda:99"}, (4, 64), "device: cuda:99 is not here"),
    ],
)
def test_wrong_input(options, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**options).fit(np.random.default_rng(0).uniform(size=shape))


def test_wrong_values(digits) -> None:
    images = digits[0][:20].copy()
    detector = quick().fit(images)
    with pytest.raises(ValueError, match=r"images of 1 x 8 x 8 .*, got 1 x 4 x 16"):
        detector.predict(images.reshape(20, 4, 16))
    with pytest.raises(ValueError, match="X has 65 features, but ALPSDetector is expecting 64"):
        detector.predict(np.zeros((3, 65)))
    images[3, 2, 1] = np.nan
    for broken in (images, images.reshape(20, 64)):
        with pytest.raises(ValueError, match="NaN"):
            quick().fit(broken)
        with pytest.raises(ValueError, match="NaN"):
            detector.predict(broken)
    with pytest.raises(ValueError, match="float64 can tell apart"):
        quick().fit(np.array([[1e308, 0.0], [-1e308, 1.0]]))


def test_a_failed_fit_changes_nothing(digits, monkeypatch) -> None:
    images = digits[0][:20]
    detector = quick().fit(images)
    expected, attributes = detector.score_samples(images), dict(vars(detector))
    with pytest.raises(ValueError, match="at least 8 x 8 pixels, got 4 x 4"):
        detector.fit(np.zeros((10, 4, 4)))
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            detector.fit(np.random.default_rng(0).uniform(size=(10, 20)))
    assert vars(detector) == attributes
    np.testing.assert_array_equal(detector.score_samples(images), expected)
    assert detector.fit(np.random.default_rng(0).uniform(size=(10, 20))).n_features_in_ == 20
