"""The modules, in models that have nothing to do with ALPS."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastalps import ops, reference
from fastalps.nn import PerSampleMSE, PerturbLatent, TilePatches


class DenoisingPatchAutoencoder(nn.Module):
    """Somebody's own detector: frames in, a heatmap of reconstruction errors out."""

    def __init__(self) -> None:
        super().__init__()
        self.tile = TilePatches(8, 6, flatten=True)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 12), nn.Tanh())
        self.noise = PerturbLatent(0.1)
        self.decoder = nn.Linear(12, 3 * 64)
        self.error = PerSampleMSE(sigmoid=True)

    def forward(self, frames):
        patches = self.tile(frames)
        latent = self.encoder(patches)
        latent, energy = self.noise(latent, torch.randn_like(latent))
        return self.error(self.decoder(latent).view_as(patches), patches), energy

    def heatmaps(self, frames):
        scores, _ = self(frames)
        return self.tile.fold(scores.view(len(frames), -1), frames.shape[-2:])


def test_a_foreign_model_trains_scores_and_compiles(rng) -> None:
    torch.manual_seed(1)
    frames = torch.randint(0, 256, (4, 3, 20, 27), dtype=torch.uint8, generator=rng)
    model = DenoisingPatchAutoencoder()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        errors, energy = model(frames)
        loss = errors.mean() + 0 * energy.mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        assert model.heatmaps(frames).shape == (4, 20, 27)
    compiled = torch.compile(model, fullgraph=True)
    compiled(frames)[0].sum().backward()
    assert model.decoder.weight.grad.isfinite().all()


def test_tile_patches_is_the_op_with_its_options(rng) -> None:
    frames = torch.rand(2, 10, 13, generator=rng)
    options = {"edge": "drop", "dtype": torch.float16, "scale": 2.0, "shift": -1.0}
    patches = TilePatches((4, 5), (3, 2), **options)(frames)
    assert torch.equal(patches, ops.tile_patches(frames, (4, 5), (3, 2), **options))
    flat = TilePatches((4, 5), (3, 2), **options, flatten=True)(frames)
    assert torch.equal(flat, patches.flatten(0, 1))


def test_fold_undoes_tile(rng) -> None:
    tile = TilePatches(4)
    heat = tile.fold(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (7, 8))
    assert heat.shape == (1, 7, 8)
    assert heat[0, 0, 0] == 1
    assert heat[0, 3, 0] == 2  # the row that both patches cover, (1 + 3) / 2


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_per_sample_mse(sigmoid, paired, rng) -> None:
    target = torch.rand(3, 1, 6, 7, generator=rng)
    values = torch.randn(6 if paired else 3, 1, 6, 7, generator=rng, requires_grad=True)
    result = PerSampleMSE(sigmoid, paired)(values, target)
    image = values.sigmoid() if sigmoid else values
    repeated = target.repeat(2, 1, 1, 1) if paired else target
    expected = reference.per_sample_mse(image, repeated)
    torch.testing.assert_close(result, expected.view(result.shape))
    (gradient,) = torch.autograd.grad(result.sum(), values)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), values)[0])


def test_perturb_latent(rng) -> None:
    latent, direction = torch.randn(2, 5, 9, generator=rng).unbind()
    moved, energy = PerturbLatent(0.3)(latent, direction)
    torch.testing.assert_close(moved, latent + 0.3 * direction)
    torch.testing.assert_close(energy, (0.3 * direction).square().mean(1))


def test_modules_say_what_they_do() -> None:
    assert "stride=(6, 6)" in repr(TilePatches(8, 6))
    assert "strength=0.3" in repr(PerturbLatent(0.3))
    assert "sigmoid=True, paired=False" in repr(PerSampleMSE(True))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        TilePatches(9)(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="stride"):
        TilePatches(4, 0)(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="reconstruction"):
        PerSampleMSE()(torch.zeros(2, 3), torch.zeros(2, 4))
