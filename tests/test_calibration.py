"""Thresholds: from scores, and from the images, frames and patches that a Scorer calibrates on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastalps
from fastalps import ALPS, MotionGate, Scorer
from fastalps.calibration import threshold_at
from fastalps.data import Clip
from tests.clips import moving
from tests.images import pixels_of


@pytest.mark.filterwarnings("ignore:.*too few for a false-positive rate")
@pytest.mark.parametrize("target", [0.01, 0.05, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_threshold_is_the_smallest_that_holds_the_target(rng, target, ties) -> None:
    for count in (1, 2, 7, 100, 101, 1000):
        scores = torch.rand(count, generator=rng)
        if ties:
            scores = (scores * 10).round()
        threshold = threshold_at(scores, target)
        assert (scores > threshold).sum() <= target * count + 1e-9
        smaller = scores[scores < threshold]
        if smaller.numel():
            assert (scores > smaller.max()).sum() > target * count - 1e-9


def test_calibration_of_images(model: ALPS, rng: torch.Generator) -> None:
    images = pixels_of((200, 1, 12, 12), rng)
    scorer = Scorer(model, "normal")
    calibration = scorer.calibrate(images, target_fpr=0.05)
    assert (scorer.score_images(images) > calibration.threshold).sum() == 10
    assert (calibration.score, calibration.level, calibration.samples) == ("normal", "image", 200)
    assert calibration.target_false_positive_rate == 0.05


def test_calibration_of_frames_and_patches(model: ALPS, rng: torch.Generator) -> None:
    frames = moving(60, rng)
    gate = MotionGate(2.0, background=frames.median(0).values)
    scorer = Scorer(model, gate=gate, frame_reduce="topk", top_k=2)
    result = scorer.score_frames(frames)
    by_frame = scorer.calibrate(frames, 0.1, level="frame")
    assert int((result.frames > by_frame.threshold).sum()) == 6
    assert by_frame.samples == 60
    assert by_frame.settings["top_k"] == 2
    assert by_frame.settings["gate_threshold"] == 2.0
    by_patch = scorer.calibrate(frames, 0.1, level="patch")
    kept = int(result.kept.sum())
    assert by_patch.samples == kept
    assert int((result.patches > by_patch.threshold).sum()) == int(0.1 * kept)
    for data in (frames.split(7), [Clip("a", frames[:25]), Clip("b", frames[25:])]):
        assert scorer.calibrate(data, 0.1, level="frame") == by_frame


def test_numbers_of_numpy_are_kept_as_pythons(model: ALPS, rng: torch.Generator, tmp_path) -> None:
    frames = moving(20, rng)
    path = tmp_path / "model.safetensors"
    for threshold in (np.float32(2), np.int64(2), torch.tensor(2.0)):
        gate = MotionGate(threshold)
        scorer = Scorer(model, gate=gate, frame_reduce="topk", top_k=np.int64(2))
        found = scorer.calibrate(frames, np.float32(0.1), level="frame")
        assert found == Scorer(model, gate=MotionGate(2.0), frame_reduce="topk", top_k=2).calibrate(
            frames, float(np.float32(0.1)), level="frame"
        )
        fastalps.save(model, path, found)
        assert fastalps.load(path).calibration == found


def test_threshold_of_an_array() -> None:
    scores = np.linspace(0, 1, 101, dtype=np.float32)
    assert threshold_at(scores, 0.1) == threshold_at(torch.from_numpy(scores), np.float64(0.1))


def test_calibration_refuses_what_it_cannot_use(model: ALPS, rng: torch.Generator) -> None:
    scorer = Scorer(model)
    images = pixels_of((20, 1, 12, 12), rng)
    for target in (0, 1, -0.5, 2, float("nan")):
        with pytest.raises(ValueError, match="target_fpr must be between 0 and 1"):
            scorer.calibrate(images, target)
    with pytest.raises(ValueError, match="normal_data must not be empty"):
        scorer.calibrate(images[:0], 0.1)
    for nothing in ([], torch.empty(0, 24, 24, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="normal_data must not be empty"):
            scorer.calibrate(nothing, 0.1, level="frame")
    with pytest.raises(ValueError, match="level must be one of image, patch, frame, got 'video'"):
        scorer.calibrate(images, 0.1, level="video")
    with pytest.warns(UserWarning, match="20 normal scores are too few .* use at least 100"):
        assert scorer.calibrate(images, 0.01).threshold == scorer.score_images(images).max()
