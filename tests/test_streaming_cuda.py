"""Streams of frames to a real device and back: values, order, errors, and whose memory is whose."""

from __future__ import annotations

import pytest
import torch

from fastalps import ALPS, MotionGate, Scorer, streaming
from fastalps.frame_scores import FrameScores
from fastalps.stage_times import StageTimes
from tests.clips import KINDS, brightening, kind_of, moving, reusing, same
from tests.conftest import needs_cuda

pytestmark = [pytest.mark.gpu, needs_cuda]


def cuda_scorer(model: ALPS, gate: MotionGate | None = None) -> Scorer:
    return Scorer(model, precision="fp32", gate=gate, device="cuda")


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Pinned memory, and what is freed on the device, holds what no frame and no score is."""
    original = streaming._pinned

    def pinned(shape, dtype):
        found = original(shape, dtype)
        return found.fill_(torch.nan if dtype.is_floating_point else 1)

    monkeypatch.setattr(streaming, "_pinned", pinned)
    torch.empty(1 << 26, device="cuda").fill_(torch.nan)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [[203], [8] * 25 + [3], [1] * 203, [2, 99, 0, 1, 101]], ids=len)
@pytest.mark.parametrize("frames_a_buffer", [1, 3, 1000])
def test_streams_on_cuda(
    model: ALPS, rng, monkeypatch, poisoned, gated, sizes, frames_a_buffer
) -> None:
    frames = moving(203, rng)
    gate = MotionGate(2.0, background=frames.median(0).values) if gated else None
    scorer = cuda_scorer(model, gate)
    whole = scorer.score_frames(frames)
    monkeypatch.setattr(streaming, "BUFFER_BYTES", frames_a_buffer * frames[0].nbytes)
    for chunks in (frames.split(sizes), frames.cuda().split(sizes)):
        results = list(scorer.score_frames(iter(chunks)))
        assert [len(result) for result in results] == sizes
        assert all(result.patches.device == chunks[0].device for result in results)
        assert not any(result.patches.is_pinned() for result in results)
        moved = [FrameScores(*(
            part.cpu() if isinstance(part, torch.Tensor) else part for part in vars(r).values()
        )) for r in results]  # fmt: skip
        assert same(moved, whole)


@pytest.mark.parametrize("pinned", [False, True])
def test_large_streams_on_cuda(model: ALPS, rng, poisoned, pinned) -> None:
    """Enough work that copies and scores would be late, were they not waited for."""
    frames = moving(64, rng, (480, 640))
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(frames)
    for _ in range(5):
        assert same(list(scorer.score_frames(reusing(frames, 5, pinned))), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_frames_on_cuda(model: ALPS, rng, poisoned, kind) -> None:
    values = kind_of(moving(6, rng), kind)
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(values)
    chunks = list(values) if kind == "single" else [values[:4], values[4:]]
    assert same(list(scorer.score_frames(chunks)), whole)


def test_learned_background_on_cuda(model: ALPS, rng, poisoned) -> None:
    frames = brightening(rng)
    gate = MotionGate(4.0)
    expected = Scorer(model, precision="fp32", gate=gate, device="cpu")
    found = list(cuda_scorer(model, gate).score_frames(frames.split(10)))
    for one, other in zip(found, expected.score_frames(frames.split(10)), strict=True):
        assert same([one], other)


def test_errors_of_a_source_on_cuda(model: ALPS, rng, poisoned) -> None:
    frames = moving(9, rng)
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(frames)

    def source():
        yield from frames.split(3)
        raise ValueError("the lens fell off")

    results = []
    with pytest.raises(ValueError, match="lens"):
        results.extend(scorer.score_frames(source()))
    assert same(results, whole)
    # Left in the middle; memory is used again at once.
    for _ in range(20):
        next(iter(scorer.score_frames(frames.split(2))))
    assert same(list(scorer.score_frames(frames.split(2))), whole)


def test_the_callers_stream_on_cuda(model: ALPS, rng, poisoned) -> None:
    """Another current stream for each chunk."""
    frames = moving(24, rng)
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(frames)
    results, found = scorer.score_frames(frames.split(3)), []
    for _ in range(8):
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(next(results))
    assert same(found, whole)


def test_times_on_cuda(model: ALPS, rng) -> None:
    frames = moving(64, rng, (480, 640))
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(frames)
    scorer.times = times = StageTimes()
    assert same(list(scorer.score_frames(frames.split(8))), whole)
    assert 0 < times.worked[streaming.COPY] < times.worked[streaming.COMPUTE] * 1000
    assert times.worked[streaming.DEVICE_WAIT] > 0
