"""Where the time of a pipeline goes: its stages on the clock of one thread, and what others did."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# The stage in `StageTimes.worked` of what reads files and decodes them; one piece a frame or image.
DECODE = "decode"


class StageTimes:
    """Seconds of a pipeline's stages.

    The thread that made it drives the pipeline: `lap` divides the time of that thread among the
    stages, so that these add up to the whole. `add`, `calls` and `items` count the work that other
    threads and devices do meanwhile.

    Attributes:
        wall: stage -> seconds that the driving thread spent in it or waited for it.
        worked: stage -> seconds of work; of several threads their sum.
        computed: stage -> those of them in which its threads had a CPU, rather than waited for a
            disk or for other threads; a library's own threads are not seen.
        pieces: stage -> number of pieces of work.
    """

    def __init__(self) -> None:
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.worked: defaultdict[str, float] = defaultdict(float)
        self.computed: defaultdict[str, float] = defaultdict(float)
        self.pieces: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Gives a stage the time of the driving thread since the last lap."""
        now = time.perf_counter()
        self.wall[stage] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the making of this object to the last lap: the sum of `wall`."""
        return sum(self.wall.values())

    def add(self, stage: str, seconds: float, computed: float = 0.0) -> None:
        """Adds a piece of work of a stage; from any thread."""
        with self._lock:
            self.worked[stage] += seconds
            self.computed[stage] += computed
            self.pieces[stage] += 1

    def calls(self, stage: str, function: Callable[[Item], Result]) -> Callable[[Item], Result]:
        """The same function; each call is a piece of work of the stage."""

        def timed(item: Item) -> Result:
            begin, computing = time.perf_counter(), time.thread_time()
            result = function(item)
            seconds, computing = time.perf_counter() - begin, time.thread_time() - computing
            self.add(stage, seconds, computing)
            return result

        return timed

    def items(self, stage: str, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the making of each is a piece of work of the stage."""
        following = self.calls(stage, next)
        while True:
            try:
                item = following(items)
            except StopIteration:
                return
            yield item
