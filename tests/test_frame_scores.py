"""Scores of frames: reduced from those of patches, and as heatmaps."""

from __future__ import annotations

import pytest
import torch

from fastalps import ALPS, Scorer, ops
from fastalps.frame_scores import reduce_patches
from tests.images import pixels_of


@pytest.mark.parametrize("reduce", ["max", "mean", "topk"])
def test_frame_scores_reduce_their_patches(model: ALPS, rng: torch.Generator, reduce) -> None:
    result = Scorer(model, frame_reduce=reduce, top_k=2).score_frames(pixels_of((3, 30, 41), rng))
    ranked = result.patches.sort(1, descending=True).values
    expected = {"max": ranked[:, 0], "mean": ranked.mean(1), "topk": ranked[:, :2].mean(1)}[reduce]
    torch.testing.assert_close(result.frames, expected)


def test_reduction_of_kept_patches_only() -> None:
    patches = torch.tensor([[1.0, 5, 3, 2], [4, 9, 9, 9], [7, 7, 7, 7]])
    kept = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert reduce_patches(patches, "max", kept=kept).tolist() == [3, 4, 0]
    assert reduce_patches(patches, "mean", kept=kept).tolist() == [2, 4, 0]
    assert reduce_patches(patches, "topk", 2, kept).tolist() == [2.5, 4, 0]
    assert reduce_patches(patches, "topk", 9).tolist() == [2.75, 7.75, 7]
    assert reduce_patches(torch.empty(2, 0), "topk").tolist() == [0, 0]


def test_heatmaps_of_chosen_frames(model: ALPS, rng: torch.Generator) -> None:
    result = Scorer(model).score_frames(pixels_of((5, 24, 24), rng))
    whole = result.heatmaps()
    mask = result.frames > result.frames.median()
    for chosen in (
        mask,
        mask.numpy(),
        mask.nonzero()[:, 0],
        slice(1, 3),
        [3, 0],
        (),
        torch.tensor([2]),
    ):
        expected = whole[list(chosen)] if isinstance(chosen, (list, tuple)) else whole[chosen]
        assert torch.equal(result.heatmaps(chosen), expected)


def test_heatmaps_lie_where_the_patches_are(model: ALPS, rng: torch.Generator) -> None:
    frames = pixels_of((4, 30, 41), rng)
    result = Scorer(model).score_frames(frames)
    heatmaps = result.heatmaps()
    assert heatmaps.shape == (4, 30, 41)
    assert heatmaps.dtype == torch.float32
    rows, columns = ops.patch_grid((30, 41), 12)
    assert torch.equal(heatmaps[:, 0, 0], result.patches[:, 0])
    assert torch.equal(heatmaps[:, 29, 40], result.patches[:, -1])
    # Row 18 is covered by the last row of patches, moved back to the border, and the one before.
    assert rows == [0, 12, 18]
    assert columns == [0, 12, 24, 29]
    expected = (result.patches[:, 4] + result.patches[:, 8]) / 2
    torch.testing.assert_close(heatmaps[:, 20, 0], expected)
    highest = result.heatmaps(slice(1, 3), reduce="max")
    torch.testing.assert_close(highest[:, 20, 0], result.patches[1:3, [4, 8]].amax(1))
    assert torch.equal(result.heatmaps([3]), heatmaps[3:])
