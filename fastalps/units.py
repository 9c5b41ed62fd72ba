"""Whether values are in the units of those that a detector was fitted on.

Judged by medians over samples, of a feature's values or of each image's smallest and largest pixel:
outliers, which a detector is there to see, do not look like other units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Medians of so many samples, evenly spaced, are those of all.
SAMPLED = 1000
# Fewer may all be outliers, or dark.
ENOUGH = 10
SMALL = 0.1


@dataclass(frozen=True, eq=False)
class Units:
    """The fitted range: of all pixels, (1,) each, or of each feature, (F,) each.

    Attributes:
        images: rows are pixels, not features.
        low, high: smallest and largest value.
        size: median of the largest |pixel| of an image, or of a feature's |values|.
    """

    images: bool
    low: Array
    high: Array
    size: Array

    @classmethod
    def learn(cls, rows: Array, low: Any, high: Any, images: bool, scale: float = 1.0) -> Units:
        """Of (N, F) rows, which `scale` brings to the units of the range."""
        size = scale * _medians(_sampled(rows), images)[2]
        return cls(images, np.atleast_1d(low), np.atleast_1d(high), size)

    def differ(self, rows: Array) -> tuple[str, str] | None:
        """Where (N, F) rows are in other units, the ranges: fitted, and found; else None.

        They are where a median lies outside the fitted range by more than that range (of images; of
        any one feature), or where the sizes (of all features) are below a tenth of those fitted.
        Features, and sizes, are judged from `ENOUGH` rows on; constant ones have no range.
        """
        sampled = _sampled(rows)
        least, most, size = _medians(sampled, self.images)
        with np.errstate(over="ignore"):
            span = self.high - self.low
            beyond = (least < self.low - span) | (most > self.high + span)
        beyond &= span > 0
        if len(rows) < ENOUGH:
            beyond &= self.images
        sized = self.size > 0
        below = size[sized] < SMALL * self.size[sized]
        small = len(rows) >= ENOUGH and below.size > 0 and bool(below.all())
        if not beyond.any() and not small:
            return None
        worst = int((beyond if beyond.any() else sized).argmax())
        found = sampled if self.images else sampled[:, worst]
        place = "" if self.images else f" in feature {worst}"
        return (
            f"{self.low[worst]:.4g} to {self.high[worst]:.4g}{place}",
            f"{found.min():.4g} to {found.max():.4g}",
        )


def _sampled(rows: Array) -> Array:
    return rows[:: -(-len(rows) // SAMPLED)].astype(np.float64)


def _medians(rows: Array, images: bool) -> tuple[Array, Array, Array]:
    """Of the smallest value, the largest and the largest |value|: (1,) each or (F,) each."""
    # The mean of the two in the middle may overflow.
    with np.errstate(over="ignore"):
        if not images:
            middle = np.median(rows, 0)
            return middle, middle, np.median(np.abs(rows), 0)
        least, most = rows.min(1), rows.max(1)
        ends = (least, most, np.maximum(-least, most))
        least, most, size = (np.median(values, keepdims=True) for values in ends)
    return least, most, size
