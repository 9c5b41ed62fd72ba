"""Streams of frames to a device and back, without a GPU: values, order, errors.

`lagging_device.py` has the device; test_streaming_cuda.py is about a real one.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastalps import ALPS, MotionGate, Scorer, streaming
from fastalps.stage_times import StageTimes
from fastalps.streaming import Staging, one_ahead
from tests.clips import KINDS, brightening, kind_of, moving, reusing, same
from tests.lagging_device import Event, Lagging, Stream, on, streamed


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [[23], [4] * 5 + [3], [1] * 23, [2, 9, 0, 1, 11]], ids=len)
@pytest.mark.parametrize("frames_a_buffer", [1, 3, 100])
def test_streamed_scores_are_those_of_the_clip(
    model: ALPS, rng, monkeypatch, gated, sizes, frames_a_buffer
) -> None:
    frames = moving(23, rng)
    gate = MotionGate(2.0, background=frames.median(0).values) if gated else None
    scorer = Scorer(model, precision="fp32", gate=gate)
    whole = scorer.score_frames(frames)
    monkeypatch.setattr(streaming, "BUFFER_BYTES", frames_a_buffer * frames[0].nbytes)
    for seed in range(5):
        results = streamed(scorer, iter(frames.split(sizes)), Lagging(seed))
        assert [len(result) for result in results] == sizes
        assert same(results, whole)


def test_the_device_lags(model: ALPS, rng) -> None:
    """Where streams do not wait for each other, scores are wrong: the other tests would see it."""
    frames = moving(23, rng)
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(frames)
    right = [
        same(streamed(scorer, iter(frames.split(4)), Lagging(seed, waits=False)), whole)
        for seed in range(10)
    ]
    assert not all(right)


def test_frames_in_bands(model: ALPS, rng, monkeypatch) -> None:
    frames = moving(5, rng)
    scorer = Scorer(model, precision="fp32", stride=3)
    whole = scorer.score_frames(frames)
    limits = {"bytes_per_pixel": 4, "limit": 12_000}
    monkeypatch.setattr("fastalps.chunks.plan_chunks.__kwdefaults__", limits)
    assert same(streamed(scorer, iter(frames.split(2)), Lagging(1)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_frames(model: ALPS, rng, kind) -> None:
    values = kind_of(moving(6, rng), kind)
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(values)
    chunks = list(values) if kind == "single" else [values[:4], values[4:]]
    assert same(streamed(scorer, chunks, Lagging(2)), whole)


def test_a_source_may_use_its_memory_again(model: ALPS, rng) -> None:
    frames = moving(22, rng)
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(frames)
    for seed in range(5):
        assert same(streamed(scorer, reusing(frames, 4), Lagging(seed)), whole)


def test_pinned_frames_are_copied_from_where_they_are(model: ALPS, rng, monkeypatch) -> None:
    """Without a buffer of the host; and their owner may use the memory again."""
    frames = moving(22, rng)
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(frames)
    monkeypatch.setattr(streaming, "_is_pinned", lambda tensor: True)
    for seed in range(5):
        device, dtypes = Lagging(seed), set()

        def memory(shape, dtype, device=device, dtypes=dtypes, made=device.memory):
            dtypes.add(dtype)
            return made(shape, dtype)

        device.memory = memory
        assert same(streamed(scorer, reusing(frames, 4), device), whole)
        # Only what scores come back into.
        assert dtypes == {torch.float32}


def test_learned_background_follows_the_stream(model: ALPS, rng) -> None:
    frames = brightening(rng)
    scorer = Scorer(model, precision="fp32", gate=MotionGate(4.0))
    expected = list(scorer.score_frames(frames.split(10)))
    found = streamed(scorer, frames.split(10), Lagging(3))
    assert all(same([one], other) for one, other in zip(found, expected, strict=True))


def test_one_chunk_ahead(model: ALPS, rng) -> None:
    taken, frames = [], moving(20, rng)

    def source():
        for number, chunk in enumerate(frames.split(2)):
            taken.append(number)
            yield chunk

    scorer = Scorer(model, precision="fp32")
    with on(Lagging(4), scorer):
        results = scorer.score_frames(source())
        assert not taken
        for number in range(10):
            next(results)
            assert taken[-1] == min(number + 1, 9)
        assert next(results, None) is None


def test_the_caller_may_change_streams(model: ALPS, rng) -> None:
    frames = moving(20, rng)
    gate = MotionGate(2.0, background=frames.median(0).values)
    scorer = Scorer(model, precision="fp32", gate=gate)
    whole = scorer.score_frames(frames)
    for seed in range(5):
        device, found = Lagging(seed), []
        with on(device, scorer):
            results = scorer.score_frames(frames.split(2))
            for _ in range(10):
                with device.stream(Stream(device)):
                    found.append(next(results))
        assert same(found, whole)


def test_nothing_else_is_waited_for(model: ALPS, rng, monkeypatch) -> None:
    """A wait for each chunk's scores, and one for the buffer of each copy."""
    waits = []
    original = Event.synchronize
    monkeypatch.setattr(Event, "synchronize", lambda self: waits.append(self) or original(self))
    streamed(Scorer(model, precision="fp32"), moving(20, rng).split(2), Lagging(4))
    assert len(waits) == 10 + 10


def test_two_buffers(monkeypatch) -> None:
    """Two uploads wait for nothing that the device does; the third waits for the first."""
    device = Lagging(0)
    device.random = SimpleNamespace(choice=lambda options: options[0])  # Idle unless waited for.
    monkeypatch.setattr(streaming, "cuda", device)
    monkeypatch.setattr(streaming, "_pinned", device.memory)
    monkeypatch.setattr(streaming, "_keep_for", lambda tensor, stream: None)
    staging = Staging(torch.device("cpu"))
    done = []
    for number in range(3):
        with device:
            staging.upload(torch.full((4, 5, 6), number))
        staging.release()
        device.now.work.append(lambda number=number: done.append(number))
        left = sum(len(stream.work) for stream in device.streams)
        assert (left == 7 * (number + 1)) == (number < 2)


@pytest.mark.parametrize("error", [ValueError("the lens fell off"), KeyboardInterrupt()], ids=type)
def test_an_error_comes_behind_the_scores_before_it(model: ALPS, rng, error) -> None:
    frames, closed = moving(9, rng), []
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(frames)

    def source():
        try:
            yield from frames.split(3)
            raise error
        finally:
            closed.append(True)

    results = []
    with on(Lagging(5), scorer), pytest.raises(type(error), match=str(error) or None):
        results.extend(scorer.score_frames(source()))
    assert closed and same(results, whole)


def test_a_wrong_chunk_is_an_error_behind_the_scores_before_it(model: ALPS, rng) -> None:
    frames = moving(4, rng)
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(frames)
    with on(Lagging(6), scorer):
        results = scorer.score_frames([frames, frames[:, :-1]])
        assert same([next(results)], whole)
        with pytest.raises(ValueError, match="keep one size"):
            next(results)


def test_leaving_early_closes_the_source(model: ALPS, rng) -> None:
    closed = []

    def source():
        try:
            yield from moving(9, rng).split(3)
        finally:
            closed.append(True)

    scorer = Scorer(model, precision="fp32")
    with on(Lagging(7), scorer):
        results = scorer.score_frames(source())
        next(results)
        results.close()
    assert closed


def test_calls_take_the_buffers_of_those_before(model: ALPS, rng, monkeypatch) -> None:
    """Behind inference mode, other frames, a stream cut off, and a background that has changed."""
    frames = moving(20, rng)
    background = frames.median(0).values
    gate = MotionGate(2.0, background=background)
    plain, scorer = (Scorer(model, precision="fp32", gate=gate) for _ in range(2))
    for seed in range(5):
        device, ways = Lagging(seed), []
        monkeypatch.setattr(
            streaming, "Staging", lambda *args, ways=ways: ways.append(Staging(*args)) or ways[-1]
        )
        with on(device, scorer):
            for part in (frames, frames[1:9], frames.flip(0), frames[:1], frames[3:9]):
                with torch.inference_mode(part is frames):
                    found = scorer.score_frames(part)
                assert same([found], plain.score_frames(part))
                background ^= 64
            assert len(ways) == 1
            cut_off = scorer.score_frames(frames.split(3))
            next(cut_off)
            for part in (frames[2:6], frames[7:9]):
                assert same([scorer.score_frames(part)], plain.score_frames(part))
            cut_off.close()
            assert same(list(scorer.score_frames(frames.split(6))), plain.score_frames(frames))
            assert len(ways) == 2


def test_times_of_the_device(model: ALPS, rng) -> None:
    frames = moving(20, rng)
    scorer = Scorer(model, precision="fp32")
    scorer.times = times = StageTimes()
    whole = scorer.score_frames(frames)
    assert same(streamed(scorer, frames.split(4), Lagging(8)), whole)
    # The events of the device that is made up are a second apart.
    assert times.worked[streaming.COPY] == times.worked[streaming.COMPUTE] == 5
    assert times.worked[streaming.DEVICE_WAIT] > 0


def test_one_ahead() -> None:
    assert list(one_ahead(iter([]))) == []
    assert list(one_ahead(iter(range(5)))) == [0, 1, 2, 3, 4]
