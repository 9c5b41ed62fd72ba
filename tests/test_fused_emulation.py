"""The fused CUDA kernels emulated lane by lane: every index proved against PyTorch on a CPU.

The host compiles the kernels' own source (tests/emulation/); mma, ldmatrix and barriers do what the
PTX ISA says. The reference is the model in float64 that rounds to bf16 where the kernels do.
"""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastalps import ALPS, ops
from fastalps.fused import FusedEngine
from fastalps.fused import build as fused_build
from fastalps.fused.packing import SHAPES, PackedWeights, pack_fused, shape_number, sizes
from fastalps.models import BOUNDS, model_config
from fastalps.testing import SCORE_ERROR
from tests import fused_emulator
from tests.fused_emulator import Emulation
from tests.fused_reference import (
    DEVIATIONS,
    GAIN,
    NAMES,
    STRIDE,
    Reference,
    frames_of,
    make_model,
    mean_squares,
    patches_of,
)
from tests.networks import exact, randomise

SMALL = SHAPES.index(("fast", 28))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = fused_emulator.build(tmp_path_factory.mktemp("emulation"))
    if isinstance(built, str):
        pytest.skip(built)
    return built


def channels_last(maps: Tensor) -> Tensor:
    """(..., channels, height, width) -> the kernels' order, pixels, then channels."""
    return maps.flatten(-2).transpose(-1, -2)


def assert_same_bf16(found: Tensor, expected: Tensor, off: Tensor) -> None:
    """Equal but for a last bit here and there: sums in another order round the other way.

    `off`: how far from `expected` a correct value may be.
    """
    found = found.double()
    assert found.shape == expected.shape == off.shape
    assert not found.isnan().any()
    difference = (found - expected).abs()
    assert (difference <= off).all(), (difference - off).max()
    assert (difference > 1e-5).double().mean() < 0.03


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=NAMES)
def test_sizes(library, shape):
    preset, size = SHAPES[shape]
    model = ALPS(size, 1, preset)
    assert shape_number(model.config) == shape
    found = (ctypes.c_int64 * 9)()
    assert library.fused_sizes(ctypes.c_int64(shape), found)
    packed = pack_fused(model)
    assert tuple(packed.weights.shape) == (found[0], 32, 4)
    assert tuple(packed.biases.shape) == (found[1],)
    assert tuple(found[2:4]) == sizes(model.config)
    assert max(found[4:9]) <= 163 * 1024


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=NAMES)
def test_each_kernel(library, shape, rng):
    """Each kernel alone, on what the reference has before it, in both orders of warps."""
    model = make_model(shape, rng, bound="tanh", strength=0.7)
    size = model.config.image_size[0]
    frames = frames_of(shape, rng)
    reference, images = Reference(model), patches_of(frames, size, STRIDE)
    emulation = Emulation(library, model, pack_fused(model), frames, STRIDE, blocks=3)

    maps, off = reference.encode(images)
    counts = emulation.run("encode")
    # Reading 32 times 16 bytes takes 4 cycles unless banks conflict. They do where rows of 7 pixels
    # wrap within 8 addresses, and with the narrow preset, whose pixels at distance two share half
    # of the banks.
    most = (4.1 if size == 30 else 7.5) * (2 if model.config.preset == "fast" else 1)
    assert counts.load_cycles <= most * counts.loads
    found = emulation.maps.flatten()[: maps.numel()].reshape(channels_last(maps).shape)
    assert_same_bf16(found, channels_last(maps), channels_last(off))

    found.copy_(channels_last(maps))
    outputs, off = reference.outputs(maps)
    for kernel in ("latent", "latent, wide"):
        emulation.latents.fill_(torch.nan)
        counts = emulation.run(kernel)
        assert counts.load_cycles == 4 * counts.loads
        # Of the same maps, so a hidden value is another bf16 neighbour here and there.
        difference = (emulation.latents.double() - outputs).abs()
        assert (difference <= DEVIATIONS * off + 1e-6).all(), (difference - off).max()

    # Exactly what the kernel reads, rounded to the same latents.
    emulation.latents.copy_(outputs)
    latents = reference.latents(emulation.latents.double())
    expanded, off = reference.expand(*(x.flatten(0, 1) for x in latents))
    for form in ("", ", wide"):
        emulation.maps.fill_(torch.nan)
        for kernel in ("dense", "expand"):
            counts = emulation.run(kernel + form)
            assert counts.load_cycles == 4 * counts.loads
        found = emulation.maps.flatten()[: expanded.numel()].reshape(channels_last(expanded).shape)
        assert_same_bf16(found, channels_last(expanded), channels_last(off))

    found.copy_(channels_last(expanded))
    expected = mean_squares(reference.decode(expanded), images, 1)
    counts = emulation.run("decode")
    assert counts.load_cycles <= 4.1 * counts.loads
    assert counts.store_cycles == 4 * counts.stores > 0
    torch.testing.assert_close(emulation.errors.double(), expected, rtol=2e-4, atol=1e-7)

    expected = reference.errors(images)
    # sm_90 multiplies by groups of warps and stores matrices, sm_100 only stores them.
    found = {}
    for architecture in (80, 90, 100):
        again = Emulation(
            library, model, emulation.packed, frames, STRIDE,
            blocks=2, descending=True, architecture=architecture,
        )  # fmt: skip
        first = Emulation(
            library, model, emulation.packed, frames, STRIDE, architecture=architecture
        )
        # Warps in the other order and other grids: a missing barrier would change the bits.
        assert torch.equal(again.run_all(), first.run_all())
        assert torch.equal(again.run_all(wide=True), first.errors)
        torch.testing.assert_close(first.errors.double(), expected, rtol=2e-3, atol=1e-6)
        found[architecture] = first.errors
    assert torch.equal(found[80], found[100])


# Widths that no preset has: uneven numbers of tiles, one pixel more or less, slices of M shared out
# otherwise, two planes a step in D.
OTHERS = {
    "wide": {"image_size": 27, "encoder": (48, 32, 64), "decoder": (48, 64, 48, 32, 32, 24)},
    "narrow": {"image_size": 25, "encoder": (16, 16, 64), "decoder": (16, 64, 16, 16, 8, 16)},
    "latent": {"image_size": 29, "encoder": (16, 32, 64), "decoder": (32, 128, 32, 16, 16, 8)},
}
LATENTS = {"wide": 32, "narrow": 16, "latent": 128}


@pytest.mark.parametrize("name", OTHERS)
def test_other_widths(name, rng, tmp_path: Path):
    """Networks as they are built at run time, with one tile a block and with two."""
    model = ALPS(**OTHERS[name], latent=LATENTS[name], bound="norm", strength=0.5).eval()
    assert not fused_build.reason_against(model.config) and shape_number(model.config) is None
    randomise(model, rng, GAIN)
    built = fused_emulator.build(tmp_path, widths=fused_build.arguments(model.config))
    if isinstance(built, str):
        pytest.skip(built)
    size = model.config.image_size[0]
    frames = torch.randint(0, 256, (1, size + 11, size + 5), dtype=torch.uint8, generator=rng)
    expected = Reference(model).errors(patches_of(frames, size, STRIDE))
    run = Emulation(built, model, pack_fused(model), frames, STRIDE, blocks=2)
    assert run.problem.shape == 0
    torch.testing.assert_close(run.run_all().double(), expected, rtol=2e-3, atol=1e-6)
    wide = Emulation(built, model, run.packed, frames, STRIDE, descending=True)
    assert torch.equal(wide.run_all(wide=True), run.errors)


@pytest.mark.parametrize("bound", ["none", "tanh", "norm"])
@pytest.mark.parametrize("passes", ["normal", "perturbed", "both"])
def test_passes_and_bounds(library, bound, passes, rng):
    model = make_model(SMALL, rng, bound=bound, strength=0.5)
    frames = frames_of(SMALL, rng)
    images = patches_of(frames, 28, STRIDE)
    found = Emulation(library, model, pack_fused(model), frames, STRIDE, passes).run_all()
    expected = Reference(model).errors(images)
    rows = {"normal": [0], "perturbed": [1], "both": [0, 1]}[passes]
    torch.testing.assert_close(found.double(), expected[rows], rtol=2e-3, atol=1e-6)
    exact = model.double().score(images)
    error = (found.double() - torch.stack(exact[:2])[rows]).abs() / torch.stack(exact[:2])[rows]
    assert error.max() <= SCORE_ERROR[torch.bfloat16]


@pytest.mark.parametrize("smoothing", [3, 7, 31])
@pytest.mark.parametrize("shape", [SMALL, SHAPES.index(("paper", 30))], ids=["fast-28", "paper-30"])
def test_smoothing(library, shape, smoothing, rng):
    """Residuals averaged over neighbourhoods, which end at the border, before they are squared."""
    model = make_model(shape, rng, smoothing=smoothing)
    frames = frames_of(shape, rng)
    images = patches_of(frames, SHAPES[shape][1], STRIDE)
    run = Emulation(library, model, pack_fused(model), frames, STRIDE, blocks=2)
    reference = Reference(model)
    expected, plain = reference.errors(images), reference.errors(images, 1)
    # Residuals of both signs cancel in a wide mean, what roundings add to them need not: with r the
    # root of the mean square before and s after, a deviation of 2e-3 r moves s^2 by 2 s (2e-3 r).
    room = 4e-3 * (expected * plain).sqrt()
    assert ((run.run_all().double() - expected).abs() <= room).all()
    again = Emulation(library, model, run.packed, frames, STRIDE, descending=True)
    assert torch.equal(again.run_all(), run.errors)


def test_inputs(library, rng):
    """Floats, other strides, no patch grid, many patches in uneven chunks, empty tiles."""
    model = make_model(SMALL, rng)
    packed, reference = pack_fused(model), Reference(model)
    frames = frames_of(SMALL, rng, 5)
    expected = reference.errors(patches_of(frames, 28, STRIDE))
    wide = torch.zeros(5, *frames.shape[1:], 3, dtype=torch.uint8)
    wide[..., 1] = frames
    for variant in (
        frames,
        frames.float() / 255,
        wide[..., 1],
        frames.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        run = Emulation(library, model, packed, variant, STRIDE, chunk=9, blocks=2)
        torch.testing.assert_close(run.run_all().double(), expected, rtol=2e-3, atol=1e-6)
    images = patches_of(frames[:1], 28, STRIDE)[:3, 0].float()
    run = Emulation(library, model, packed, images, (28, 28))
    torch.testing.assert_close(run.run_all().double(), expected[:, :3], rtol=2e-3, atol=1e-6)


def test_active_patches(library, rng):
    """Only listed patches are scored, at their places; the list's length is read on the device."""
    model = make_model(SMALL, rng)
    frames = frames_of(SMALL, rng, 5)
    expected = Reference(model).errors(patches_of(frames, 28, STRIDE))
    places = torch.randperm(30, generator=rng)[:11].sort().values
    index = torch.stack([places // 6, places % 6], 1)
    run = Emulation(
        library, model, pack_fused(model), frames, STRIDE, index=index, chunk=6, blocks=2
    )
    found = run.run_all()
    torch.testing.assert_close(found[:, places].double(), expected[:, places], rtol=2e-3, atol=1e-6)
    found[:, places] = torch.nan
    assert found.isnan().all()


@pytest.mark.parametrize("layer", ["encoder.layers.3", "decoder.layers.11"])
def test_notices_a_wrong_tap(library, layer, rng):
    """The comparison is no formality: a kernel mirrored left to right does not pass it."""
    model = make_model(SMALL, rng)
    frames = frames_of(SMALL, rng)
    images = patches_of(frames, 28, STRIDE)
    wrong = copy.deepcopy(model)
    weight = wrong.get_submodule(layer).weight
    weight.data = weight.data.flip(3)
    run = Emulation(library, model, pack_fused(wrong), frames, STRIDE)
    expected = Reference(model).errors(images)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run.run_all().double(), expected, rtol=2e-3, atol=1e-6)


MUTATIONS = {
    # Means along rows are read before all of them are there.
    "fused_residuals.cuh": (
        "  }\n  barrier();\n  float sum = 0.0f;\n  for (int pixel",
        "  }\n  float sum = 0.0f;\n  for (int pixel",
    ),
    # A transposed convolution whose odd rows take the tap of the next input from this one.
    "fused_index.h": ("return tap == 0 ? 1 : 0;", "return tap == 2 ? 1 : 0;"),
    # Products outside of the image meet those of another plane.
    "fused_shapes.h": ("kStripRows * kProductPitch + 4;", "kStripRows * kProductPitch;"),
    # The second layer of E starts before the first is complete.
    "fused_encoder.cuh": (
        "    barrier();\n    if (multiplies",
        "    if (multiplies",
    ),
}


@pytest.mark.parametrize("header", MUTATIONS)
def test_notices_a_broken_kernel(header, rng, tmp_path: Path):
    old, new = MUTATIONS[header]
    for source in (fused_emulator.ROOT / "csrc/cuda").glob("fused_*"):
        text = source.read_text(encoding="utf-8")
        if source.name == header:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / source.name).write_text(text, encoding="utf-8")
    built = fused_emulator.build(tmp_path, tmp_path, SMALL)
    if isinstance(built, str):
        pytest.skip(built)
    model = make_model(SMALL, rng, smoothing=3)
    frames = frames_of(SMALL, rng)
    expected = Reference(model).errors(patches_of(frames, 28, STRIDE))
    assert any(
        is_wrong(
            Emulation(built, model, pack_fused(model), frames, STRIDE, descending=order), expected
        )
        for order in (False, True)
    )


def is_wrong(run: Emulation, expected: Tensor) -> bool:
    """Whether errors are others, or the emulator sees that warps are in each other's way."""
    try:
        return not torch.allclose(run.run_all().double(), expected, rtol=2e-3)
    except RuntimeError as told:
        return "warp" in str(told)


def emulated_op(library: ctypes.CDLL):
    """`fused_errors` of csrc/bindings_fused.cpp, by the emulator: the same checks, CPU tensors."""

    def fused_errors(
        frames, background, threshold, stride, cover, shape, weights, biases, bound, slope,
        strength, smoothing, normal, perturbed, chunk, scratch, flags, places, errors,
    ) -> None:  # fmt: skip
        preset, size = SHAPES[shape]
        config = model_config(
            size, 1, preset, bound=BOUNDS[bound], negative_slope=slope, strength=strength,
            smoothing=smoothing,
        )  # fmt: skip
        edge = "cover" if cover else "drop"
        index = None
        total = errors[0].numel()
        if background is not None:
            _, index = ops.active_patches(
                frames, background, size, stride, threshold=threshold, edge=edge
            )
            assert flags.numel() == total and places.numel() >= -(-total // 4096) + 1 + 2 * total
            kept = torch.zeros(errors.shape[1:], dtype=torch.uint8)
            kept[index[:, 0], index[:, 1]] = 1
            flags.copy_(kept)
            errors.zero_()
        if total == 0:
            return
        passes = "both" if normal and perturbed else "normal" if normal else "perturbed"
        run = Emulation(
            library, SimpleNamespace(config=config), PackedWeights(weights, biases), frames,
            stride, passes, edge=edge, index=index, chunk=chunk, blocks=2,
        )  # fmt: skip
        assert scratch.numel() == run.maps.nbytes + run.patches.nbytes + run.latents.nbytes
        assert errors.shape[0] == run.passes and total == run.total
        found = run.run_all().view(errors.shape)
        errors.copy_(torch.where(found.isnan(), errors, found))

    return fused_errors


@pytest.fixture
def engine_of(library, monkeypatch):
    """Makes a `FusedEngine` whose kernels are emulated."""
    registered = torch.library.Library("fastalps", "IMPL", "CPU")
    registered.impl("fused_errors", emulated_op(library))
    count = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: count)
    yield lambda model: FusedEngine(model, torch.device("cpu"))
    registered._destroy()


@pytest.mark.parametrize("passes", ["normal", "perturbed", "both"])
@pytest.mark.parametrize(("perturbation", "smoothing"), [("adversarial", 3), ("none", 1)])
def test_engine(engine_of, perturbation, smoothing, passes, rng):
    """What Python hands to the kernels: weights, scratch, passes, frames, the gate's lists."""
    options = {"bound": "tanh", "strength": 0.5, "smoothing": smoothing}
    model = make_model(SMALL, rng, perturbation=perturbation, **options)
    engine = engine_of(model)
    frames = frames_of(SMALL, rng, 3)
    images = patches_of(frames, 28, STRIDE)
    expected = exact(model, images)
    expected = expected[{"normal": [0], "perturbed": [1], "both": [0, 1]}[passes]]
    cut = ((28, 28), STRIDE, "cover")
    close = {"rtol": SCORE_ERROR[torch.bfloat16], "atol": 1e-6}

    found, kept = engine.frame_errors(frames, cut, passes)
    assert kept is None and found.shape[1:] == (3, 6)
    torch.testing.assert_close(found.flatten(1).double(), expected, **close)
    found = engine.errors(images[:5], passes)
    torch.testing.assert_close(found.double(), expected[:, :5], **close)
    assert engine.errors(images[:0], passes).shape == (len(expected), 0)

    background = frames[0].clone()
    background[:, 20:] ^= 128
    background[30:] = frames[1, 30:]
    found, kept = engine.frame_errors(frames, cut, passes, background, 50.0)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(found.flatten(1).double(), expected * kept.flatten(), **close)

    other = make_model(SMALL, rng, perturbation=perturbation, **options)
    before = found
    engine.update(other)
    found, _ = engine.frame_errors(frames, cut, passes)
    assert torch.equal(found, engine_of(other).frame_errors(frames, cut, passes)[0])
    assert not torch.equal(found, before)
