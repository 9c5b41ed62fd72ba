"""A made-up device, which does what it is told as late and in as odd an order as it may.

As streams and events allow, that is: a wait that is missing shows in the scores. What it cannot
show is the memory of a real device that is freed too early; test_streaming_cuda.py is for that.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalps import Scorer, ops, streaming
from fastalps.frame_scores import FrameScores
from fastalps.streaming import Stagings

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
