"""The ALPS model: shapes, presets, perturbations, scores, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastalps
from fastalps import reference
from fastalps.models import ALPS, PRESETS, model_config


def images(model: ALPS, count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(count, model.config.channels, *model.config.image_size, generator=rng)


@pytest.mark.parametrize("size", [8, 9, 15, 28, 30, (33, 65), (8, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_channels(size, channels, rng) -> None:
    model = ALPS(size, channels, preset="fast").eval()
    x = images(model, 3, rng)
    out = model(x)
    assert out.reconstruction.shape == out.perturbed_reconstruction.shape == x.shape
    assert out.latent.shape == out.perturbation.shape == (3, model.config.latent)
    assert 0 <= out.reconstruction.min() <= out.reconstruction.max() <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_scores_are_the_errors_of_the_reconstructions(preset, rng) -> None:
    model = ALPS(28, preset=preset).eval()
    x = images(model, 5, rng)
    with torch.no_grad():
        out = model(x)
    scores = model.score(x)
    torch.testing.assert_close(scores.normal, reference.per_sample_mse(out.reconstruction, x))
    torch.testing.assert_close(
        scores.perturbed, reference.per_sample_mse(out.perturbed_reconstruction, x)
    )
    torch.testing.assert_close(scores.average, (scores.normal + scores.perturbed) / 2)
    assert not scores.average.requires_grad


def test_score_uses_eval_statistics_and_leaves_training_mode(rng) -> None:
    model = ALPS(9, preset="fast")
    x = images(model, 6, rng)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    together = model.score(x).average
    alone = torch.cat([model.score(one[None]).average for one in x])
    torch.testing.assert_close(together, alone)
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_empty_batch_scores_to_nothing() -> None:
    scores = ALPS(28, preset="fast").score(torch.empty(0, 1, 28, 28))
    assert [kind.shape for kind in scores] == [(0,)] * 3


@pytest.mark.parametrize(
    ("bound", "limit"), [("tanh", lambda p: p.abs().max()), ("norm", lambda p: p.square().mean())]
)
def test_bounded_perturbations(bound, limit, rng) -> None:
    model = ALPS(16, preset="fast", bound=bound).eval()
    for parameter in model.distorter.parameters():
        parameter.data.mul_(30)
    perturbation = model.distort(images(model, 4, rng)).detach()
    assert float(limit(perturbation)) == pytest.approx(1, abs=1e-4)


def test_noise_is_seeded_and_standard(rng) -> None:
    model = ALPS(8, preset="fast", perturbation="noise", latent=64).eval()
    x = images(model, 512, rng)
    draws = [model.distort(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert abs(float(draws[0].mean())) < 0.05
    assert float(draws[0].std()) == pytest.approx(1, abs=0.05)


def test_without_perturbation_both_scores_agree(rng) -> None:
    model = ALPS(28, preset="fast", perturbation="none")
    scores = model.score(images(model, 3, rng))
    torch.testing.assert_close(scores.normal, scores.perturbed)
    assert model.distorter is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("perturbation", ["adversarial", "none"])
def test_flops_agree_with_a_counter(preset, perturbation, rng) -> None:
    model = ALPS((28, 30), 2, preset=preset, perturbation=perturbation).eval()
    x = images(model, 2, rng)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latent = model.encode(x)
        latents = [latent]
        if perturbation == "adversarial":
            latents.append(latent + model.distort(x))
        model.decode(torch.cat(latents))
    assert counter.get_total_flops() == 2 * model.flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.decode(model.encode(x))
    assert counter.get_total_flops() == 2 * model.flops("normal")
    with pytest.raises(ValueError, match="passes: expected one of"):
        model.flops("average")


def test_gradients_reach_every_weight(rng) -> None:
    model = ALPS(12, preset="fast")
    model(images(model, 4, rng)).perturbed_reconstruction.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_same_config_same_shape() -> None:
    model = ALPS(30, 1, preset="fast", latent=24, strength=0.5)
    again = ALPS.from_config(model.config)
    assert again.config == model.config == model_config(30, 1, "fast", latent=24, strength=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset: expected one of paper, fast"),
        ({"image_size": 7}, "image_size: expected 2 integers of at least 8, got"),
        ({"channels": 0}, "channels: expected an integer of at least 1"),
        ({"latent": 0}, "latent: expected an integer"),
        ({"perturbation": "evil"}, "perturbation: expected one of adversarial, noise, none"),
        ({"bound": "box"}, "bound: expected one of none, tanh, norm"),
        ({"strength": float("nan")}, "strength: expected a positive number"),
        ({"encoder": (1, 2)}, "encoder: expected 3 integers"),
    ],
)
def test_wrong_options(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ALPS(**arguments)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="latents: no such option of ALPS; expected one of"):
        ALPS(latents=3)


@pytest.mark.parametrize("call", ["score", "forward"])
def test_wrong_images(call) -> None:
    model = ALPS(28, preset="fast")
    with pytest.raises(TypeError, match="divide uint8 pixels by 255"):
        getattr(model, call)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected \(N, 1, 28, 28\), got shape \(1, 1, 28, 27\)"):
        getattr(model, call)(torch.zeros(1, 1, 28, 27))
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=r"expected torch\.float32, as the model's weights are"):
            getattr(model, call)(torch.zeros(1, 1, 28, 28, dtype=dtype))


def test_compiles_as_one_graph(rng) -> None:
    model = ALPS(8, preset="fast").eval()
    x = images(model, 4, rng)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(x)
        for mine, theirs in zip(compiled, model(x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_public_name() -> None:
    assert fastalps.ALPS is ALPS
