"""A threshold from normal data alone: no anomaly is needed to set it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalps.frame_scores import check_frame_reduce
from fastalps.inputs import is_array, to_tensor
from fastalps.models import check_kind
from fastalps.scalars import is_whole, plain
from fastalps.smoothing import check_size

UNITS = {"image": "images", "patch": "patches", "frame": "frames"}
LEVELS = tuple(UNITS)
SCORE_MEANING = (
    "a score is a mean squared error of pixels in [0, 1]: 0 is a perfect reconstruction, higher is "
    "more anomalous"
)
EDGES = ("cover", "drop", "error")
FRAMES = ("gray", "motion")
# In a setting; larger ones are no pictures but ways to exhaust the memory of a reader.
LARGEST_SIDE = 65536
# Of the held-out normal scores, kept with the threshold.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

if TYPE_CHECKING:
    from fastalps.frame_scores import FrameScores
    from fastalps.scoring import Scorer


@dataclass(frozen=True)
class Calibration:
    """A threshold set on held-out normal data; what scores above it is flagged.

    Attributes:
        threshold: mean squared error of images in [0, 1].
        score: the kind it is for: "normal", "perturbed" or "average".
        level: what was scored: "image", "patch" or "frame".
        target_false_positive_rate: the share of normal samples that may be flagged.
        samples: how many normal samples it was set on.
        settings: how they were scored. Always "precision" (str) and "smoothing" (int). Of patches
            and frames also "patch_size" and "stride" ([height, width]), "edge" (str) and
            "gate_threshold" (float, None: no gate); of frames "frame_reduce" (str) and "top_k"
            (int); in runs on video "frames" ("gray" or "motion").
        quantiles: of their scores: pairs (probability, score), both rising; `fastalps.drift`
            compares streams with them. Empty in files of before they were kept.
        correlation: how many successive ones tell as much as one independent one, at least 1.
    """

    threshold: float
    score: str
    level: str
    target_false_positive_rate: float
    samples: int
    settings: dict[str, Any] = field(default_factory=dict)
    quantiles: tuple[tuple[float, float], ...] = ()
    correlation: float = 1.0

    def __post_init__(self) -> None:
        for name in ("threshold", "target_false_positive_rate", "samples", "correlation"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        # JSON has lists only.
        pairs = tuple((float(p), float(score)) for p, score in self.quantiles)
        object.__setattr__(self, "quantiles", pairs)
        check_kind("score", self.score)
        if self.level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(LEVELS)}; got {self.level!r}")
        if not _is_finite(self.threshold):
            raise ValueError(f"threshold: expected a finite number, got {self.threshold}")
        if not 0 < self.target_false_positive_rate < 1:
            raise ValueError(
                "target_false_positive_rate: expected between 0 and 1, "
                f"got {self.target_false_positive_rate}"
            )
        for column, (low, high) in enumerate(((0.0, 1.0), (-math.inf, math.inf))):
            values = [pair[column] for pair in pairs]
            if values != sorted(values) or not all(low < value < high for value in values):
                raise ValueError(
                    "quantiles: expected pairs of a probability between 0 and 1 and a finite "
                    f"score, both rising; got {pairs}"
                )
        if not (_is_finite(self.correlation) and self.correlation >= 1):
            raise ValueError(f"correlation: expected at least 1, got {self.correlation}")
        if not is_whole(self.samples, 0) or self.samples > 2**63:
            raise ValueError(f"samples: expected a number of them, got {self.samples!r}")
        _check_settings(self.settings)

    @property
    def score_meaning(self) -> str:
        """What a score is, without the threshold."""
        smoothing = self.settings.get("smoothing", 1)
        if smoothing == 1:
            return SCORE_MEANING
        pixels = f"pixels in [0, 1], differences averaged over {smoothing} x {smoothing} of them"
        return SCORE_MEANING.replace("pixels in [0, 1]", pixels)

    def explain(self) -> str:
        """What a score is and what the threshold means, in one sentence without a full stop."""
        rate = 100 * self.target_false_positive_rate
        text = (
            f"{self.score_meaning}; above {self.threshold:.6g} it is flagged, which at most "
            f"{rate:g}% of {self.samples} held-out normal {UNITS[self.level]} are"
        )
        median = dict(self.quantiles).get(0.5)
        return text if median is None else f"{text} (half of them score at most {median:.4g})"


def _check_settings(settings: Any) -> None:
    """Raises ValueError for a setting that scoring cannot take; unknown ones may be anything."""
    if not isinstance(settings, dict):
        raise ValueError(f"settings: expected names with values, got {type(settings).__name__}")
    check_frame_reduce(settings.get("frame_reduce", "max"), settings.get("top_k", 3))
    check_size("smoothing", settings.get("smoothing", 1))
    for name, choices in (("edge", EDGES), ("frames", FRAMES)):
        if name in settings and settings[name] not in choices:
            raise ValueError(
                f"{name}: expected one of {', '.join(choices)}; got {settings[name]!r}"
            )
    for name in ("patch_size", "stride"):
        size = settings.get(name)
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        if size is not None and not (
            len(sides) == 2 and all(is_whole(side) and side <= LARGEST_SIDE for side in sides)
        ):
            raise ValueError(
                f"{name}: expected one or two sides of 1 to {LARGEST_SIDE} pixels, got {size!r}"
            )
    gate = settings.get("gate_threshold")
    if gate is not None and not (_is_finite(gate) and gate >= 0):
        raise ValueError(f"gate_threshold: expected gray levels from 0 up or None, got {gate!r}")
    if not isinstance(settings.get("precision", ""), str):
        raise ValueError(f"precision: expected its name, got {settings['precision']!r}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def threshold_at(scores: Tensor, target_fpr: float) -> float:
    """The smallest of the scores that at most ``target_fpr * N`` of them exceed.

    Flagged is what scores above the threshold, so at most this share of the N is.

    Args:
        scores: (N,) floating, of normal data; finite.
        target_fpr: false-positive rate, between 0 and 1 (exclusive).

    Raises:
        ValueError: no scores, one that is not finite, or a target out of its range.
    """
    target_fpr = plain(target_fpr)
    if not (isinstance(target_fpr, (int, float)) and 0 < target_fpr < 1):
        raise ValueError(f"target_fpr must be between 0 and 1, got {target_fpr!r}")
    scores = to_tensor(scores)
    count = scores.numel()
    if count == 0:
        raise ValueError("normal_data must not be empty: there is no threshold of no scores")
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite to calibrate on; check the model's weights")
    if count * target_fpr < 1:
        warnings.warn(
            f"{count} normal scores are too few for a false-positive rate of {target_fpr}: the "
            f"threshold is their maximum; use at least {math.ceil(1 / target_fpr)}",
            stacklevel=3,
        )
    # The factor heals products such as 0.29 * 100 = 28.999999999999996.
    above = math.floor(count * target_fpr * (1 + 1e-12))
    return float(scores.flatten().sort().values[count - 1 - above])


def order_statistic(count: int, probability: float) -> int:
    """The rank, from 1, of the smallest of `count` scores that a share `probability` is at most."""
    # The factor heals products such as 0.07 * 100 = 7.000000000000001.
    return max(1, math.ceil(probability * count * (1 - 1e-12)))


def quantiles_of(scores: Tensor) -> tuple[tuple[float, float], ...]:
    """Pairs of a probability out of `QUANTILES` and that quantile of the scores, one of them."""
    ordered = scores.flatten().sort().values
    return tuple(
        (probability, float(ordered[order_statistic(len(ordered), probability) - 1]))
        for probability in QUANTILES
    )


def middle_ranks(scores: Tensor) -> Tensor:
    """Ranks of (N,) scores from 0 up, float64; equal scores share their middle rank.

    Ranks by position would rise along a run of equal scores, as if they were ordered.
    """
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - 0.5 * (counts + 1))[inverse]


def correlation_length(scores: Tensor) -> float:
    """How many successive scores tell as much about their distribution as one independent score.

    The largest of ``b * var(means of blocks of b) / var(scores)`` over b = 1, 2, 4, ... with at
    least eight blocks, of the scores' ranks (batch means; P. Heidelberger, P. Welch, 1981). 1 for
    independent scores, up to the noise of the estimate, which makes it larger rather than smaller.

    Args:
        scores: (N,) floating, in their order.

    Returns:
        a number from 1 up; 1 where N < 8.
    """
    ranks = middle_ranks(scores)
    total = float(ranks.var(correction=0)) if len(ranks) else 0.0
    longest = 1.0
    block = 1
    while total > 0 and len(ranks) // block >= 8:
        blocks = len(ranks) // block
        means = ranks[: blocks * block].reshape(blocks, block).mean(1)
        longest = max(longest, block * float(means.var()) / total)
        block *= 2
    return longest


def calibrate(
    scorer: Scorer, normal_data: Any, target_fpr: float = 0.01, level: str = "image"
) -> Calibration:
    """Scores held-out normal data and sets the threshold for a target false-positive rate.

    Args:
        scorer: its score kind, gate, patches and frame reduction are what the threshold is for.
        normal_data: data that the model was not trained on. Level "image": images as for
            `Scorer.score_images`. Levels "patch" and "frame": frames as for `Scorer.score_frames`
            (an array, or a stream of chunks of one video), or an iterable of
            `fastalps.data.Clip`s, each with a background of its own.
        target_fpr: share of normal images, patches or frames that may be flagged.
        level: "image", "patch" or "frame". With a gate, level "patch" counts only the patches that
            it keeps, since only they can be flagged.

    Returns:
        a `Calibration`; flagged is what scores above its threshold. Memory: 4 bytes a score.

    Raises:
        ValueError: nothing to calibrate on, a target or level out of range; and as the scorer.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    settings: dict[str, Any] = {
        "precision": scorer.precision,
        "smoothing": scorer.model.config.smoothing,
    }
    if level == "image":
        scores = scorer.score_images(normal_data)
    else:
        parts = [level_scores(result, level) for result in _results(scorer, normal_data)]
        scores = torch.cat(parts) if parts else torch.empty(0)
        settings |= {
            "patch_size": list(scorer.patch_size),
            "stride": list(scorer.stride),
            "edge": scorer.edge,
            "gate_threshold": None if scorer.gate is None else scorer.gate.threshold,
        }
        if level == "frame":
            settings |= {"frame_reduce": scorer.frame_reduce, "top_k": scorer.top_k}
    return Calibration(
        threshold=threshold_at(scores, target_fpr),
        score=scorer.score,
        level=level,
        target_false_positive_rate=float(target_fpr),
        samples=scores.numel(),
        settings=settings,
        quantiles=quantiles_of(scores),
        correlation=correlation_length(scores),
    )


def _results(scorer: Scorer, normal_data: Any) -> Iterator[FrameScores]:
    from fastalps.data import Clip

    if is_array(normal_data):
        yield scorer.score_frames(normal_data)
        return
    if not isinstance(normal_data, Iterable):
        raise TypeError(
            "normal_data must be frames, a stream of them or clips, "
            f"got {type(normal_data).__name__}"
        )
    items = iter(normal_data)
    first = next(items, None)
    if first is None:
        return
    items = itertools.chain([first], items)
    if isinstance(first, Clip):
        for clip in items:
            yield scorer.score_frames(clip.frames)
    else:
        yield from scorer.score_frames(items)


def level_scores(result: FrameScores, level: str) -> Tensor:
    """The scores that a calibration of this level ("patch" or "frame") is about, (n,) on the CPU:
    of the patches, those that the gate kept."""
    if level == "frame":
        return result.frames.cpu()
    kept = result.kept
    return (result.patches.flatten() if kept is None else result.patches[kept]).cpu()
