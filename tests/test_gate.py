"""Backgrounds and the motion gate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalps import MotionGate, ops
from fastalps.data import load_ucsd
from fastalps.gate import StreamingBackground, clip_background
from tests.conftest import data_folder
from tests.images import pixels_of


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 7, 3), (9, 33, 17), (300, 5, 4), (40, 200, 301)])
def test_background_is_the_lower_median(rng: torch.Generator, shape: tuple[int, ...]) -> None:
    frames = pixels_of(shape, rng)
    expected = frames.median(0).values  # torch.median is the lower one
    assert torch.equal(clip_background(frames, None), expected)
    assert torch.equal(clip_background(frames.numpy(), None), expected)


def test_background_reaches_the_ends_of_the_range() -> None:
    frames = torch.tensor([0, 0, 255, 255, 255], dtype=torch.uint8)[:, None, None].expand(5, 2, 2)
    assert (clip_background(frames) == 255).all()
    assert (clip_background(255 - frames) == 0).all()


def test_background_of_many_frames_works_in_blocks(rng: torch.Generator, monkeypatch) -> None:
    frames = pixels_of((50, 9, 11), rng)
    monkeypatch.setattr("fastalps.gate._MEDIAN_BYTES", 150)
    assert torch.equal(clip_background(frames, None), frames.median(0).values)


def test_background_of_a_sample(rng: torch.Generator, tmp_path) -> None:
    frames = pixels_of((100, 6, 5), rng)
    expected = frames[::10].median(0).values
    assert torch.equal(clip_background(frames, 10), expected)
    np.save(tmp_path / "frames.npy", frames.numpy())
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    assert torch.equal(clip_background(mapped, 10), expected)
    assert torch.equal(clip_background(mapped), frames.median(0).values)


def test_background_of_strided_frames(rng: torch.Generator) -> None:
    frames = pixels_of((12, 8, 10), rng)[::2, 1::2, ::3]
    assert torch.equal(clip_background(frames), frames.contiguous().median(0).values)


def test_streaming_background_is_exact_while_all_frames_fit(rng: torch.Generator) -> None:
    frames = pixels_of((30, 6, 7), rng)
    estimate = StreamingBackground(samples=64)
    assert torch.equal(estimate.update(frames[:20]), frames[:20].median(0).values)
    assert torch.equal(estimate.update(frames[20:]), frames.median(0).values)


def test_streaming_background_is_bounded_deterministic_and_uniform() -> None:
    # Frame t is the constant t: the median of a uniform sample is near the middle of the stream.
    frames = torch.arange(250, dtype=torch.uint8)[:, None, None].expand(250, 2, 2)
    results = []
    for _ in range(2):
        estimate = StreamingBackground(samples=32)
        for chunk in frames.split(7):
            background = estimate.update(chunk)
        assert estimate._reservoir is not None
        assert len(estimate._reservoir) == 32
        results.append(background)
    assert torch.equal(*results)
    middles = []
    for seed in range(20):
        estimate = StreamingBackground(samples=32, seed=seed)
        for chunk in frames.split(25):
            background = estimate.update(chunk)
        middles.append(float(background[0, 0]))
    # The median of 32 of 250 has a deviation of about 21, the mean of 20 such of about 5.
    assert abs(np.mean(middles) - 125) < 25


def test_streaming_background_checks_its_frames(rng: torch.Generator) -> None:
    estimate = StreamingBackground()
    with pytest.raises(ValueError, match="no background of no frames"):
        estimate.update(torch.empty(0, 4, 4, dtype=torch.uint8))
    estimate.update(pixels_of((3, 4, 4), rng))
    estimate.update(torch.empty(0, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"keep the size \(4, 4\).*got \(4, 5\)"):
        estimate.update(pixels_of((3, 4, 5), rng))


@pytest.mark.parametrize("edge", ["cover", "drop"])
def test_gate_keeps_what_differs_from_the_background(rng: torch.Generator, edge: str) -> None:
    frames = pixels_of((5, 23, 31), rng) // 16
    background = pixels_of((23, 31), rng) // 16
    gate = MotionGate(threshold=5.0, background=background)
    kept = gate.kept(frames, (7, 9), (4, 5), edge)
    difference = (frames.int() - background.int()).abs().to(torch.float32)
    tiles = ops.tile_patches(difference, (7, 9), (4, 5), edge=edge, scale=1.0)
    expected = tiles.sum((2, 3, 4)) > 5 * 63
    assert 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(kept, expected)


def test_gate_in_small_pieces_is_the_same(rng: torch.Generator, monkeypatch) -> None:
    frames = pixels_of((6, 20, 24), rng) // 32
    gate = MotionGate(threshold=2.5)
    whole = gate.kept(frames, 6, 3)
    monkeypatch.setattr(
        "fastalps.chunks.plan_chunks.__kwdefaults__", {"bytes_per_pixel": 4, "limit": 1000}
    )
    assert torch.equal(gate.kept(frames, 6, 3), whole)
    assert torch.equal(gate.kept(frames.numpy(), 6, 3), whole)


def test_threshold_is_exclusive() -> None:
    background = torch.zeros(4, 4, dtype=torch.uint8)
    frames = torch.full((1, 4, 4), 3, dtype=torch.uint8)
    assert not MotionGate(3.0, background).kept(frames, 4).any()
    frames[0, 0, 0] = 4
    assert MotionGate(3.0, background).kept(frames, 4).all()


def test_gate_of_no_frames() -> None:
    assert MotionGate().kept(torch.empty(0, 8, 8, dtype=torch.uint8), 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": -1.0}, ValueError, "threshold must be .* from 0 up, got -1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold"),
        ({"background": torch.zeros(4, 4)}, TypeError, "uint8 .* got torch.float32"),
        ({"background": torch.zeros(1, 4, 4, dtype=torch.uint8)}, ValueError, r"\(1, 4, 4\)"),
        ({"samples": 0}, ValueError, "samples must be .* from 1 up, got 0"),
    ],
)
def test_bad_gates_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        MotionGate(**arguments)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(2, 4, 4), TypeError, "uint8 gray levels .* got torch.float32"),
        (np.zeros((2, 4, 4), np.int16), TypeError, "got int16"),
        (torch.zeros(4, 4, dtype=torch.uint8), ValueError, r"\(N, H, W\), got shape \(4, 4\)"),
        (torch.zeros(0, 4, 4, dtype=torch.uint8), ValueError, "must not be empty"),
        ([[1]], TypeError, "got list"),
    ],
)
def test_bad_frames_are_refused(frames, error, message) -> None:
    with pytest.raises(error, match=message):
        clip_background(frames)


def test_ped2_patches_kept() -> None:
    clips = load_ucsd(data_folder("UCSDped2"), "ped2", "test")
    gate = MotionGate(threshold=3.0, samples=None)
    kept = [gate.kept(clip.frames, 30) for clip in clips]
    assert sum(part.numel() for part in kept) == 192_960
    # With the lower median. The mean of the middle two frames gives 52,240; the count that the
    # protocol was published with, 52,260, lies between.
    assert sum(int(part.sum()) for part in kept) == 52_283
