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
    settings: dict[str, Any] = {"precision": scorer.precision}
    if level == "image":
        scores = scorer.score_images(normal_data)
    else:
        parts = [_level_scores(result, level) for result in _results(scorer, normal_data)]
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


def _level_scores(result: FrameScores, level: str) -> Tensor:
    if level == "frame":
        return result.frames.cpu()
    kept = result.kept
    return (result.patches.flatten() if kept is None else result.patches[kept]).cpu()
