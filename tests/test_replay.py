"""Which calls of the fused engine are replayed, without a GPU: a graph here does its work anew.

The tests of real graphs, marked `gpu`, are in test_fused.py.
"""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastalps import ALPS, ops
from fastalps.fused import MOST_REPLAYED, FusedEngine, replay
from fastalps.fused.replay import Repeats
from fastalps.testing import poisoned

CUT = ((28, 28), (7, 9), "cover")


def test_a_kind_is_made_at_its_second_time():
    repeats, made = Repeats(2), []

    def find(kind):
        return repeats.find(kind, lambda: made.append(kind) or len(made))

    assert [find(kind) for kind in "aabaab"] == [None, 1, None, 1, 1, 2]
    assert made == ["a", "b"]
    # The one that was asked for longest ago is forgotten.
    assert [find(kind) for kind in "caac"] == [None, None, 3, 4]
    # As are kinds that take turns.
    made.clear()
    assert [find(kind) for kind in 5 * "xyz"] == 15 * [None] and not made


def test_what_could_not_be_made_is_asked_for_again():
    repeats = Repeats(2)
    repeats.find("a", lambda: 1)
    with pytest.raises(ZeroDivisionError):
        repeats.find("a", lambda: 1 // 0)
    assert repeats.find("a", lambda: 2) == 2


def test_a_copy_begins_anew():
    repeats = Repeats(3)
    assert [repeats.find("a", lambda: 1) for _ in range(2)] == [None, 1]
    again = copy.deepcopy(repeats)
    assert again.limit == 3 and again.find("a", lambda: 2) is None


def test_nothing_is_replayed_on_a_cpu():
    assert replay.stream_of(torch.device("cpu")) is None


@pytest.mark.parametrize("error", [None, ValueError("the kernels refuse")], ids=type)
def test_a_capture_ends(monkeypatch, error):
    """Whatever happens inside, on another stream than the caller's."""
    said = []

    class Graph:
        def capture_begin(self, capture_error_mode: str) -> None:
            said.append(f"begin {capture_error_mode}")

        def capture_end(self) -> None:
            said.append("end")

        def replay(self) -> None:
            said.append("replay")

    @contextlib.contextmanager
    def stream(made):
        said.append(made)
        try:
            yield
        finally:
            said.append("left")

    def work() -> None:
        said.append("work")
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with pytest.raises(ValueError, match="refuse") if error else contextlib.nullcontext():
        replay.capture(work, torch.device("cuda", 3))()
    expected = ["stream of cuda:3", "begin thread_local", "work", "end", "left"]
    assert said == expected + ([] if error else ["replay"])


class Device:
    """In place of a CUDA device."""

    def __init__(self) -> None:
        self.stream: int | None = 1  # None while a caller captures.
        self.captured = 0

    def capture(self, work, device: torch.device):
        assert not torch.is_inference_mode_enabled()
        self.captured += 1
        return work


def fake_errors(
    frames, background, threshold, stride, cover, shape, weights, biases, bound, slope,
    strength, smoothing, normal, perturbed, chunk, scratch, flags, places, errors,
) -> None:  # fmt: skip
    """In place of the kernels: means of patches, of each pass and the weights other ones."""
    cut = {"edge": "cover" if cover else "drop", "scale": 1.0}
    means = ops.tile_patches(frames, 28, stride, **cut).mean((2, 3, 4))
    passes = [number for number, run in ((1, normal), (2, perturbed)) if run]
    errors.copy_(torch.stack([number * means for number in passes]) + weights[0, 0, 0].float())
    if background is not None:
        change = (frames.float() - background.float()).abs()
        flags.copy_(ops.tile_patches(change, 28, stride, **cut).mean((2, 3, 4)) > threshold)
        errors.mul_(flags)
    scratch.fill_(1)


@pytest.fixture
def device(monkeypatch):
    registered = torch.library.Library("fastalps", "IMPL", "CPU")
    registered.impl("fused_errors", fake_errors)
    found = Device()
    count = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: count)
    monkeypatch.setattr(replay, "stream_of", lambda device: found.stream)
    monkeypatch.setattr(replay, "capture", found.capture)
    yield found
    registered._destroy()


@pytest.fixture
def engine(device) -> FusedEngine:
    return FusedEngine(ALPS(28, 1, "fast"), torch.device("cpu"))


def frames_of(rng: torch.Generator, count: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 40, 50), dtype=torch.uint8, generator=rng)


def expected_of(engine: FusedEngine, device: Device, *call) -> tuple[Tensor, Tensor | None]:
    """What the engine gives to who captures: nothing is replayed."""
    stream, device.stream = device.stream, None
    found = engine.frame_errors(*call)
    device.stream = stream
    return found


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("passes", ["normal", "both"])
def test_results(engine, device, gated, passes, rng):
    """Of other frames each time, in and out of inference mode; none is written to again."""
    frames = frames_of(rng)
    gate = (frames_of(rng)[0], 85.0) if gated else ()  # What noise differs from noise by.
    expected, moved = expected_of(engine, device, frames, CUT, passes, *gate)
    found = []
    with poisoned():
        for number, frame in enumerate(frames):
            with torch.inference_mode(number in (1, 3)):
                # With other strides, and in four dimensions, a call is of the same kind.
                pixels = frame.mT.contiguous().mT[None]
                pixels = pixels[:, None] if number % 2 else pixels
                found.append(engine.frame_errors(pixels, CUT, passes, *gate))
    assert torch.equal(torch.cat([errors for errors, _ in found], 1), expected)
    assert device.captured == 1
    assert not found[4][0].is_inference()
    found[4][0].add_(1)
    if gated:
        assert moved is not None and 0 < moved.sum() < moved.numel()
        assert torch.equal(torch.cat([kept for _, kept in found]), moved)
        # A background that has changed, and another threshold, which is another kind.
        gate[0].bitwise_xor_(64)
    for threshold in (85.0, 85.0, 84.0, 84.0, 84.0):
        gate = (gate[0], threshold) if gated else ()
        call = (frames[:1], CUT, passes, *gate)
        for one, other in zip(
            engine.frame_errors(*call), expected_of(engine, device, *call), strict=True
        ):
            assert one is None or torch.equal(one, other)
    assert device.captured == 1 + gated


def test_without_perturbation(device, rng):
    engine = FusedEngine(ALPS(28, 1, "fast", perturbation="none"), torch.device("cpu"))
    frames = frames_of(rng)
    found = [engine.frame_errors(frame[None], CUT, "both")[0] for frame in frames]
    assert device.captured == 1 and found[0].shape[0] == 2
    assert torch.equal(torch.cat(found, 1), engine.frame_errors(frames, CUT, "both")[0])


def test_update_shows(engine, device, rng):
    frame = frames_of(rng, 1)
    before = [engine.frame_errors(frame, CUT, "both")[0] for _ in range(3)][-1]
    engine.update(ALPS(28, 1, "fast"))
    found, _ = engine.frame_errors(frame, CUT, "both")
    assert device.captured == 1
    assert torch.equal(found, expected_of(engine, device, frame, CUT, "both")[0])
    assert not torch.equal(found, before)


def test_each_stream_has_its_own(engine, device, rng):
    frame = frames_of(rng, 1)
    for number in range(12):
        device.stream = number % 3
        engine.frame_errors(frame, CUT, "both")
    assert device.captured == 3


def test_what_always_runs(engine, device, rng):
    """While a caller captures; without patches; many patches; more than a chunk."""

    def call(frames: Tensor, times: int = 3) -> None:
        for _ in range(times):
            engine.frame_errors(frames, CUT, "both")

    frames = frames_of(rng, MOST_REPLAYED // 12 + 1)
    assert engine.frame_errors(frames[:1], CUT, "both")[0].shape[2] == 12
    device.stream = None
    call(frames[:1])
    device.stream = 1
    call(frames[:0])
    call(frames)
    engine.chunk = 20
    call(frames[:2])
    assert device.captured == 0
    call(frames[:1], 1)
    assert device.captured == 1


def test_a_copy_of_the_engine(engine, device, rng):
    frame = frames_of(rng, 1)
    found = [engine.frame_errors(frame, CUT, "both")[0] for _ in range(2)][-1]
    again = copy.deepcopy(engine)
    assert all(torch.equal(again.frame_errors(frame, CUT, "both")[0], found) for _ in range(3))
    assert device.captured == 2
