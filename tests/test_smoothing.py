"""Errors of smoothed residuals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastalps
from fastalps import ops
from fastalps.export import export_onnx, export_program
from fastalps.models import Scores
from fastalps.smoothing import smooth, smoothed_errors


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


@pytest.mark.parametrize("perturbation", ["adversarial", "none"])
def test_scores_of_a_smoothing_model(rng, perturbation) -> None:
    torch.manual_seed(0)
    options = {"preset": "fast", "latent": 4, "perturbation": perturbation}
    model, plain = (fastalps.ALPS(12, 2, **options, smoothing=side).eval() for side in (3, 1))
    plain.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (70, 2, 12, 12), generator=rng, dtype=torch.uint8)
    out = plain(images / 255)
    expected = [
        smoothed_errors(images / 255, rebuilt)
        for rebuilt in (out.reconstruction, out.perturbed_reconstruction)
    ]
    expected.append((expected[0] + expected[1]) / 2)
    assert (expected[0] < plain.score(images / 255).normal).all()
    for found, wanted in zip(model.score(images / 255), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for backend in ("auto", "reference"):
        for kind, wanted in zip(Scores._fields, expected, strict=True):
            with fastalps.use_backend(backend):
                scorer = fastalps.Scorer(model, score=kind, batch_size=32)
                found = scorer.score_images(images)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert model.score(images[:0] / 255).average.shape == (0,)


def test_training_does_not_depend_on_it(rng) -> None:
    data = fastalps.data.load_images("digits", normal_class=3, protocol="strict")
    weights = []
    for side in (1, 3):
        torch.manual_seed(0)
        model = fastalps.ALPS(8, 1, preset="fast", latent=4, smoothing=side)
        config = fastalps.TrainConfig(epochs=2, batch_size=32, select="last", protocol="strict")
        fitted = fastalps.Trainer(config, progress=False).fit(model, data)
        weights.append(fitted.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_is_kept_with_the_model_and_explained(rng, tmp_path) -> None:
    model = fastalps.ALPS(12, preset="fast", latent=4, smoothing=5)
    images = torch.rand(50, 1, 12, 12, generator=rng)
    calibration = fastalps.Scorer(model).calibrate(images, 0.1)
    assert "differences averaged over 5 x 5 of them: 0 is" in calibration.explain()
    fastalps.save(model, tmp_path / "model.safetensors", calibration)
    again = fastalps.load(tmp_path / "model.safetensors")
    assert again.config.smoothing == 5 and again.calibration == calibration
    assert torch.equal(again.score(images).normal, model.score(images).normal)


@pytest.mark.parametrize("score", ["normal", "average"])
def test_exported_programs_smooth(rng, tmp_path, score) -> None:
    model = fastalps.ALPS(12, preset="fast", latent=4, smoothing=3)
    images = torch.randint(0, 256, (9, 1, 12, 12), generator=rng, dtype=torch.uint8)
    expected = getattr(model.score(images / 255), score)
    export_program(model, tmp_path / "model.pt2", score=score)
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'fastalps[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'fastalps[onnx]'")
    export_onnx(model, tmp_path / "model.onnx", score=score)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_bad_input() -> None:
    images = torch.zeros(2, 1, 8, 8)
    for size in (0, 2, -1, 33, True, 3.0):
        with pytest.raises(ValueError, match="size: expected an odd number from 1 to 31"):
            smooth(images, size)
        with pytest.raises(ValueError, match="smoothing: expected an odd number from 1 to 31"):
            fastalps.ALPS(8, 1, smoothing=size)
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), got shape \(2, 8, 8\)"):
        smooth(images[:, 0])
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 8, 8\) and \(1, 1, 8, 8\)"):
        smoothed_errors(images, images[:1])
