"""Frames to a CUDA device and scores back, without waiting: copies run beside the computation.

Pixels go through two pinned buffers in turn (double buffering): while the device computes with
what came out of one, the next pixels are put into the other and copied on a stream of their own.
Pixels in pinned memory are copied from where they are.
Scores come back into pinned memory, and are waited for when the next chunk is under way.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, cuda

from fastalps.chunks import Plan
from fastalps.stage_times import StageTimes

Item = TypeVar("Item")

# Stages in `StageTimes.worked`: what the device did, and how long the host waited for it.
COPY, COMPUTE, DEVICE_WAIT = "copy", "compute", "device wait"

# Bytes of pixels that a buffer takes, unless a single frame has more: two of them and the fused
# kernels' scratch take less than 64 MB, and starting a copy costs little beside it.
BUFFER_BYTES = 12 << 20


class _Memory:
    """Bytes that grow with what they have to hold."""

    def __init__(self) -> None:
        self.bytes = self._last = torch.empty(0, dtype=torch.uint8)

    def like(self, pixels: Tensor, make: Callable[[int], Tensor]) -> Tensor:
        """A tensor of the pixels' shape and dtype in this memory; of as many bytes, `make` it."""
        # Pieces of one video have one shape, and to view bytes as pixels takes some operations.
        if self._last.shape != pixels.shape or self._last.dtype != pixels.dtype:
            size = pixels.numel() * pixels.element_size()
            # What inference mode makes could not be written to by a later call outside of it.
            with torch.inference_mode(False):
                if size > len(self.bytes):
                    self.bytes = make(size)
                self._last = self.bytes[:size].view(pixels.dtype).view(pixels.shape)
        return self._last


class _Buffer:
    """Pinned memory, its counterpart on the device, and events that say who is done with them."""

    def __init__(self) -> None:
        self.host, self.there = _Memory(), _Memory()
        self.copied, self.read = cuda.Event(), cuda.Event()


class Staging:
    """The way of one stream of frames to a CUDA device, through two buffers in turn.

    `upload` and `release` alternate; what reads the pixels is started between them, on the current
    stream. Only `upload` ever waits, for a copy: that of the buffer that it takes, or, of pixels
    that are in pinned memory already, their own.

    Args:
        device: a CUDA device.
        times: gets the seconds that the device copied and computed, by its own events, and those
            that the host waited for it; None = nothing is timed.
    """

    def __init__(self, device: torch.device, times: StageTimes | None = None) -> None:
        self.device = device
        self._times = times
        self._copies = cuda.Stream(device)
        self._buffers = deque([_Buffer(), _Buffer()])
        self._constant: tuple[Tensor, Tensor] | None = None
        # Stage, and the events at its beginning and end; what is not over yet.
        self._spans: deque[tuple[str, cuda.Event, cuda.Event]] = deque()

    def restart(self, times: StageTimes | None) -> None:
        """For the next stream, when all scores of the last one have come."""
        self._times = times
        self._spans.clear()
        # Its owner may have changed it meanwhile.
        self._constant = None

    def limit(self, plan: Plan, frame_bytes: int) -> Plan:
        """The plan, with at most as many frames at a time as a buffer takes."""
        step = max(1, BUFFER_BYTES // max(1, frame_bytes))
        return Plan(plan.patches, min(plan.step, step), plan.bands)

    def upload(self, pixels: Tensor) -> Tensor:
        """The pixels on the device, for what the current stream does until `release`.

        Args:
            pixels: of any shape and strides, on any device; they may change when this has returned.
        """
        self._buffers.rotate()
        buffer, before = self._buffers
        computing = cuda.current_stream(self.device)
        # Where the caller has changed streams: a network's own buffers are still in use.
        computing.wait_event(before.read)
        if pixels.device.type != "cpu":
            return pixels.to(self.device, non_blocking=True)
        self.wait(buffer.copied)
        there = buffer.there.like(pixels, self._on_device)
        host, pinned = pixels, pixels.is_contiguous() and _is_pinned(pixels)
        if not pinned:
            host = buffer.host.like(pixels, lambda size: _pinned((size,), torch.uint8))
            host.copy_(pixels)
        with cuda.stream(self._copies):
            # What was computed with the buffer's pixels before.
            self._copies.wait_event(buffer.read)
            with self.span(COPY):
                there.copy_(host, non_blocking=True)
            buffer.copied.record(self._copies)
        if pinned:
            # Their owner may change them when this has returned. Until then the device computes
            # with the last ones.
            self.wait(buffer.copied)
        computing.wait_event(buffer.copied)
        _keep_for(buffer.there.bytes, computing)
        return there

    def _on_device(self, size: int) -> Tensor:
        # Of the copying stream's memory, which no other stream has still to read or write.
        with cuda.stream(self._copies):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        """All that reads the last upload has been started."""
        self._buffers[0].read.record(cuda.current_stream(self.device))

    def constant(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; copied only when it is another one than the last time."""
        if self._constant is None or self._constant[0] is not tensor:
            there = tensor
            if tensor.device.type == "cpu":
                # From ordinary memory the host would wait for all that the device has to do.
                there = _pinned(tensor.shape, tensor.dtype).copy_(tensor)
            self._constant = (tensor, there.to(self.device, non_blocking=True))
        _keep_for(self._constant[1], cuda.current_stream(self.device))
        return self._constant[1]

    def wait(self, event: cuda.Event) -> None:
        """Waits until the device has passed an event."""
        begin = time.perf_counter()
        event.synchronize()
        if self._times is not None:
            self._times.add(DEVICE_WAIT, time.perf_counter() - begin)
            # Only what is over is looked at: asking for more would stop the overlap.
            while self._spans and self._spans[0][2].query():
                stage, first, last = self._spans.popleft()
                self._times.add(stage, first.elapsed_time(last) / 1000)

    def span(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Times what is started on the current stream inside, where anything is timed."""
        return contextlib.nullcontext() if self._times is None else self._timed(stage)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        first.record(cuda.current_stream(self.device))
        yield
        last.record(cuda.current_stream(self.device))
        self._spans.append((stage, first, last))


class Stagings:
    """The ways to one device of a scorer's calls and streams, of which several may be under way.

    The one that was left last is kept, with its buffers: streams, events and pinned memory of a
    call of their own would take the host longer than a frame's scores take the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._left: deque[Staging] = deque(maxlen=1)

    def take(self, times: StageTimes | None) -> Staging:
        """For one stream; see `Staging` for `times`."""
        try:
            staging = self._left.pop()
        except IndexError:
            return Staging(self.device, times)
        staging.restart(times)
        return staging

    def leave(self, staging: Staging) -> None:
        """When all scores of its stream have come; what an error has ended is not to be left."""
        self._left.append(staging)

    def __reduce__(self) -> tuple[type[Stagings], tuple[torch.device]]:
        # A copy has its own.
        return Stagings, (self.device,)


class Arriving:
    """Errors and flags of `frame_errors` on their way from the device to the host.

    Args:
        staging: of their stream.
        errors, kept: on the device, as the current stream leaves them.
    """

    def __init__(self, staging: Staging, errors: Tensor, kept: Tensor | None) -> None:
        self._staging = staging
        self._errors = _pinned(errors.shape, errors.dtype)
        self._errors.copy_(errors, non_blocking=True)
        self._kept: Tensor | None = None
        if kept is not None:
            self._kept = _pinned(kept.shape, kept.dtype)
            self._kept.copy_(kept, non_blocking=True)
        self._come = cuda.Event()
        self._come.record(cuda.current_stream(staging.device))

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """Both, in ordinary memory, when they have come."""
        self._staging.wait(self._come)
        # Pinned memory is for passing through: whoever keeps scores must not keep it.
        return self._errors.clone(), None if self._kept is None else self._kept.clone()


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each given when the next one has been made.

    An error of `items` comes behind the items before it, and so does Ctrl-C.
    """
    waiting: deque[Item] = deque()
    end: BaseException | None = None
    try:
        while end is None:
            try:
                waiting.append(next(items))
            except BaseException as error:
                end = error
            while len(waiting) > (end is None):
                yield waiting.popleft()
        if not isinstance(end, StopIteration):
            raise end
    finally:
        # The error knows this frame: together they would keep the source open.
        del end


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that the device can reach by itself; torch keeps what was freed for the next call."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.is_pinned()


def _keep_for(tensor: Tensor, stream: cuda.Stream) -> None:
    """When freed, its memory stays until the stream is done with what it has been given so far."""
    tensor.record_stream(stream)
