"""Calls that come again and again, as CUDA graphs: launching one is all that the host has to do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")

# torch captures one graph at a time in a process.
_capturing = threading.Lock()


class Repeats(Generic[Made]):
    """Which of the last few kinds of calls have come before, and what was made for them.

    A kind that comes once makes nothing, and kinds that take turns beyond the limit make nothing
    over and over. Not for several threads at once: they take `lock` first.

    Args:
        limit: kinds that are remembered.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        self._known: OrderedDict[Hashable, Made | None] = OrderedDict()

    def find(self, kind: Hashable, make: Callable[[], Made]) -> Made | None:
        """What `make` made when the kind came the second time; None the first time."""
        if kind not in self._known:
            self._known[kind] = None
            if len(self._known) > self.limit:
                self._known.popitem(last=False)
            return None
        self._known.move_to_end(kind)
        found = self._known[kind]
        if found is None:
            found = self._known[kind] = make()
        return found

    def __reduce__(self) -> tuple[type[Repeats[Made]], tuple[int]]:
        # A copy has its own: neither locks nor graphs can be copied.
        return Repeats, (self.limit,)


def stream_of(device: torch.device) -> int | None:
    """What names the current stream where its work can be replayed; None on CPUs, and while a
    graph of the caller's is being captured, which is to hold the work itself."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """What does the work anew with each call, on the stream that is current then.

    Args:
        work: starts kernels that have run before, on memory that stays; it neither allocates nor
            waits. So, unlike `torch.cuda.graph`, this need not empty torch's caches, nor wait.
        device: a CUDA device.
    """
    graph = torch.cuda.CUDAGraph()
    with _capturing, torch.cuda.stream(torch.cuda.Stream(device)):
        # What other threads do meanwhile, such as to allocate, is not to end the capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay
