"""bf16 and int8: the engine against the same rounding in float64, accuracy, and the choice."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastalps
from fastalps import ALPS, Scorer, TrainConfig, Trainer, backends, metrics, quantization
from fastalps.data import load_images
from fastalps.engine import Engine, why_not
from fastalps.engine.narrow import LARGEST_IMAGE, NARROW, activation_ranges, range_count
from fastalps.errors import BackendUnavailable, UserError
from fastalps.folding import fold_batch_norm
from fastalps.models import BOUNDS, PERTURBATIONS, Encoder
from fastalps.quantization import Agreement, Quantization, quantize
from fastalps.testing import SCORE_ERROR, poisoned
from tests.conftest import threads
from tests.images import pixels_of
from tests.networks import (
    carried_rounding,
    exact,
    examples,
    mean_square,
    needs_library,
    neighbourhood_means,
    networks,
    randomise,
    relative,
)

emulated = pytest.mark.filterwarnings("ignore:this processor has no")


class Rounded:
    """The model in float64 with weights and activations rounded as by bf16 or int8.

    Written from the definitions: PyTorch's convolutions on values that stand for the bytes, so that
    nothing of the engine's plan, packing or sums is shared.
    """

    def __init__(self, model: ALPS, precision: str, ranges) -> None:
        self.network = copy.deepcopy(model).eval().double()
        fold_batch_norm(self.network)
        self.precision = precision
        self.ranges = iter(ranges)

    def weight(self, weight: Tensor, outputs: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """Rounded weights.

        Args:
            outputs: dimension of the output channels.
            apply: the layer with one channel in and one out and these weights (3 x 3), of ones.
        """
        if self.precision == "bf16":
            return carried_rounding(weight, apply)
        dims = [d for d in range(weight.dim()) if d != outputs]
        scale = weight.abs().amax(dims, keepdim=True) / 127
        scale[scale == 0] = 1
        return (weight / scale).round() * scale

    def activation(self, values: Tensor) -> Tensor:
        if self.precision == "bf16":
            return values.float().bfloat16().double()
        low, high = next(self.ranges)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        zero = round(-low / scale)
        return ((values / scale + zero).round().clamp(0, 255) - zero) * scale

    def encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        maps, first = images, True
        for layer in encoder.layers[:-1]:
            if isinstance(layer, nn.Conv2d):
                # Pixels are whole numbers in bf16, and 1/255 is in the weights.
                factor = 255 if first and self.precision == "bf16" else 1
                ones = torch.ones_like(maps[:1, :1])
                weight = self.weight(
                    layer.weight / factor, 0, lambda w, x=ones: F.conv2d(x, w, None, 2, 1)
                )
                if first and self.precision == "bf16" and maps.shape[1] % 2:
                    # Half of a pixel's last word is free: it holds the rest of these weights.
                    exact = layer.weight[:, -1:] / factor
                    high = exact.bfloat16().double()
                    weight[:, -1:] = high + (exact - high).bfloat16().double()
                maps = F.conv2d(maps * factor, weight, layer.bias, 2, 1)
                first = False
            else:
                maps = layer(maps)
            if isinstance(layer, nn.LeakyReLU):
                maps = self.activation(maps)
        last = encoder.layers[-1]
        height, width = ((n + 1) // 2 for n in maps.shape[2:])
        padded = F.pad(maps, (1, 2, 1, 2))
        sums = torch.stack(
            [
                torch.stack(
                    [
                        padded[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2][
                            :, :, :height, :width
                        ].sum((2, 3))
                        for j in range(3)
                    ],
                    -1,
                )
                for i in range(3)
            ],
            -2,
        )
        ones = torch.ones_like(maps[:1, :1])
        weight = self.weight(
            last.weight / (height * width),
            0,
            lambda w: F.conv2d(ones, w, None, 2, 1).mean((2, 3), keepdim=True),
        )
        return torch.einsum("ncij,dcij->nd", self.activation(sums), weight) + last.bias

    def errors(self, images: Tensor) -> Tensor:
        pixels = images.double() / (255 if images.dtype == torch.uint8 else 1)
        seen = (pixels * 255).round() / 255 if self.precision == "int8" else pixels
        if self.precision == "bf16":
            seen = (pixels * 255).float().bfloat16().double() / 255
        network, config = self.network, self.network.config
        latent = self.encode(network.encoder, seen)
        perturbation = self.encode(network.distorter.encoder, seen)
        if config.bound == "tanh":
            perturbation = perturbation.tanh()
        elif config.bound == "norm":
            square = perturbation.square().mean(1, keepdim=True)
            perturbation = perturbation / (square + 1e-12).sqrt()
        both = torch.cat([latent, latent + config.strength * perturbation])
        maps = network.decoder.dense(both).unflatten(1, network.decoder.start)
        for layer in network.decoder.layers:
            if isinstance(layer, nn.ConvTranspose2d):
                shape = (layer.stride, layer.padding, layer.output_padding)
                ones = torch.ones_like(maps[:1, :1])
                weight = self.weight(
                    layer.weight,
                    1,
                    lambda w, x=ones, s=shape: F.conv_transpose2d(x, w, None, *s),
                )
                maps = F.conv_transpose2d(maps, weight, layer.bias, *shape)
            else:
                maps = layer(maps)
            if isinstance(layer, nn.LeakyReLU):
                maps = self.activation(maps)
        targets = torch.cat([pixels, pixels])
        residuals = neighbourhood_means(maps.sigmoid() - targets, config.smoothing)
        return mean_square(residuals).view(2, -1).detach()


def rounded(model: ALPS, precision: str, ranges, images: Tensor) -> Tensor:
    return Rounded(model, precision, ranges).errors(images)


def check(found: Tensor, expected: Tensor, median: float = 3e-3, factor: int = 1) -> None:
    """Equal but where a sum fell on the other side of a rounding: few steps of few values.

    Of residuals averaged over `factor` x `factor` pixels, noise shrinks by that factor in the mean,
    a step that all these pixels share does not.
    """
    away = (found.double() - expected).abs() / expected / factor
    assert away.max() <= 2e-2
    assert away.median() <= median


@needs_library
@examples
@given(
    model=networks(),
    count=st.integers(1, 60),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    precision=st.sampled_from(NARROW),
)
def test_random_networks(model: ALPS, count, dtype, precision) -> None:
    height, width = model.config.image_size
    count = max(1, min(count, 40_000 // (height * width)))
    images = pixels_of((count, model.config.channels, height, width), count, dtype)
    ranges = activation_ranges(model, images)
    assert len(ranges) == range_count(model)
    with poisoned():
        found = Engine(model, precision=precision, ranges=ranges).errors(images, "both")
    check(found, rounded(model, precision, ranges, images), factor=model.config.smoothing)


@needs_library
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("preset", ["fast", "network-b"])
def test_presets(precision: str, preset: str) -> None:
    model = randomise(ALPS(30, preset=preset), 3)
    images = pixels_of((26, 1, 30, 30), 4)
    ranges = activation_ranges(model, images)
    engine = Engine(model, precision=precision, ranges=ranges)
    found = engine.errors(images, "both")
    check(found, rounded(model, precision, ranges, images))
    for row, passes in enumerate(("normal", "perturbed")):
        assert torch.equal(engine.errors(images, passes)[0], found[row])


@needs_library
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("count", [5, 20, 48, 60])
def test_widths_with_many_divisors_and_few(count: int, precision: str) -> None:
    """Tile registers take a divisor of each width, or leave a layer to the vectors."""
    widths = {"encoder": (24, 40, 68), "decoder": (160, 96, 44, 34, 20, 12)}
    model = randomise(ALPS((17, 13), preset="fast", latent=40, **widths), 3)
    images = pixels_of((count, 1, 17, 13), 4)
    ranges = activation_ranges(model, images)
    found = Engine(model, precision=precision, ranges=ranges).errors(images, "both")
    check(found, rounded(model, precision, ranges, images))


@needs_library
@pytest.mark.parametrize("precision", NARROW)
def test_values_beyond_the_ranges_saturate(precision: str) -> None:
    model = randomise(ALPS((9, 14), 2, preset="fast"), 1)
    dark = pixels_of((20, 2, 9, 14), 2) // 8
    ranges = activation_ranges(model, dark)
    images = pixels_of((20, 2, 9, 14), 3)
    found = Engine(model, precision=precision, ranges=ranges).errors(images, "both")
    # A step of a layer this far outside of its range is a larger part of the score.
    check(found, rounded(model, precision, ranges, images), 5e-3)


@needs_library
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("size", [(256, 8), (9, 256), (130, 144)])
def test_large_images(size: tuple[int, int], precision: str) -> None:
    model = randomise(ALPS(size, preset="fast", encoder=(4, 5, 6), decoder=(6, 5, 4, 3, 2, 2)), 3)
    images = pixels_of((3, 1, *size), 4)
    ranges = activation_ranges(model, images)
    found = Engine(model, precision=precision, ranges=ranges).errors(images, "both")
    check(found, rounded(model, precision, ranges, images))
    larger = dataclasses.replace(model.config, image_size=(LARGEST_IMAGE + 1, 8))
    assert f"up to {LARGEST_IMAGE} pixels" in why_not(larger, torch.device("cpu"), precision)


@needs_library
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_perturbations(perturbation: str, bound: str, precision: str) -> None:
    options = {"perturbation": perturbation, "bound": bound, "strength": 0.7}
    model = randomise(ALPS((13, 18), 3, preset="fast", **options), 5)
    images = pixels_of((21, 3, 13, 18), 6)
    engine = Engine(model, precision=precision, ranges=activation_ranges(model, images))
    torch.manual_seed(8)
    found = engine.errors(images, "both")
    torch.manual_seed(8)
    expected = Engine(model).errors(images, "both")  # draws the same noise
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)
    assert torch.equal(found[0], found[1]) == (perturbation == "none")


@needs_library
@pytest.mark.parametrize("precision", NARROW)
def test_same_bits_for_every_batch_and_number_of_threads(precision: str) -> None:
    model = randomise(ALPS(12, preset="fast"), 7)
    images = pixels_of((101, 1, 12, 12), 8)
    engine = Engine(model, precision=precision, ranges=activation_ranges(model, images))
    whole = engine.errors(images, "both")
    for count in (1, 2, 3, 5):
        with threads(count):
            assert torch.equal(engine.errors(images, "both"), whole)
    for size in (1, 7, 8, 24, 25, 48, 100):
        parts = [engine.errors(part, "both") for part in images.split(size)]
        assert torch.equal(torch.cat(parts, 1), whole)


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt one digit, and its data."""
    data = load_images("digits", normal_class=3)
    config = TrainConfig(
        epochs=6, batch_size=16, learning_rate=5e-3, distorter_every=4, seed=1, device="cpu"
    )
    torch.manual_seed(1)
    with threads(1):  # several would wait for each other in layers this small
        fitted = Trainer(config, progress=False).fit(ALPS(8, 1, preset="fast"), data)
    return fitted.model, data


@needs_library
def test_trained_weights(trained) -> None:
    """The gates of the issue on weights that have learnt: bf16 to 1e-2, AUROC to 0.05 point; int8
    to 0.1 point."""
    model, data = trained
    expected = exact(model, data.test)
    ranges = activation_ranges(model, data.train)
    for precision, moved in (("bf16", 0.0005), ("int8", 0.001)):
        found = Engine(model, precision=precision, ranges=ranges).errors(data.test, "both")
        if precision == "bf16":
            assert relative(found, expected) <= SCORE_ERROR[torch.bfloat16]
        for mine, theirs in zip(found, expected, strict=True):
            area = metrics.auroc(mine, data.test_labels)
            assert abs(area - metrics.auroc(theirs, data.test_labels)) <= moved


# The record and the choice ---------------------------------------------------------------------


@emulated
@needs_library
def test_quantization_is_kept_with_the_model(trained, tmp_path) -> None:
    model, data = trained
    model = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"fastalps\.quantize"):
        Scorer(model, precision="int8")
    model.quantization = quantize(model, data.train)
    assert model.quantization.images == len(data.train)
    assert model.quantization.agreement["bf16"].correlation > 0.999
    path = tmp_path / "model.safetensors"
    fastalps.save(model, path)
    loaded = fastalps.load(path)
    assert loaded.quantization == model.quantization
    scorers = [Scorer(one, precision="int8") for one in (model, loaded)]
    assert [scorer.method for scorer in scorers] == ["engine", "engine"]
    found = [scorer.score_images(data.test) for scorer in scorers]
    assert torch.equal(found[0], found[1])
    whole = Scorer(model, precision="fp32").score_images(data.test)
    assert not torch.equal(found[0], whole)
    torch.testing.assert_close(found[0], whole, rtol=0.1, atol=0)


@needs_library
def test_too_few_or_equal_images_tell_nothing_of_a_precision(trained) -> None:
    model, data = trained
    few = quantize(model, data.train[: quantization.LEAST_COMPARED - 1])
    assert few.agreement == {}
    same = quantize(model, data.train[:1].expand(40, -1, -1, -1))
    assert not any(found.close for found in same.agreement.values())
    tied, apart = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0, 4.0])
    found = quantization.measured_agreement(apart, tied)
    assert found == quantization.measured_agreement(apart.flip(0), tied.flip(0))
    assert found.correlation == pytest.approx(0.7746, abs=1e-4)


def test_quantize_checks_pixels(trained) -> None:
    model, data = trained
    with pytest.warns(UserWarning, match=r"normal_images are expected in \[0, 1\]"):
        quantize(model, data.train[:40].float())
    pixels = data.train[:40] / 255
    pixels[3, 0, 1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"normal_images must be finite, .* at index \(3, 0, 1, 2\)"
    ):
        quantize(model, pixels)


@needs_library
def test_auto_is_the_fastest_that_keeps_the_ranking(monkeypatch) -> None:
    model = randomise(ALPS(12, preset="fast"), 2)
    near, far = Agreement(0.9995, 0.005), Agreement(0.998, 0.005)
    apart = Agreement(1.0, 0.03)
    ranges = activation_ranges(model, pixels_of((20, 1, 12, 12), 1))
    both = ("avx512_bf16", "avx512_vnni")
    for instructions, agreement, expected in (
        ((), {"int8": near, "bf16": near}, "fp32"),
        (both, {}, "fp32"),
        (both, {"int8": near, "bf16": near}, "int8"),
        (both, {"int8": far, "bf16": near}, "bf16"),
        (both, {"int8": apart, "bf16": far}, "fp32"),
        (both[:1], {"int8": near, "bf16": near}, "bf16"),
        (("avx_vnni",), {"int8": near, "bf16": near}, "int8"),
        (("avx_vnni",), {"int8": far, "bf16": near}, "fp32"),
    ):
        monkeypatch.setattr(backends, "dot_products", lambda found=instructions: found)
        model.quantization = Quantization(ranges, 20, agreement)
        assert Scorer(model).precision == expected
    model.quantization = None
    assert Scorer(model).precision == "fp32"


@needs_library
@pytest.mark.parametrize("fast", [False, True])
def test_other_backends_score_without_int8(monkeypatch, fast: bool) -> None:
    monkeypatch.setattr(backends, "dot_products", lambda: ("avx512_vnni",))
    monkeypatch.setattr("fastalps.quantization.has_fast_bfloat16", lambda device: fast)
    model = randomise(ALPS(12, preset="fast"), 2)
    images = pixels_of((20, 1, 12, 12), 1)
    ranges = activation_ranges(model, images)
    model.quantization = Quantization(ranges, 20, {"int8": Agreement(0.9999, 0.001)})
    scorer = Scorer(model)
    assert scorer.precision == "int8"
    whole = Scorer(model, precision="fp32")
    with fastalps.use_backend("reference"):
        with pytest.raises(BackendUnavailable, match="reference does not compute in int8"):
            scorer.score_images(images)
        other = Scorer(model)
        assert (other.precision, other.method) == ("bf16" if fast else "fp32", "layers")
        torch.testing.assert_close(
            other.score_images(images), whole.score_images(images), rtol=0.05, atol=0
        )
    assert scorer.score_images(images).isfinite().all()


@pytest.mark.parametrize("fast", [False, True])
def test_auto_on_gpus_is_bf16_unless_it_is_known_to_be_far(monkeypatch, fast: bool) -> None:
    monkeypatch.setattr("fastalps.quantization.has_fast_bfloat16", lambda device: fast)
    model = randomise(ALPS(12, preset="fast"), 2)
    ranges = activation_ranges(model, pixels_of((20, 1, 12, 12), 1))
    for found, expected in (
        (None, "bf16"),
        ({}, "bf16"),
        ({"int8": Agreement(0.9, 0.1), "bf16": Agreement(0.9995, 0.005)}, "bf16"),
        ({"bf16": Agreement(0.998, 0.005)}, "fp32"),
    ):
        model.quantization = None if found is None else Quantization(ranges, 20, found)
        chosen = quantization.choose(model, torch.device("cuda"))
        assert chosen == (expected if fast else "fp32")


@needs_library
def test_emulation_is_told(trained) -> None:
    model, data = trained
    model = copy.deepcopy(model)
    model.quantization = quantize(model, data.train)
    for precision, instructions in quantization.NARROW.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            Scorer(model, precision=precision)
        slower = [str(w.message) for w in told if "emulated and slower" in str(w.message)]
        assert bool(slower) == (not set(instructions) & set(backends.dot_products()))


def test_quantize_asks_for_images_of_the_model() -> None:
    model = ALPS(12, preset="fast")
    for images, error in (
        (pixels_of((3, 1, 12, 12), 1), ValueError),
        (pixels_of((9, 1, 12, 13), 1), ValueError),
        (pixels_of((9, 12, 12), 1), ValueError),
        ([1, 2], TypeError),
        (pixels_of((9, 1, 12, 12), 1).int(), TypeError),
    ):
        with pytest.raises(error, match="normal_images"):
            quantize(model, images)
    with pytest.raises(ValueError, match="ranges: int8 needs 14 ranges"):
        Engine(model, precision="int8", ranges=((0.0, 1.0),))
    nan = randomise(ALPS(12, preset="fast"), 2)
    with torch.no_grad():
        nan.decoder.dense.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        quantize(nan, pixels_of((9, 1, 12, 12), 1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("ranges"),
        lambda fields: fields.update(ranges=[[1.0, 0.0]]),
        lambda fields: fields.update(ranges=[[0.0, 1.0]] * 13),
        lambda fields: fields.update(ranges=[["a", 0.0]]),
        lambda fields: fields.update(agreement={"int8": {"correlation": 1.0}}),
        lambda fields: fields.update(agreement=[1]),
    ],
)
def test_damaged_records_are_refused(tmp_path, damage) -> None:
    from safetensors.torch import load_file, save_file

    model = ALPS(8, preset="fast")
    model.quantization = Quantization(((0.0, 1.0),) * 14, 9, {"int8": Agreement(1.0, 0.0)})
    path = tmp_path / "model.safetensors"
    fastalps.save(model, path)
    fields = dataclasses.asdict(model.quantization)
    damage(fields)
    metadata = {
        "format": "fastalps-model",
        "version": "1",
        "config": json.dumps(dataclasses.asdict(model.config)),
        "quantization": json.dumps(fields),
    }
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match="its quantization is not valid"):
        fastalps.load(path)


# Direct calls of the raw op ----------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("precision", NARROW)
def test_damaged_plans_are_refused(precision: str) -> None:
    model = randomise(ALPS(8, preset="fast"), 2)
    images = pixels_of((3, 1, 8, 8), 3)
    ranges = activation_ranges(model, images)
    plan, weights, words = Engine(model, precision=precision, ranges=ranges).packed

    def run(plan: Tensor, weights: Tensor, words: Tensor) -> Tensor:
        return torch.ops.fastalps.engine_images(images, plan, weights, words, None, True, True)

    assert torch.isfinite(run(plan, weights, words)).all()
    for parts in (
        (plan[:-1], weights, words),
        (plan, weights[:-1], words),
        (plan, weights, words[:-1]),
        (plan, weights, torch.cat([words, words[:1]])),
        (plan, weights, words.float()),
    ):
        with pytest.raises(RuntimeError, match="engine"):
            run(*parts)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        # Any single number replaced: refused, or a network of the same memory that runs.
        changed = plan.clone()
        at = int(torch.randint(len(plan), (1,), generator=generator))
        changed[at] = int(torch.randint(-3, 70, (1,), generator=generator))
        try:
            run(changed, weights, words)
        except RuntimeError:
            refused += 1
    assert refused > 100


@needs_library
def test_int8_refuses_weights_that_are_not_finite(trained) -> None:
    model, data = trained
    model = copy.deepcopy(model)
    model.quantization = quantize(model, data.train)
    with torch.no_grad():
        model.decoder.dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="int8 needs finite weights; train the model again"):
        Scorer(model, precision="int8")
    assert Scorer(model, precision="fp32").score_images(data.train[:3]).isnan().all()
