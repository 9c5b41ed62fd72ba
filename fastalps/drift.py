"""Drift: telling when a stream's scores no longer look like those that the threshold was set on.

The threshold's false-positive rate holds only while normal data scores as the held-out normal data
did. `DriftMonitor` compares a stream with them, window by window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalps.calibration import UNITS, Calibration, order_statistic
from fastalps.scalars import is_whole

# The quantiles that are watched. Not the far ones: a few anomalies are no drift.
WATCHED = (0.1, 0.5, 0.9)
# Independent scores in a window unless the caller says otherwise. At the default false-alarm rate a
# window drifts when about three quarters of it lie beyond the median, or a quarter beyond a decile.
INDEPENDENT_SCORES = 64


@dataclass(frozen=True)
class Drift:
    """A window whose scores are not distributed like the held-out normal ones.

    Attributes:
        first: of the window's items, counted from 0.
        last: behind its last one.
        probability: of the quantile that tells most, such as 0.5 for the median.
        score: that quantile of the held-out normal scores.
        above: whether too many scores lie above it, or too many below.
        share: of the window on that side of it.
        expected: the share that held-out normal scores have there.
        p_value: bound on the probability of this or more where nothing drifted.
        unit: what was scored: "images", "patches" or "frames".
    """

    first: int
    last: int
    probability: float
    score: float
    above: bool
    share: float
    expected: float
    p_value: float
    unit: str

    def __str__(self) -> str:
        """One line: what was seen, what it means, what to do."""
        side = "above" if self.above else "below"
        return (
            f"drift: {100 * self.share:.0f}% of {self.unit} {self.first + 1} to {self.last} score "
            f"{side} {self.score:.4g}, where {100 * self.expected:.0f}% of held-out normal "
            f"{self.unit} do; the scene or the camera has changed, or much of this is anomalous: "
            "the threshold's false-positive rate does not hold; look at the scores, and calibrate "
            "on recent normal data"
        )


class DriftMonitor:
    """Watches the scores of a stream in windows that follow one another.

    In a window of m scores, the number above the k-th smallest of n held-out normal scores is
    beta-binomial, BetaBin(m, n - k + 1, k), whatever the distribution of the scores, as long as
    both come from the same one (an exact precedence test, and conservative where scores tie).
    Successive video frames are alike: m and the parameters are divided by `calibration.correlation`
    first. The window drifts when one of the tails beyond the quantiles `WATCHED`, above or below,
    has a probability below ``false_alarm_rate / (2 * len(WATCHED))``.

    So of the windows of a stream that does not drift, at most `false_alarm_rate` are reported, on
    average over calibrations: exactly for independent scores, and for correlated ones as far as
    `correlation` is right.

    Args:
        calibration: what the scores are compared with, from `Scorer.calibrate`.
        window: scores in a window; None = 64 independent ones: ``ceil(64 * correlation)``.
        false_alarm_rate: of a window, between 0 and 1.

    Attributes:
        window: scores in a window.
        seen: scores so far.
        windows: windows tested.
        drifted: how many of them drifted.
        smallest: scores that a window needs for any of them to be a drift.

    Raises:
        ValueError: a calibration without quantiles, an argument out of its range.
    """

    def __init__(
        self,
        calibration: Calibration,
        window: int | None = None,
        false_alarm_rate: float = 1e-3,
    ) -> None:
        if not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate must be between 0 and 1, got {false_alarm_rate}")
        stored = dict(calibration.quantiles)
        if any(probability not in stored for probability in WATCHED):
            raise ValueError(
                "calibration must hold the quantiles of the normal scores, this one does not; "
                "calibrate with this version of fastalps"
            )
        self.calibration = calibration
        self.false_alarm_rate = false_alarm_rate
        self._quantiles = [(probability, stored[probability]) for probability in WATCHED]
        if window is None:
            window = math.ceil(INDEPENDENT_SCORES * calibration.correlation)
        if not is_whole(window):
            raise ValueError(f"window must be a number of scores from 1 up, got {window!r}")
        self.window = window
        self.smallest = self._smallest()
        self.seen = self.windows = self.drifted = 0
        self._held = torch.empty(0, dtype=torch.float64)

    def update(self, scores: Any) -> Drift | None:
        """Takes in the stream's next scores.

        Args:
            scores: (n,) floating, a tensor, array or sequence: of the calibration's kind and level;
                n may be 0.

        Returns:
            the first drift among the windows that these scores completed, or None.

        Raises:
            ValueError: wrong shape, or a score that is not finite.
        """
        values = torch.as_tensor(scores).detach().to("cpu", torch.float64)
        if values.dim() != 1:
            raise ValueError(f"scores must be (n,), got shape {tuple(values.shape)}")
        if not torch.isfinite(values).all():
            raise ValueError("scores must be finite, got NaN or infinite ones")
        self._held = torch.cat([self._held, values])
        self.seen += len(values)
        found = None
        while len(self._held) >= self.window:
            drift = self._test(self._held[: self.window], self.seen - len(self._held))
            self._held = self._held[self.window :]
            found = found or drift
        return found

    def finish(self) -> Drift | None:
        """Tests what no window holds yet, at the end of a stream; a drift, or None.

        Fewer scores than `smallest` are left untested.
        """
        rest, self._held = self._held, self._held[:0]
        return self._test(rest, self.seen - len(rest)) if len(rest) >= self.smallest else None

    def summary(self) -> str:
        """What came of it so far, in a line without a full stop."""
        unit = UNITS[self.calibration.level]
        if self.windows == 0:
            return f"drift: not told from {self.seen} {unit}, at least {self.smallest} are needed"
        return (
            f"drift: in {self.drifted} of {self.windows} windows of up to {self.window} {unit} "
            f"(false-alarm rate {100 * self.false_alarm_rate:g}% of a window)"
        )

    def _test(self, scores: Tensor, first: int) -> Drift | None:
        self.windows += 1
        bound = self.false_alarm_rate
        found: Drift | None = None
        for probability, quantile in self._quantiles:
            for above in (True, False):
                beyond = int(((scores > quantile) if above else (scores < quantile)).sum())
                p_value = 2 * len(WATCHED) * self._tail(beyond, len(scores), probability, above)
                if p_value < bound:
                    bound = p_value
                    found = Drift(
                        first=first,
                        last=first + len(scores),
                        probability=probability,
                        score=quantile,
                        above=above,
                        share=beyond / len(scores),
                        expected=1 - probability if above else probability,
                        p_value=p_value,
                        unit=UNITS[self.calibration.level],
                    )
        self.drifted += found is not None
        return found

    def _tail(self, beyond: int, count: int, probability: float, above: bool) -> float:
        """P(at least `beyond` of `count` scores lie beyond a quantile)."""
        correlation, normals = self.calibration.correlation, self.calibration.samples
        rank = order_statistic(normals, probability)
        under, over = rank / correlation, (normals - rank + 1) / correlation
        size = int(count / correlation)
        successes, failures = (over, under) if above else (under, over)
        return _beta_binomial_tail(int(beyond / correlation), size, successes, failures)

    def _smallest(self) -> int:
        """The fewest scores that are a drift if they all lie beyond a quantile, on either side."""
        low, high = 1, 2

        def tells(count: int) -> bool:
            return all(
                2 * len(WATCHED) * min(self._tail(count, count, p, above) for p in WATCHED)
                < self.false_alarm_rate
                for above in (True, False)
            )

        while not tells(high):
            low, high = high, 2 * high
            if high > 1 << 40:
                return high
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if tells(middle) else (middle + 1, high)
        return low


def _beta_binomial_tail(least: int, size: int, successes: float, failures: float) -> float:
    """P(X >= least) for X ~ BetaBin(size, successes, failures)."""
    if least <= 0:
        return 1.0
    j = torch.arange(least, size + 1, dtype=torch.float64)
    log = torch.lgamma
    total = torch.tensor([size + 1.0, successes, failures, successes + failures]).double()
    choose = log(total[0]) - log(j + 1) - log(size - j + 1)
    both = log(j + successes) + log(size - j + failures) - log(size + total[3])
    alone = log(total[1]) + log(total[2]) - log(total[3])
    return float((choose + both - alone).exp().sum().clamp(max=1.0))
