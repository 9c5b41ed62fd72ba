"""Layers: batch norms folded into what is before them."""

from __future__ import annotations

import torch
from torch import nn

from fastalps import ALPS
from fastalps.folding import fold_batch_norm
from tests.networks import randomise


def test_batch_norm_is_folded(rng: torch.Generator) -> None:
    network = randomise(ALPS((16, 12), preset="fast"), 5)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert norms > 0
    images = torch.rand(5, 1, 16, 12, generator=rng)
    with torch.no_grad():
        latent = network.encode(images)
        logits = network.decode(latent)
        assert fold_batch_norm(network) == norms
        torch.testing.assert_close(network.encode(images), latent, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(network.decode(latent), logits, rtol=1e-5, atol=1e-5)


def test_transposed_convolutions_are_folded_too(rng: torch.Generator) -> None:
    network = nn.Sequential(
        nn.ConvTranspose2d(3, 5, 3, 2, 1, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    images = torch.rand(6, 3, 9, 7, generator=rng)
    network(images * 3)  # moves the running statistics
    network.eval()
    expected = network(images)
    assert fold_batch_norm(network) == 2
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
