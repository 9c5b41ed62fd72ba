"""Evaluation by the rules that results must state: images, patches of frames, frames.

Figures are fractions in [0, 1]. Labels choose nothing here: they are only compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastalps import metrics, ops
from fastalps.chunks import plan_chunks
from fastalps.frame_scores import FRAME_REDUCES, FrameScores, check_frame_reduce, reduce_patches
from fastalps.inputs import is_array, pair, to_tensor
from fastalps.scalars import is_whole

if TYPE_CHECKING:
    from fastalps.data import Clip
    from fastalps.models import Scores

# Share of a patch's pixels in the mask above which the patch is anomalous.
OVERLAP = 0.3
NEGATIVES = ("none", "rest")
DROPPED = ("zero", "left out")


def figures(scores: Any, anomalous: Any) -> dict[str, Any]:
    """AUROC, AUPR and EER with the counts they rest on.

    Args:
        scores, anomalous: (N,), see `fastalps.metrics.roc`.

    Returns:
        `auroc`, `aupr`, `eer` (None where only one class is present), `count`, `positives`.
    """
    values = torch.as_tensor(scores)
    labels = torch.as_tensor(anomalous)
    positives = int(labels.sum())
    result: dict[str, Any] = dict.fromkeys(("auroc", "aupr", "eer"))
    if 0 < positives < labels.numel() or values.shape != labels.shape:
        result["auroc"] = metrics.auroc(values, labels)
        result["aupr"] = metrics.aupr(values, labels)
        result["eer"] = metrics.eer(values, labels)
    return {**result, "count": labels.numel(), "positives": positives}


def evaluate_images(scores: Scores, anomalous: Tensor) -> dict[str, Any]:
    """Figures of each kind of score of test images.

    Args:
        scores: named normal, perturbed, average, each (N,), as of `Scorer.scores_images`.
        anomalous: bool (N,).

    Returns:
        {"normal": `figures`, "perturbed": ..., "average": ...}.

    Raises:
        ValueError: lengths differ, scores not finite, or only one class is present.
    """
    result = {}
    for kind in ("normal", "perturbed", "average"):
        values = getattr(scores, kind)
        metrics.roc(values, anomalous)  # One class only is an error here, not a missing figure.
        result[kind] = figures(values, anomalous)
    return result


def patch_labels(
    masks: Tensor | np.ndarray[Any, Any],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    edge: str = "cover",
    overlap: float = OVERLAP,
) -> Tensor:
    """Labels of patches from masks of anomalous pixels.

    Args:
        masks: bool or uint8 (N, H, W); anything but 0 is anomalous.
        patch_size, stride, edge: see `fastalps.ops.patch_grid`.
        overlap: from 0 to 1 (exclusive).

    Returns:
        int8 (N, P): 1 = more than `overlap` of the patch's pixels are anomalous; 0 = none is;
        -1 = between the two, to be left out (and counted).

    Raises:
        ValueError, TypeError: a shape, dtype or overlap out of range.
    """
    if not is_array(masks) or str(masks.dtype).removeprefix("torch.") not in ("bool", "uint8"):
        kind = getattr(masks, "dtype", type(masks).__name__)
        raise TypeError(f"masks must be a bool or uint8 (N, H, W) tensor or array, got {kind}")
    if masks.ndim != 3:
        raise ValueError(f"masks must be (N, H, W), got shape {tuple(masks.shape)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be from 0 to 1 (exclusive), got {overlap}")
    patch = pair(patch_size, "patch_size")
    plan = plan_chunks(tuple(masks.shape[1:]), patch, stride, edge)
    labels = torch.empty(len(masks), plan.patches, dtype=torch.int8)
    area = patch[0] * patch[1]
    for part, band in plan.pieces(len(masks)):
        pixels = to_tensor(masks[part, band.top : band.bottom]).cpu() != 0
        tiles = ops.tile_patches(pixels.to(torch.uint8), patch, stride, edge=edge, scale=1.0)
        # float32 counts pixels exactly up to 2^24 of them.
        covered = tiles.sum((2, 3, 4))
        labels[part, band.first : band.last] = torch.where(
            covered > overlap * area, 1, torch.where(covered == 0, 0, -1)
        ).to(torch.int8)
    return labels


def evaluate_video(
    clip_scores: Sequence[FrameScores | Tensor],
    clips: Sequence[Clip],
    *,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    edge: str = "cover",
    kept: Sequence[Tensor] | None = None,
    overlap: float = OVERLAP,
    negatives: str = "none",
    frame_reduces: Sequence[str] = FRAME_REDUCES,
    top_k: int = 3,
    dropped: str = "zero",
    per_clip: bool = False,
    smooth: int = 1,
) -> dict[str, Any]:
    """Patch- and frame-level figures of scored clips, over all patches and over the gated ones.

    Args:
        clip_scores: a `FrameScores`, or patch scores (T, P), of each clip.
        clips: with labels, masks or both; a clip without masks is left out at patch level, one
            without labels at frame level.
        patch_size, stride, edge: as the patches were cut.
        kept: bool (T, P) of each clip, the gated patches; None = those of the `FrameScores`, or no
            gated figures where there are none.
        overlap: see `patch_labels`. It decides the figure: a patch-level number without it means
            nothing.
        negatives: "none" = patches without any anomalous pixel, those between left out; "rest" =
            every patch that is not anomalous.
        frame_reduces, top_k: see `fastalps.frame_scores.reduce_patches`.
        dropped: what the patches that the gate dropped are to a frame's gated score: "zero" = they
            count as 0, as a gated `fastalps.Scorer` has them; "left out" = only kept patches are
            reduced, 0 where there is none. Maxima are the same.
        per_clip: adds figures with each clip's frame scores scaled to [0, 1] on their own, common
            in older work. It uses the whole clip and hides how scores compare between clips.
        smooth: frames of a moving average over each clip's frame scores (odd); above 1 it adds
            figures under names that end in `_smooth<frames>`.

    Returns:
        {"rules": ..., "patch": {"all": `figures` and `left_out`, "gated": ...},
        "frame": {"micro": {"max": {"all": `figures`, "gated": ...}, ...}}}. `micro` ranks the
        frames of all clips at once; the other groups are `per_clip`, `micro_smooth21` and the like.
        A level that no clip has ground truth for is absent.

    Raises:
        ValueError: counts or shapes that do not agree, an unknown rule, no ground truth at all.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}")
    if dropped not in DROPPED:
        raise ValueError(f"dropped must be one of {', '.join(DROPPED)}, got {dropped!r}")
    for reduce in frame_reduces:
        check_frame_reduce(reduce, top_k)
    _check_window(smooth)
    patch = pair(patch_size, "patch_size")
    step = patch if stride is None else pair(stride, "stride")
    patches, gates = _clip_patches(clip_scores, clips, kept, (patch, step, edge))
    result: dict[str, Any] = {
        "rules": {
            "patch_size": list(patch),
            "stride": list(step),
            "edge": edge,
            "overlap": overlap,
            "negatives": negatives,
            "top_k": top_k,
            "dropped": dropped,
            "clips": len(clips),
            "frames": sum(len(scores) for scores in patches),
        }
    }
    labels = [
        None if clip.masks is None else patch_labels(clip.masks, patch, step, edge, overlap)
        for clip in clips
    ]
    masked = [i for i, label in enumerate(labels) if label is not None]
    if masked:
        result["patch"] = _patch_level(
            torch.cat([patches[i].flatten() for i in masked]),
            torch.cat([label.flatten() for label in labels if label is not None]),
            None if gates is None else torch.cat([gates[i].flatten() for i in masked]),
            negatives,
        )
    labelled = [i for i, clip in enumerate(clips) if clip.labels is not None]
    if labelled:
        truth = torch.cat([clip.labels for clip in clips if clip.labels is not None])
        groups: dict[str, dict[str, Any]] = {}
        for reduce in frame_reduces:
            for gated in ("all", "gated") if gates is not None else ("all",):
                curves = [
                    _frame_curve(
                        patches[i],
                        gates[i] if gates and gated == "gated" else None,
                        reduce,
                        top_k,
                        dropped,
                    )
                    for i in labelled
                ]
                for name, values in _groups(curves, per_clip, smooth).items():
                    levels = groups.setdefault(name, {}).setdefault(reduce, {})
                    levels[gated] = figures(values, truth)
        result["frame"] = groups
    if not masked and not labelled:
        raise ValueError("clips must have labels or masks: there is nothing to compare with")
    return result


def smooth_scores(scores: Tensor, window: int) -> Tensor:
    """Centred moving average over time, the first and last values repeated beyond the ends.

    Args:
        scores: (T,) floating, of one clip.
        window: frames, odd; 1 changes nothing.

    Returns:
        (T,) float32.
    """
    _check_window(window)
    if scores.numel() == 0:
        return scores.float()
    reach = window // 2
    index = torch.arange(-reach, scores.numel() + reach).clamp(0, scores.numel() - 1)
    return scores.double()[index].unfold(0, window, 1).mean(1).float()


def motion_baseline(
    clips: Iterable[Clip],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    edge: str = "cover",
) -> list[Tensor]:
    """Scores without any learning: how much each patch changed since the frame before.

    ``score[t, p] = sqrt(mean over the patch of (frame[t] - frame[t - 1])**2)`` in gray levels. A
    clip's first frame, which has none before it, takes the scores of its second.

    Args:
        clips: whose frames are scored.
        patch_size, stride, edge: see `fastalps.ops.patch_grid`.

    Returns:
        for each clip, (T, P) float32; zeros for a clip of one frame.
    """
    patch = pair(patch_size, "patch_size")
    results = []
    for clip in clips:
        frames = clip.frames
        plan = plan_chunks(tuple(frames.shape[1:]), patch, stride, edge)
        scores = torch.zeros(len(frames), plan.patches)
        for part, band in plan.pieces(len(frames) - 1):
            rows = slice(band.top, band.bottom)
            pixels = frames[part.start : part.stop + 1, rows]
            tiles = ops.tile_patches(pixels, patch, stride, edge=edge, scale=1.0)
            change = ops.per_sample_mse(tiles[1:].flatten(0, 1), tiles[:-1].flatten(0, 1))
            scores[part.start + 1 : part.stop + 1, band.first : band.last] = (
                change.sqrt().unflatten(0, (-1, band.last - band.first))
            )
        if len(frames) > 1:
            scores[0] = scores[1]
        results.append(scores)
    return results


def _clip_patches(
    clip_scores: Sequence[FrameScores | Tensor],
    clips: Sequence[Clip],
    kept: Sequence[Tensor] | None,
    cut: tuple[tuple[int, int], tuple[int, int], str],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Patch scores and gates of the clips on the CPU, checked against their frames."""
    if len(clip_scores) != len(clips) or (kept is not None and len(kept) != len(clips)):
        raise ValueError(
            f"clip_scores and kept must have one entry for each clip, got {len(clip_scores)} "
            f"and {'no' if kept is None else len(kept)} entries for {len(clips)} clips"
        )
    patches, gates = [], []
    for i, (scores, clip) in enumerate(zip(clip_scores, clips, strict=True)):
        gate = None if kept is None else kept[i]
        if isinstance(scores, FrameScores):
            if (scores.patch_size, scores.stride, scores.edge) != cut:
                raise ValueError(
                    f"clip_scores of {clip.name} were cut with patch_size, stride, edge = "
                    f"{(scores.patch_size, scores.stride, scores.edge)}, not {cut}"
                )
            gate = scores.kept if gate is None else gate
            scores = scores.patches
        rows, columns = ops.patch_grid(tuple(clip.frames.shape[1:]), *cut)
        expected = (len(clip.frames), len(rows) * len(columns))
        for name, value in (("clip_scores", scores), ("kept", gate)):
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(
                    f"{name} of {clip.name} must be (frames, patches) = {expected}, "
                    f"got {tuple(value.shape)}"
                )
        patches.append(scores.detach().float().cpu())
        if gate is not None:
            gates.append(gate.bool().cpu())
    if gates and len(gates) != len(clips):
        raise ValueError(f"clip_scores: {len(gates)} of {len(clips)} clips were gated; gate all")
    return patches, gates or None


def _frame_curve(
    patches: Tensor, kept: Tensor | None, reduce: str, top_k: int, dropped: str
) -> Tensor:
    if kept is not None and dropped == "zero":
        patches, kept = patches.where(kept, 0.0), None
    return reduce_patches(patches, reduce, top_k, kept)


def _patch_level(
    scores: Tensor, labels: Tensor, kept: Tensor | None, negatives: str
) -> dict[str, Any]:
    result = {}
    for name, chosen in (("all", torch.ones_like(labels, dtype=torch.bool)), ("gated", kept)):
        if chosen is None:
            continue
        used = chosen if negatives == "rest" else chosen & (labels >= 0)
        result[name] = {
            **figures(scores[used], labels[used] == 1),
            "left_out": int(chosen.sum()) - int(used.sum()),
        }
    return result


def _groups(curves: Sequence[Tensor], per_clip: bool, smooth: int) -> dict[str, Tensor]:
    """Frame scores of all clips, by the name of what was done to them."""
    groups = {}
    for window in (1, smooth) if smooth > 1 else (1,):
        suffix = f"_smooth{window}" if window > 1 else ""
        smoothed = [smooth_scores(curve, window) for curve in curves]
        groups[f"micro{suffix}"] = torch.cat(smoothed)
        if per_clip:
            scaled = [metrics.minmax(curve) for curve in smoothed if curve.numel()]
            groups[f"per_clip{suffix}"] = torch.from_numpy(np.concatenate([np.empty(0), *scaled]))
    return groups


def _check_window(window: int) -> None:
    if not is_whole(window) or window % 2 == 0:
        raise ValueError(f"smooth must be an odd number of frames from 1 up, got {window!r}")
