"""What a report needs of a stream of scores, in memory that does not depend on its length."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from fastalps.calibration import Calibration
from fastalps.drift import Drift, DriftMonitor
from fastalps.errors import UserError

logger = logging.getLogger("fastalps")

# A screen shows fewer.
POINTS = 4096
BINS = 60


class Trace:
    """The course of the scores in at most `POINTS` points, each the highest of `step` frames.

    Attributes:
        step: frames a point: 1, and twice as many whenever the points would be too many.
    """

    def __init__(self) -> None:
        self.step = 1
        self._points = torch.empty(0)
        self._rest = torch.empty(0)

    def add(self, scores: Tensor) -> None:
        """Takes in the next scores, (n,)."""
        self._rest = torch.cat([self._rest, scores.float()])
        while True:
            count = min(len(self._rest) // self.step, POINTS - len(self._points))
            blocks = self._rest[: count * self.step].reshape(-1, self.step).amax(1)
            self._points = torch.cat([self._points, blocks])
            self._rest = self._rest[count * self.step :]
            if len(self._points) < POINTS:
                return
            self._points = self._points.reshape(-1, 2).amax(1)
            self.step *= 2

    def points(self) -> Tensor:
        """(m,) float32; the last may stand for fewer frames."""
        if not len(self._rest):
            return self._points
        return torch.cat([self._points, self._rest.amax().reshape(1)])


class Histogram:
    """Counts of scores in bins of one width from 0 up; the width doubles when a score lies beyond.

    Attributes:
        counts: int64 (BINS,).
        width: of a bin.
    """

    def __init__(self, threshold: float) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        # Three thresholds fill the bins until something exceeds them.
        self.width = 3 * threshold / BINS if threshold > 0 else 1e-6

    def add(self, scores: Tensor) -> None:
        """Takes in scores, (n,), not negative."""
        if not len(scores):
            return
        highest = float(scores.max())
        while highest >= self.width * BINS:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.width *= 2
        index = (scores.double() / self.width).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS)


class ScoreSummary:
    """Trace, histogram and counts of the frames' scores.

    Args:
        threshold: above which a frame is flagged.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.frames = self.flagged = 0
        self.highest = -math.inf
        self.trace = Trace()
        self.histogram = Histogram(threshold)

    def add(self, scores: Tensor) -> None:
        """Takes in the next frames' scores, (n,) float32."""
        if not len(scores):
            return
        if not torch.isfinite(scores).all():
            raise UserError("the scores are not finite; the model's weights are broken")
        self.frames += len(scores)
        self.flagged += int((scores > self.threshold).sum())
        self.highest = max(self.highest, float(scores.max()))
        self.trace.add(scores)
        self.histogram.add(scores)


class Watch:
    """Compares scores with those of the calibration, and says so when they drift for the first
    time. Models saved before calibrations kept quantiles have nothing to compare with."""

    def __init__(self, calibration: Calibration) -> None:
        self.monitor = DriftMonitor(calibration) if calibration.quantiles else None
        self.first: Drift | None = None

    def add(self, scores: Tensor) -> None:
        """Takes in the next scores, (n,)."""
        if self.monitor is not None:
            self._report(self.monitor.update(scores))

    def finish(self) -> None:
        """Compares the scores that fill no window."""
        if self.monitor is not None:
            self._report(self.monitor.finish())

    def _report(self, drift: Drift | None) -> None:
        if drift is not None and self.first is None:
            self.first = drift
            logger.warning("%s", drift)

    def text(self) -> str | None:
        """What came of it, in a line; None where nothing could be compared."""
        return None if self.monitor is None else self.monitor.summary()

    def facts(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        if self.monitor is None:
            return {}
        return {
            "drift": {
                "windows": self.monitor.windows,
                "window": self.monitor.window,
                "drifted": self.monitor.drifted,
                "false_alarm_rate_of_a_window": self.monitor.false_alarm_rate,
                "first": None if self.first is None else str(self.first),
            }
        }
