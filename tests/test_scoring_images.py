"""Scorer on images: against the model, folded and in batches; precisions; what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastalps import ALPS, Scorer, backends, load_pretrained, networks, quantization
from fastalps.models import alterations
from tests.conftest import needs_cuda
from tests.images import pixels_of
from tests.networks import SCORES, randomise


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("size", "channels"), [(12, 1), ((13, 18), 3), (8, 2)])
def test_scores_are_those_of_the_model(rng: torch.Generator, kind, size, channels) -> None:
    network = randomise(ALPS(size, channels, "fast"), 5)
    images = pixels_of((7, channels, *network.config.image_size), rng)
    expected = getattr(network.score(images / 255), kind)
    scorer = Scorer(network, score=kind, precision="fp32", batch_size=3)
    found = scorer.score_images(images)
    assert found.dtype == torch.float32
    assert found.shape == (7,)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer.score_images(images / 255), found, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer.score_images(images.numpy()), found, rtol=0, atol=0)
    every = scorer.scores_images(images)
    torch.testing.assert_close(getattr(every, kind), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(every.average, (every.normal + every.perturbed) / 2)


class Mirrored(ALPS):
    """A model with a method of its own."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images.flip(3))


class Scaled(nn.Module):
    """A module around one of the model's, which keeps its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor) -> Tensor:
        found = self.inner(values)
        return found + nn.LeakyReLU()(found)


def _own_method(model: ALPS) -> None:
    model.decode = lambda latent: -ALPS.decode(model, latent)  # type: ignore[method-assign]


ALTERATIONS = {
    "another activation": lambda model: model.encoder.layers.__setitem__(2, nn.ReLU()),
    "another slope": lambda model: setattr(model.encoder.layers[2], "negative_slope", 0.5),
    "a hook": lambda model: model.encoder.layers[0].register_forward_hook(lambda m, i, o: 1.5 * o),
    "a hook before": lambda model: model.decoder.register_forward_pre_hook(lambda m, i: 2 * i[0]),
    "a wrapped encoder": lambda model: setattr(model, "encoder", Scaled(model.encoder)),
    "a wrapped decoder": lambda model: setattr(model, "decoder", Scaled(model.decoder)),
    "no distorter": lambda model: setattr(model, "distorter", None),
    "a method of its own": _own_method,
    "weights by norm": lambda model: nn.utils.parametrizations.weight_norm(model.decoder.dense),
    "norms of the batch": lambda model: model.encoder.layers.__setitem__(
        1, nn.BatchNorm2d(model.encoder.layers[1].num_features, track_running_stats=False)
    ),
}


@pytest.mark.parametrize("name", [*ALTERATIONS, "a subclass's method"])
def test_altered_models_are_scored_as_they_are(name: str, rng: torch.Generator) -> None:
    # Of learnt weights, since random ones hardly make anything of an image.
    plain = load_pretrained("mnist-0")
    model = Mirrored.from_config(plain.config) if name not in ALTERATIONS else copy.deepcopy(plain)
    model.load_state_dict(plain.state_dict())
    model.eval()
    images = pixels_of((6, 1, 28, 28), rng)
    before = plain.score(images / 255).average
    ALTERATIONS.get(name, lambda model: None)(model)
    scorer = Scorer(model, precision="fp32", batch_size=64)
    assert scorer.method == "layers"
    expected = model.score(images / 255)
    assert name == "weights by norm" or not torch.allclose(expected.average, before, rtol=1e-3)
    for found, exact in zip(scorer.scores_images(images), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert Scorer(model).precision in ("fp32", "bf16")
    with pytest.raises(ValueError, match="precision int8 is not to be had: "):
        Scorer(model, precision="int8")
    with pytest.raises(ValueError, match="int8 is for models as they come from"):
        quantization.quantize(model, images)


def test_what_changes_no_score_is_no_alteration(model: ALPS) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
        if isinstance(module, nn.LeakyReLU):
            module.inplace = True
    model.requires_grad_(False)
    model.compile()
    assert alterations(copy.deepcopy(model)) == ""


def test_scores_do_not_depend_on_the_batch_size(model: ALPS, rng: torch.Generator) -> None:
    images = pixels_of((37, 1, 12, 12), rng)
    whole = Scorer(model, precision="fp32", batch_size=64).score_images(images)
    for batch_size in (1, 5, 37):
        found = Scorer(model, precision="fp32", batch_size=batch_size).score_images(images)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_strided_and_mapped_images(model: ALPS, rng: torch.Generator, tmp_path) -> None:
    images = pixels_of((9, 1, 24, 12), rng)[::2, :, ::2]
    scorer = Scorer(model)
    expected = scorer.score_images(images.contiguous())
    torch.testing.assert_close(scorer.score_images(images), expected)
    torch.testing.assert_close(
        scorer.score_images(images.numpy()[::-1]), expected.flip(0), rtol=0, atol=1e-6
    )
    np.save(tmp_path / "images.npy", images.numpy())
    for mode in ("r", "c"):
        mapped = np.load(tmp_path / "images.npy", mmap_mode=mode)
        torch.testing.assert_close(scorer.score_images(mapped), expected)


def test_no_images_give_no_scores(model: ALPS) -> None:
    scorer = Scorer(model)
    assert scorer.score_images(torch.empty(0, 1, 12, 12)).shape == (0,)
    assert scorer.scores_images(np.empty((0, 1, 12, 12), np.uint8)).average.shape == (0,)


def test_model_is_a_snapshot(rng: torch.Generator) -> None:
    network = randomise(ALPS(12, preset="fast"), 5).train()
    images = pixels_of((4, 1, 12, 12), rng)
    scorer = Scorer(network, precision="fp32")
    before = scorer.score_images(images)
    assert network.training
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    assert torch.equal(scorer.score_images(images), before)
    scorer.refresh()
    after = scorer.score_images(images)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, network.score(images / 255).average, rtol=1e-5, atol=1e-6)


# Precision -------------------------------------------------------------------------------------


def test_auto_precision_says_what_it_chose(model: ALPS, monkeypatch) -> None:
    if backends.load_native("cpu").available:
        assert Scorer(model).precision == "fp32"  # the engine's
    monkeypatch.setattr(backends, "load_native", lambda device: backends.State(False, "absent"))
    for fast, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(quantization, "has_fast_bfloat16", lambda _, fast=fast: fast)
        assert Scorer(model).precision == expected


@pytest.mark.filterwarnings("ignore:this .* has no bf16")
def test_bf16_is_near_fp32(rng: torch.Generator) -> None:
    network = randomise(ALPS(28, preset="fast"), 5)
    images = pixels_of((32, 1, 28, 28), rng)
    exact = Scorer(network, precision="fp32").score_images(images)
    scorer = Scorer(network, precision="bf16")
    assert scorer.precision == "bf16"
    torch.testing.assert_close(scorer.score_images(images), exact, rtol=1e-2, atol=0)


def test_emulated_bf16_warns(model: ALPS, monkeypatch) -> None:
    monkeypatch.setattr(backends, "dot_products", lambda: ())
    monkeypatch.setattr(networks, "has_fast_bfloat16", lambda _: False)
    with pytest.warns(UserWarning, match="bf16 is emulated and slower"):
        Scorer(model, precision="bf16")


# Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, ValueError, r"fastalps\.quantize"),
        ({"score": "best"}, ValueError, "score: expected one of normal, perturbed, average"),
        ({"frame_reduce": "min"}, ValueError, "frame_reduce must be one of max, mean, topk"),
        ({"top_k": 0}, ValueError, "top_k must be .* from 1 up, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be .* from 1 up, got 0"),
        ({"patch_size": 13}, ValueError, "image size 12 x 12, got 13 x 13; train a model"),
        ({"stride": 0}, ValueError, "stride"),
        ({"edge": "wrap"}, ValueError, "edge.*'wrap'"),
        ({"gate": 3.0}, TypeError, "gate must be a MotionGate or None, got float"),
    ],
)
def test_bad_options_are_refused(model: ALPS, options, error, message) -> None:
    with pytest.raises(error, match=message):
        Scorer(model, **options)


def test_models_and_devices_that_are_not_there_are_refused(model: ALPS) -> None:
    with pytest.raises(TypeError, match=r"model must be an ALPS, got str; fastalps\.load one"):
        Scorer("model.safetensors")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device: cuda is not here .* use cpu or auto"):
            Scorer(model, device="cuda")
    for name in ("gpu", "meta", "cuda:x", ""):
        with pytest.raises(ValueError, match=r"device: expected auto, cpu or cuda\[:n\], got"):
            Scorer(model, device=name)


def test_sizes_are_whole_numbers_of_any_kind(model: ALPS) -> None:
    scorer = Scorer(model, stride=np.int64(3), batch_size=np.int32(7), top_k=np.int16(2))
    assert scorer.stride == (3, 3)
    with pytest.raises(ValueError, match=r"stride: expected a number of pixels or a pair"):
        Scorer(model, stride=(7.9, 7.9))
    config = ALPS(np.int64(8), latent=np.int64(4), encoder=list(np.array([4, 4, 4]))).config
    assert config == ALPS(8, latent=4, encoder=[4, 4, 4]).config
    assert all(type(value) is int for value in (config.latent, *config.encoder))


@pytest.mark.parametrize("perturbation", ["noise", "none"])
def test_models_without_an_adversary(rng: torch.Generator, perturbation: str) -> None:
    network = ALPS(image_size=12, preset="fast", perturbation=perturbation)
    images = pixels_of((6, 1, 12, 12), rng)
    found = Scorer(network, precision="fp32").scores_images(images)
    expected = network.score(images / 255)
    torch.testing.assert_close(found.normal, expected.normal, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.normal, found.perturbed) == (perturbation == "none")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 12, 13), ValueError, r"\(N, 1, 12, 12\).* got shape \(2, 1, 12, 13\)"),
        (torch.zeros(2, 3, 12, 12), ValueError, r"got shape \(2, 3, 12, 12\)"),
        (torch.zeros(12, 12), ValueError, r"got shape \(12, 12\)"),
        (torch.zeros(2, 1, 12, 12, dtype=torch.int64), TypeError, "uint8 .* got torch.int64"),
        (np.zeros((2, 1, 12, 12), np.complex64), TypeError, "uint8 .* got complex64"),
        ([[1.0]], TypeError, "tensor or a numpy array, got list"),
    ],
)
def test_bad_images_are_refused(model: ALPS, images, error, message) -> None:
    with pytest.raises(error, match=message):
        Scorer(model).score_images(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_that_are_not_finite_are_refused(model: ALPS, value) -> None:
    images = torch.zeros(30_000, 1, 12, 12)
    images[29_500, 0, 3, 4] = images[29_999, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=rf"2 NaN or infinite.*first {value} at .*\(29500, 0, 3, 4"
    ):
        Scorer(model).score_images(images)
    frames = torch.zeros(6, 24, 24)
    frames[4, 20, 21] = value
    with pytest.raises(ValueError, match=r"frames must be finite, got 1 .* at index \(4, 20, 21\)"):
        Scorer(model).score_frames(frames)
    with pytest.raises(ValueError, match=r"at index \(4, 20, 21\)"):
        list(Scorer(model).score_frames(frames.split(3)))


def test_gray_levels_as_floats_warn(model: ALPS) -> None:
    with pytest.warns(UserWarning, match=r"expected in \[0, 1\], got 0 to 255"):
        Scorer(model).score_images(torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 1, 12, 12))


@pytest.mark.gpu
@needs_cuda
def test_cuda_graph_gives_the_scores_of_the_cpu(rng: torch.Generator) -> None:
    network = randomise(ALPS(28, preset="fast"), 5)
    images = pixels_of((50, 1, 28, 28), rng)
    scorer = Scorer(network, precision="fp32", device="cuda", batch_size=16)
    expected = Scorer(network, precision="fp32", device="cpu").scores_images(images)
    for values in (images, images.cuda()):
        found = scorer.scores_images(values)
        assert found.normal.device == values.device
        for kind in SCORES:
            torch.testing.assert_close(
                getattr(found, kind).cpu(), getattr(expected, kind), rtol=1e-4, atol=1e-6
            )
    # Replays with new pixels; a graph that kept its first results would not follow.
    flipped = scorer.score_images(images.flip(0))
    torch.testing.assert_close(flipped, expected.average.flip(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(flipped, expected.average, rtol=1e-4)
