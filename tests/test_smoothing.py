"""Errors of smoothed residuals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastalps
from fastalps import ops
from fastalps.smoothing import smooth, smoothed_errors, smoothed_scores


@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("shape", [(3, 1, 8, 11), (2, 3, 2, 1), (1, 1, 1, 1), (0, 1, 4, 4)])
def test_smoothing_is_the_mean_of_the_neighbours_there_are(rng, size, shape) -> None:
    images = torch.rand(shape, generator=rng, dtype=torch.float64)
    expected = np.empty(shape)
    reach = size // 2
    for i in range(shape[2]):
        for j in range(shape[3]):
            rows = slice(max(0, i - reach), i + reach + 1)
            columns = slice(max(0, j - reach), j + reach + 1)
            expected[:, :, i, j] = images[:, :, rows, columns].mean((2, 3))
    np.testing.assert_allclose(smooth(images, size).numpy(), expected, rtol=1e-12)


def test_errors_are_those_of_the_smoothed_residual(rng) -> None:
    images, rebuilt = torch.rand(2, 5, 2, 9, 7, generator=rng)
    expected = smooth(images.double() - rebuilt.double()).square().mean((1, 2, 3))
    found = smoothed_errors(images, rebuilt)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        smoothed_errors(images, rebuilt, 1), ops.per_sample_mse(rebuilt, images)
    )
    # What has no mean over a neighbourhood counts little, what is wrong over an area in full.
    texture = 0.1 * (torch.arange(49).view(1, 1, 7, 7) % 2 * 2 - 1)
    assert smoothed_errors(texture, 0 * texture) < 0.2 * smoothed_errors(texture.abs(), 0 * texture)


@pytest.mark.parametrize("perturbation", ["adversarial", "noise", "none"])
def test_scores_are_those_of_the_model(rng, perturbation) -> None:
    torch.manual_seed(0)
    model = fastalps.ALPS(12, 1, "fast", latent=4, perturbation=perturbation)
    images = torch.randint(0, 256, (600, 1, 12, 12), generator=rng, dtype=torch.uint8)
    model.train()
    before = torch.get_rng_state()
    found = smoothed_scores(model, images)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and not found.normal.requires_grad
    model.eval()
    if perturbation != "noise":
        out = model(images / 255)
        expected = smoothed_errors(images / 255, out.perturbed_reconstruction)
        torch.testing.assert_close(found.perturbed, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.average, (found.normal + found.perturbed) / 2)
    # A neighbourhood of one pixel smooths nothing.
    unsmoothed = smoothed_scores(model, images[:9], 1)
    torch.testing.assert_close(unsmoothed.normal, model.score(images[:9] / 255).normal)
    assert smoothed_scores(model, images[:0]).average.shape == (0,)


def test_bad_input() -> None:
    images = torch.zeros(2, 1, 8, 8)
    for size in (0, 2, -1, True):
        with pytest.raises(ValueError, match="size must be an odd number of pixels"):
            smooth(images, size)
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), got shape \(2, 8, 8\)"):
        smooth(images[:, 0])
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 8, 8\) and \(1, 1, 8, 8\)"):
        smoothed_errors(images, images[:1])
