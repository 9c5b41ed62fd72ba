"""Streams of frames to a device and back: values, order, errors; without a GPU on a made-up device.

`Lagging` does what it is told as late and in as odd an order as streams and events allow, so that a
wait that is missing shows in the scores. What it cannot show is the memory of a real device that is
freed too early; the tests marked `gpu` are for that.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalps import ALPS, MotionGate, Scorer, ops, streaming
from fastalps.frame_scores import FrameScores
from fastalps.stage_times import StageTimes
from fastalps.streaming import Staging, Stagings, one_ahead
from tests.test_scoring import moving, needs_cuda, warmed_model

COPY = torch.ops.aten.copy_.default


class Stream:
    def __init__(self, device: Lagging) -> None:
        self.device, self.work = device, deque()
        device.streams.append(self)

    def wait_event(self, event: Event) -> None:
        if self.device.waits:
            self.work.append((event, event.recorded))

    def head(self) -> bool:
        """Whether the first thing to do may be done."""
        if not self.work:
            return False
        first = self.work[0]
        return callable(first) or first[0].passed >= first[1]


class Event:
    def __init__(self, device: Lagging, enable_timing: bool = False) -> None:
        self.device, self.recorded, self.passed = device, 0, 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def reached() -> None:
            self.passed = number

        stream.work.append(reached)

    def synchronize(self) -> None:
        number = self.recorded
        while self.passed < number:
            self.device.step()

    def query(self) -> bool:
        return self.passed == self.recorded

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query() and self.recorded
        return 1000.0


class Lagging(TorchDispatchMode):
    """In place of torch.cuda; as a context, it takes over the copies that a device would make."""

    def __init__(self, seed: int, waits: bool = True) -> None:
        super().__init__()
        self.random, self.waits = random.Random(seed), waits
        self.streams: list[Stream] = []
        self.now = Stream(self)
        # What its work leaves there; kept, so that an address stays its own.
        self.results: dict[int, torch.Tensor] = {}
        self.working = False

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self)

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self, enable_timing)

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def memory(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """Pinned, and poisoned."""
        poison = torch.nan if dtype.is_floating_point else 1
        return torch.full(tuple(shape), poison, dtype=dtype)

    def result(self, *arguments, **options) -> torch.Tensor:
        """What the work of the device will fill; as `torch.full`."""
        made = torch.full(*arguments, **options)
        self.results[made.untyped_storage().data_ptr()] = made
        return made

    def submit(self, work) -> None:
        self.now.work.append(work)
        for _ in range(self.random.choice((0, 0, 0, 1, 3))):
            if any(stream.head() for stream in self.streams):
                self.step()

    def step(self) -> None:
        """Does one thing of one stream."""
        ready = [stream for stream in self.streams if stream.head()]
        assert ready, "everything waits for something"
        work = self.random.choice(ready).work.popleft()
        if callable(work):
            self.working = True
            work()
            self.working = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not COPY or self.working:
            return function(*args, **kwargs)
        late = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if not late and args[1].untyped_storage().data_ptr() not in self.results:
            return function(*args, **kwargs)  # The host's own.
        self.submit(lambda: function(*args[:2]))
        return args[0]


class LateNetwork:
    """Another network, whose work is done when the device comes to it."""

    def __init__(self, network, device: Lagging) -> None:
        self.network, self.lagging, self.device = network, device, network.device

    def frame_errors(self, frames, cut, passes, background=None, threshold=0.0):
        rows, columns = ops.patch_grid(frames.shape[-2:], *cut)
        shape = (len(frames), len(rows) * len(columns))
        found = self.lagging.result((2 if passes == "both" else 1, *shape), torch.nan)
        moved = None if background is None else self.lagging.result(shape, True)

        # In two steps, with a buffer of its own between them, as a CUDA graph has.
        def load() -> None:
            self.loaded = frames.clone()

        def work() -> None:
            errors, kept = self.network.frame_errors(
                self.loaded, cut, passes, background, threshold
            )
            found.copy_(errors)
            if moved is not None:
                moved.copy_(kept)

        self.lagging.submit(load)
        self.lagging.submit(work)
        return found, moved


@contextlib.contextmanager
def on(device: Lagging, scorer: Scorer):
    """Inside, the scorer takes its streams to the device."""
    network = LateNetwork(scorer._networks.current(), device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "cuda", device)
        patch.setattr(streaming, "_pinned", device.memory)
        patch.setattr(streaming, "_keep_for", lambda tensor, stream: None)
        patch.setattr(scorer._networks, "current", lambda: network)
        patch.setattr(scorer, "_stagings", Stagings(scorer.device))
        with device:
            yield


def streamed(scorer: Scorer, chunks, device: Lagging) -> list[FrameScores]:
    """What the scorer gives on the device."""
    with on(device, scorer):
        return list(scorer.score_frames(chunks))


def same(results: list[FrameScores], whole: FrameScores) -> bool:
    """Whether a stream gave what the clip gave; no NaN is."""
    pairs = [(torch.cat([r.patches for r in results]), whole.patches)]
    pairs.append((torch.cat([r.frames for r in results]), whole.frames))
    if whole.kept is not None:
        pairs.append((torch.cat([r.kept for r in results]), whole.kept))
    return all(
        found.shape == expected.shape
        and torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-6)
        for found, expected in pairs
    )


@pytest.fixture(scope="module")
def model() -> ALPS:
    torch.manual_seed(11)
    return warmed_model()


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


KINDS = ("numpy", "strided", "half", "double", "channel", "single")


def kind_of(frames: torch.Tensor, kind: str):
    return {
        "numpy": frames.numpy(),
        "strided": frames.mT.contiguous().mT,
        "half": (frames / 255).half(),
        "double": frames.double() / 255,
        "channel": frames[:, None],
        "single": frames,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_frames(model: ALPS, rng, kind) -> None:
    values = kind_of(moving(6, rng), kind)
    scorer = Scorer(model, precision="fp32")
    whole = scorer.score_frames(values)
    chunks = list(values) if kind == "single" else [values[:4], values[4:]]
    assert same(streamed(scorer, chunks, Lagging(2)), whole)


def reusing(frames: torch.Tensor, size: int, pinned: bool = False):
    """Chunks that are all the same memory."""
    memory = torch.empty_like(frames[:size], pin_memory=pinned)
    for chunk in frames.split(size):
        memory[: len(chunk)] = chunk
        yield memory[: len(chunk)] if pinned else memory[: len(chunk)].numpy()


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


def brightening(rng: torch.Generator) -> torch.Tensor:
    frames = moving(40, rng)
    for t in range(40):
        frames[t] = (frames[t].int() + t).clamp(0, 255)
    return frames


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


# On a GPU ----------------------------------------------------------------------------------------


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


@pytest.mark.gpu
@needs_cuda
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


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_large_streams_on_cuda(model: ALPS, rng, poisoned, pinned) -> None:
    """Enough work that copies and scores would be late, were they not waited for."""
    frames = moving(64, rng, (480, 640))
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(frames)
    for _ in range(5):
        assert same(list(scorer.score_frames(reusing(frames, 5, pinned))), whole)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_frames_on_cuda(model: ALPS, rng, poisoned, kind) -> None:
    values = kind_of(moving(6, rng), kind)
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(values)
    chunks = list(values) if kind == "single" else [values[:4], values[4:]]
    assert same(list(scorer.score_frames(chunks)), whole)


@pytest.mark.gpu
@needs_cuda
def test_learned_background_on_cuda(model: ALPS, rng, poisoned) -> None:
    frames = brightening(rng)
    gate = MotionGate(4.0)
    expected = Scorer(model, precision="fp32", gate=gate, device="cpu")
    found = list(cuda_scorer(model, gate).score_frames(frames.split(10)))
    for one, other in zip(found, expected.score_frames(frames.split(10)), strict=True):
        assert same([one], other)


@pytest.mark.gpu
@needs_cuda
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


@pytest.mark.gpu
@needs_cuda
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


@pytest.mark.gpu
@needs_cuda
def test_times_on_cuda(model: ALPS, rng) -> None:
    frames = moving(64, rng, (480, 640))
    scorer = cuda_scorer(model)
    whole = scorer.score_frames(frames)
    scorer.times = times = StageTimes()
    assert same(list(scorer.score_frames(frames.split(8))), whole)
    assert 0 < times.worked[streaming.COPY] < times.worked[streaming.COMPUTE] * 1000
    assert times.worked[streaming.DEVICE_WAIT] > 0
