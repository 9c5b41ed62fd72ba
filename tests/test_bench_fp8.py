"""bench/fp8.py: what it rounds, and that it says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import fp8
from fastalps import ALPS
from tests.networks import randomise


def test_values(rng) -> None:
    values = torch.randn(1000, generator=rng)
    largest = values.abs().max()
    found = fp8.round_fp8(values, largest)
    # Three bits of fraction; the smallest values are multiples of 2^-9 / 448 of the largest.
    assert ((found - values).abs() <= values.abs() / 16 + largest * 2**-9 / 448).all()
    assert torch.equal(fp8.round_fp8(found, largest), found)
    assert len(found.unique()) < 254
    assert fp8.round_fp8(torch.tensor([3.0, -3.0]), torch.tensor(2.0)).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("size", [28, 30])
def test_networks(size, rng) -> None:
    """Every layer's products are rounded, the model is left as it is, fp8 is coarser than bf16."""
    model = randomise(ALPS(size, preset="fast"), rng, 1.5)
    weights = [parameter.clone() for parameter in model.parameters()]
    images = torch.randint(0, 256, (9, 1, size, size), dtype=torch.uint8, generator=rng)
    with torch.inference_mode():
        exact = torch.stack(model.score(images / 255)[:2])
        away = {}
        for way, (where, pairs) in fp8.WAYS.items():
            network = fp8.rounded_network(model, images, where, pairs)
            layers = fp8.layers_of(network)
            assert len(layers) == 4 + 4 + 1 + 6
            chosen = [layer for layer in layers if where(layer)]
            assert (
                len(chosen) == {"bf16": 0, "bf16, leaky pairs": 0, "fp8, inner": 12, "fp8": 15}[way]
            )
            for layer in chosen:
                outputs = layer.weight.dim() == 4 and isinstance(layer, torch.nn.ConvTranspose2d)
                rows = layer.weight.transpose(0, 1) if outputs else layer.weight
                assert all(len(one.abs().unique()) < 128 for one in rows)
            away[way] = (fp8.errors_of(network, images) - exact).abs().mean()
    assert 0 < away["bf16"] < away["fp8, inner"] and away["bf16"] < away["fp8"]
    assert away["bf16, leaky pairs"] not in (0, away["bf16"])
    assert away["bf16, leaky pairs"] < 2 * away["bf16"]
    assert all(map(torch.equal, model.parameters(), weights))


def test_leaky_pairs() -> None:
    """Of bf16 values positive ones stay, negative ones are scaled by the rounded slope."""
    layer = torch.nn.LeakyReLU(0.2)
    layer.register_forward_hook(fp8.leaky_pairs)
    values = torch.tensor([1.00390625, -3.0, 0.0])  # The first is halfway: it rounds to 1.
    slope = torch.tensor(0.2).bfloat16()
    assert layer(values).tolist() == [1.0, (slope * -3).item(), 0.0]


def test_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fp8.main(["--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "t10k-images" in said, said
