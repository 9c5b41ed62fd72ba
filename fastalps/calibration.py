"""A threshold from normal data alone: no anomaly is needed to set it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalps.checkpoint import LEVELS, Calibration
from fastalps.inputs import is_array

# Of the held-out normal scores, kept with the threshold.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

if TYPE_CHECKING:
    from fastalps.frame_scores import FrameScores
    from fastalps.scoring import Scorer


def threshold_at(scores: Tensor, target_fpr: float) -> float:
    """The smallest of the scores that at most ``target_fpr * N`` of them exceed.

    Flagged is what scores above the threshold, so at most this share of the N is.

    Args:
        scores: (N,) floating, of normal data; finite.
        target_fpr: false-positive rate, between 0 and 1 (exclusive).

    Raises:
        ValueError: no scores, one that is not finite, or a target out of its range.
    """
    if not (isinstance(target_fpr, (int, float)) and 0 < target_fpr < 1):
        raise ValueError(f"target_fpr must be between 0 and 1, got {target_fpr!r}")
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
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Equal scores share their middle rank: ranks by position would rise along a run of them.
    ranks = (counts.cumsum(0).double() - 0.5 * (counts + 1))[inverse]
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
