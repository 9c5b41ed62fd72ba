"""Anomalies rehearsed from normal clips: one thing in a frame moves too fast.

Options of video detectors have to be chosen without an anomaly. Here a normal clip is played at
twice or three times its speed, and the scores of one neighbourhood of that are pasted over those of
the clip at its own speed: a frame in which all walk and one runs. How well an option ranks such
frames above the untouched ones is what it is chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastalps import metrics, ops
from fastalps.data import Clip
from fastalps.frame_scores import reduce_patches

# Means of a frame's highest scores. An object covers four times as many half-overlapping patches.
TOP = (1, 3, 12)
# Neighbourhoods drawn for each frame.
DRAWS = 5


def faster(clip: Clip, speed: int) -> Clip:
    """The clip at `speed` times its speed: every so many frames of it."""
    return Clip(f"{clip.name} x{speed}", clip.frames[::speed].contiguous(), None, None)


def figures(
    pairs: Sequence[Sequence[tuple[dict[str, Tensor], Tensor]]],
    speed: int,
    patch_size: int,
    stride: int,
    frame_size: Sequence[int],
    seed: int = 0,
) -> dict[str, float]:
    """AUROC of rehearsed frames against untouched ones, by "<kind of score>, top <k>".

    Args:
        pairs: for each clip, (scores by kind, each (T, P); kept bool (T, P)) of the clip and of it
            at `speed`.
        patch_size, stride, frame_size: of the grid that the scores lie on.
        seed: of the draw of neighbourhoods: around a moving patch, patches whose origins are at
            most a patch away.
    """
    rows, columns = ops.patch_grid(frame_size, patch_size, stride)
    origins = torch.tensor([(r, c) for r in rows for c in columns])
    reach = (origins[:, None] - origins[None]).abs().amax(2) <= patch_size
    random = np.random.RandomState(seed)
    untouched: dict[str, list[Tensor]] = {}
    rehearsed: dict[str, list[Tensor]] = {}
    for (slow, _), (fast, kept) in pairs:
        # The first frame has no frame before it.
        times = [t for t in range(1, len(kept)) if kept[t].any()] * DRAWS
        spots = [random.choice(kept[t].nonzero().flatten().numpy()) for t in times]
        near = reach[torch.from_numpy(np.array(spots, dtype=np.int64))]
        for kind, values in slow.items():
            before = values[[t * speed for t in times]]
            after = torch.where(near, fast[kind][times], before)
            for top_k in TOP:
                key = f"{kind}, top {top_k}"
                untouched.setdefault(key, []).append(reduce_patches(before, "topk", top_k))
                rehearsed.setdefault(key, []).append(reduce_patches(after, "topk", top_k))
    result = {}
    for key, parts in untouched.items():
        normal, odd = torch.cat(parts), torch.cat(rehearsed[key])
        labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(odd))]).bool()
        result[key] = round(metrics.auroc(torch.cat([normal, odd]), labels), 5)
    return result
