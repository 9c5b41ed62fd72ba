"""The whole-network engine against the float64 model: random and trained networks, every input."""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastalps import ALPS, MotionGate, Scorer, TrainConfig, Trainer, backends, use_backend
from fastalps.data import load_images
from fastalps.engine import Engine, axes, log_layer_by_layer, why_not
from fastalps.engine.packing import pack
from fastalps.models import BOUNDS, PERTURBATIONS, PRESETS
from fastalps.testing import SCORE_ERROR, poisoned
from tests.conftest import threads
from tests.images import pixels_of
from tests.networks import exact, examples, needs_library, networks, randomise, relative

ERROR = SCORE_ERROR[torch.float32]


# Algorithms along one axis -----------------------------------------------------------------------


def evaluate(axis: axes.Axis, inputs: np.ndarray, taps: np.ndarray) -> np.ndarray:
    outputs = []
    for band in axis.bands:
        values = [sum(factor * inputs[i] for i, factor in terms) for terms in band.values]
        filters = [sum(float(c) * w for c, w in zip(mix, taps)) for mix in axis.filters]  # noqa: B905
        products = [sum(values[v] * filters[f] for v, f in terms) for terms in band.products]
        for result in band.results:
            assert result.output == len(outputs)
            outputs.append(sum(factor * products[p] for p, factor in result.terms))
    return np.array(outputs)


@pytest.mark.parametrize("minimal", [False, True])
@pytest.mark.parametrize("size", range(1, 66))
def test_axis_algorithms_are_convolutions(size: int, minimal: bool) -> None:
    rng = np.random.default_rng(size)
    inputs, taps = rng.standard_normal(size), rng.standard_normal(3)
    x, w = torch.tensor(inputs)[None, None], torch.tensor(taps)[None, None]
    for limit in (4, 9, 100):
        expected = F.conv1d(x, w, stride=2, padding=1)[0, 0].numpy()
        found = evaluate(axes.strided(size, minimal, limit), inputs, taps)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        for extra in (0, 1):
            expected = F.conv_transpose1d(x, w, stride=2, padding=1, output_padding=extra)
            axis = axes.transposed(size, 2 * size - 1 + extra, minimal, limit)
            found = evaluate(axis, inputs, taps)
            np.testing.assert_allclose(found, expected[0, 0].numpy(), atol=1e-12)
        expected = F.conv_transpose1d(x, w, padding=1)[0, 0].numpy()
        found = evaluate(axes.same(size, minimal, limit), inputs, taps)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    pooled = F.conv1d(x, w, stride=2, padding=1).sum()
    np.testing.assert_allclose(evaluate(axes.pooled(size), inputs, taps), [pooled], atol=1e-12)


def test_multiplications_that_are_saved() -> None:
    """The counts that docs/performance.md predicts from, for a map of 30 pixels."""
    counts = {
        minimal: [axes.strided(n, minimal, 99).multiplications() for n in (30, 15, 8, 4)]
        + [axes.same(30, minimal, 99).multiplications()]
        for minimal in (False, True)
    }
    assert counts[False] == [44, 22, 11, 5, 88]  # three a result, less the taps on the border
    assert counts[True] == [35, 18, 9, 5, 46]


def test_layers_take_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider vectors leave minimal algorithms to layers with more channels."""
    for preset in PRESETS:
        model = ALPS(30, preset=preset).double()
        counts = [pack(model, minimal=True).flop]
        for kernels in ("default", "avx2", "avx512"):
            monkeypatch.setattr(backends, "cpu_kernels", lambda kernels=kernels: kernels)
            counts.append(pack(model).flop)
        counts.append(pack(model, minimal=False).flop)
        assert counts == sorted(counts)
        assert counts[0] < counts[1] and counts[2] < counts[3] < counts[4]


# Scores ----------------------------------------------------------------------------------------


@needs_library
@examples
@given(
    model=networks(),
    count=st.one_of(st.integers(1, 40), st.integers(1, 300)),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    passes=st.sampled_from(["normal", "perturbed", "both"]),
    minimal=st.sampled_from([False, True, None]),
)
def test_random_networks(model: ALPS, count, dtype, passes, minimal) -> None:
    height, width = model.config.image_size
    count = max(1, min(count, 40_000 // (height * width)))
    images = pixels_of((count, model.config.channels, height, width), count, dtype)
    with poisoned():
        found = Engine(model, minimal).errors(images, passes)
    expected = exact(model, images)
    rows = {"normal": slice(0, 1), "perturbed": slice(1, 2), "both": slice(0, 2)}[passes]
    assert found.dtype == torch.float32
    assert found.shape == expected[rows].shape
    # The mean of a neighbourhood of noise is smaller than the noise by its side, not so its error.
    assert relative(found, expected[rows]) <= ERROR * model.config.smoothing


@needs_library
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [30, 28])
@pytest.mark.parametrize("minimal", [False, True, None])
def test_presets(preset: str, size: int, minimal: bool | None) -> None:
    model = randomise(ALPS(size, preset=preset), 3)
    images = pixels_of((26, 1, size, size), 4)
    found = Engine(model, minimal).errors(images, "both")
    assert relative(found, exact(model, images)) <= ERROR


@needs_library
def test_trained_weights() -> None:
    data = load_images("digits", normal_class=3)
    config = TrainConfig(
        epochs=4, batch_size=16, learning_rate=5e-3, distorter_every=4, seed=1, device="cpu"
    )
    torch.manual_seed(1)
    model = ALPS(image_size=8, channels=1, preset="fast")
    with threads(1):  # several would wait for each other in layers this small
        fitted = Trainer(config, progress=False).fit(model, data)
    expected = exact(fitted.model.cpu(), data.test)
    normal, odd = (expected[0][data.test_labels == label].median() for label in (False, True))
    assert normal < 0.8 * odd  # it has learnt
    for minimal in (False, True, None):
        found = Engine(fitted.model, minimal).errors(data.test, "both")
        assert relative(found, expected) <= ERROR


@needs_library
@pytest.mark.parametrize("size", [(1024, 8), (9, 520), (130, 144)])
def test_large_images(size: tuple[int, int]) -> None:
    model = randomise(ALPS(size, preset="fast", encoder=(4, 5, 6), decoder=(6, 5, 4, 3, 2, 2)), 3)
    images = pixels_of((3, 1, *size), 4)
    assert relative(Engine(model).errors(images, "both"), exact(model, images)) <= ERROR


@needs_library
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_perturbations(perturbation: str, bound: str) -> None:
    options = {"perturbation": perturbation, "bound": bound, "strength": 0.7}
    model = randomise(ALPS((13, 18), 3, preset="fast", **options), 5)
    images = pixels_of((21, 3, 13, 18), 6)
    torch.manual_seed(8)
    found = Engine(model).errors(images, "both")
    if perturbation == "noise":
        # The same noise, as the engine draws it.
        torch.manual_seed(8)
        noise = torch.randn(21, model.config.latent).double()
        double = copy.deepcopy(model).double()
        pixels = images.double() / 255
        logits = double.decode(double.encode(pixels) + 0.7 * noise)
        expected = (logits.sigmoid() - pixels).square().flatten(1).mean(1).detach()
        assert relative(found[0], exact(model, images)[0]) <= ERROR
        assert relative(found[1], expected) <= ERROR
        return
    assert relative(found, exact(model, images)) <= ERROR
    assert torch.equal(found[0], found[1]) == (perturbation == "none")
    for row, passes in enumerate(("normal", "perturbed")):
        assert torch.equal(Engine(model).errors(images, passes)[0], found[row])


@needs_library
def test_inputs_of_every_kind() -> None:
    model = randomise(ALPS((9, 14), 2, preset="fast"), 1)
    engine = Engine(model)
    images = pixels_of((20, 2, 9, 14), 2)
    expected = engine.errors(images, "both")
    wide = pixels_of((40, 4, 27, 28), 3)
    wide[::2, 1::2, ::3, ::2] = images
    assert torch.equal(engine.errors(wide[::2, 1::2, ::3, ::2], "both"), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(engine.errors(channels_last, "both"), expected)
    for dtype in (torch.float32, torch.float64):
        found = engine.errors(images.to(dtype) / 255, "both")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    half = images.half() / 255
    assert torch.equal(engine.errors(half, "both"), engine.errors(half.float(), "both"))
    for passes, rows in (("normal", 1), ("both", 2)):
        assert engine.errors(images[:0], passes).shape == (rows, 0)
        errors, kept = engine.frame_errors(images[:0], ((9, 14), (9, 14), "cover"), passes)
        assert errors.shape == (rows, 0, 1)
        assert kept is None


@needs_library
def test_same_bits_for_every_batch_and_number_of_threads() -> None:
    model = randomise(ALPS(12, preset="fast"), 7)
    engine = Engine(model)
    images = pixels_of((101, 1, 12, 12), 8)
    whole = engine.errors(images, "both")
    for count in (1, 2, 3, 5):
        with threads(count):
            assert torch.equal(engine.errors(images, "both"), whole)
    for size in (1, 7, 8, 24, 25, 48, 100):
        parts = [engine.errors(part, "both") for part in images.split(size)]
        assert torch.equal(torch.cat(parts, 1), whole)
    engine.call_size = 10
    assert torch.equal(engine.errors(images, "both"), whole)


@needs_library
def test_calls_from_several_threads() -> None:
    engines = [Engine(randomise(ALPS(size, preset="fast"), size)) for size in (12, 16)]
    images = [pixels_of((64, 1, size, size), size) for size in (12, 16)]
    expected = [engine.errors(pixels, "both") for engine, pixels in zip(engines, images)]  # noqa: B905
    wrong = []

    def work(number: int) -> None:
        for _ in range(15):
            which = number % 2
            if not torch.equal(engines[which].errors(images[which], "both"), expected[which]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Frames and the scorer -------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("edge", "stride", "smoothing"), [("cover", (12, 12), 1), ("drop", (5, 7), 3)]
)
def test_frames_are_their_patches(
    gated: bool, edge: str, stride: tuple[int, int], smoothing: int
) -> None:
    model = randomise(ALPS(12, preset="fast", smoothing=smoothing), 2)
    still = pixels_of((1, 31, 40), 1).repeat(5, 1, 1)
    frames = still.clone()
    frames[1:, 10:20, 5:30] = pixels_of((4, 10, 25), 2)
    scorer = Scorer(model, gate=MotionGate(4.0, still[0]) if gated else None)
    scorer.edge, scorer.stride = edge, stride
    found = scorer.scores_frames(frames)
    assert scorer.method == "engine"
    with use_backend("reference"):
        expected = scorer.scores_frames(frames)
        assert scorer.method == "layers"
    for kind in ("normal", "perturbed", "average"):
        assert (found[kind].patches == 0).sum() == (expected[kind].patches == 0).sum()
        torch.testing.assert_close(found[kind].patches, expected[kind].patches, rtol=2e-5, atol=0)
    if gated:
        assert torch.equal(found["normal"].kept, expected["normal"].kept)
        assert 0 < found["normal"].kept.sum() < found["normal"].kept.numel()


@needs_library
def test_scorer_keeps_the_weights_it_was_made_with() -> None:
    model = randomise(ALPS(12, preset="fast"), 2)
    images = pixels_of((9, 1, 12, 12), 3)
    scorer = Scorer(model)
    before = scorer.scores_images(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(scorer.scores_images(images).normal, before.normal)
    with use_backend("reference"):  # the other path has the same snapshot
        torch.testing.assert_close(scorer.scores_images(images).normal, before.normal)
    scorer.refresh()
    after = torch.stack(scorer.scores_images(images)[:2])
    assert relative(after, exact(model, images)) <= ERROR


def test_layer_by_layer_where_the_engine_does_not_reach(monkeypatch, caplog) -> None:
    model, cpu = randomise(ALPS(12, preset="fast"), 2), torch.device("cpu")
    config = model.config
    assert "not on cuda devices" in why_not(config, torch.device("cuda"), "fp32")
    assert "not in fp16" in why_not(config, cpu, "fp16")
    large = dataclasses.replace(config, image_size=(2000, 12))
    assert "up to 1024 pixels" in why_not(large, cpu, "fp32")
    images = pixels_of((9, 1, 12, 12), 3)
    absent = backends.State(False, "no compiled library for cpu: it was not built")
    monkeypatch.setattr(backends, "load_native", lambda device: absent)
    log_layer_by_layer.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastalps"):
        scorer = Scorer(model)
        Scorer(model)
    told = [record.message for record in caplog.records if "layer by layer" in record.message]
    assert told == ["scoring layer by layer: no compiled library for cpu: it was not built"]
    assert scorer.method == "layers"
    found = torch.stack(scorer.scores_images(images)[:2])
    assert relative(found, exact(model, images)) <= ERROR


# Direct calls of the raw ops ---------------------------------------------------------------------


@needs_library
def test_damaged_plans_are_refused() -> None:
    model = randomise(ALPS(8, preset="fast"), 2)
    images = pixels_of((3, 1, 8, 8), 3)
    whole, floats, words = Engine(model).packed

    def run(plan: Tensor, weights: Tensor) -> Tensor:
        return torch.ops.fastalps.engine_images(images, plan, weights, words, None, True, True)

    assert torch.isfinite(run(whole, floats)).all()
    for plan, weights in (
        (whole[:-1], floats),
        (whole, floats[:-1]),
        (torch.cat([whole, whole[:1]]), floats),
        (whole[:0], floats),
        (whole.int(), floats),
        (whole, floats.double()),
    ):
        with pytest.raises(RuntimeError, match="engine"):
            run(plan, weights)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        # Any single number replaced: refused, or a network of the same memory that runs.
        plan = whole.clone()
        at = int(torch.randint(len(plan), (1,), generator=generator))
        plan[at] = int(torch.randint(-3, 70, (1,), generator=generator))
        try:
            run(plan, floats)
        except RuntimeError:
            refused += 1
    assert refused > 150


@needs_library
def test_calls_that_do_not_fit_are_refused() -> None:
    engine = Engine(randomise(ALPS(8, preset="fast", perturbation="noise"), 2))
    images, ops = pixels_of((3, 1, 8, 8), 3), torch.ops.fastalps
    packed = engine.packed
    for pixels, noise, flags, message in (
        (images[:, :, :7], None, (True, False), "wrong size"),
        (images.repeat(1, 2, 1, 1), None, (True, False), "channels"),
        (images.double(), None, (True, False), "uint8 or float32"),
        (images, None, (True, True), "noise"),
        (images, torch.randn(2, 16), (True, True), "noise"),
        (images, None, (False, False), "a pass"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.engine_images(pixels, *packed, noise, *flags)
    with pytest.raises(RuntimeError, match="larger than the frame"):
        ops.engine_frames(images[:, :, :7], None, 0.0, [8, 8], True, *packed, None, True, False)
    with pytest.raises(RuntimeError, match="for the gate"):
        ops.engine_frames(images, images[0, 0, :7], 0.0, [8, 8], True, *packed, None, True, False)
