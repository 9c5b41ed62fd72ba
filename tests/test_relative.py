"""Errors relative to an image's contrast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalps import ops
from fastalps.relative import EXPONENT, FLOOR, energy, patch_energies, relative_errors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_energy_is_the_mean_square(rng, dtype) -> None:
    images = torch.rand(7, 2, 5, 3, generator=rng, dtype=torch.float64)
    if dtype == torch.uint8:
        images = (images * 255).round() / 255
    given = (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
    expected = ((images.numpy() - 0.25) ** 2).reshape(7, -1).mean(1)
    np.testing.assert_allclose(energy(given, 0.25).numpy(), expected, rtol=1e-5)
    assert energy(given).dtype == torch.float32
    assert energy(given[:0]).shape == (0,)


def test_a_fainter_copy_has_a_larger_relative_error_per_squared_error(rng) -> None:
    images = torch.rand(4, 1, 8, 8, generator=rng)
    errors = torch.rand(4, generator=rng)
    bold, faint = (relative_errors(errors, energy(part)) for part in (images, images / 4))
    assert (faint > bold).all()
    expected = errors.double() / (images.double().square().mean((1, 2, 3)) + FLOOR) ** EXPONENT
    torch.testing.assert_close(bold.double(), expected, rtol=1e-5, atol=0)
    # An empty image has the error of the floor, not an infinite one.
    assert torch.isfinite(relative_errors(errors, torch.zeros(4))).all()


def test_patch_energies_are_those_of_the_patches(rng) -> None:
    frames = torch.randint(0, 256, (5, 23, 31), generator=rng, dtype=torch.uint8)
    background = torch.randint(0, 256, (23, 31), generator=rng, dtype=torch.uint8)
    found = patch_energies(frames, background, (9, 8), 5)
    both = [ops.tile_patches(x, (9, 8), 5) for x in (frames, background[None])]
    expected = (both[0].double() - both[1].double()).square().mean((2, 3, 4))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert patch_energies(frames[:0], background, 9).shape == (0, 12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"errors and energies must have one shape, got \(3,\)"):
        relative_errors(torch.zeros(3), torch.zeros(4))
    frames = torch.zeros(2, 8, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match="frames and background must be uint8"):
        patch_energies(frames.float(), frames[0], 4)
    with pytest.raises(ValueError, match=r"of the background's size \(8, 8\), got \(2, 8, 7\)"):
        patch_energies(frames[:, :, :7], frames[0], 4)
    with pytest.raises(ValueError, match=r"images must be \(N, ...\) with pixels"):
        energy(torch.zeros(3))
