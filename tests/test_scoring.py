"""Scorer: against the model, in chunks and streams, gated, calibrated, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from fastalps import ALPS, MotionGate, Scorer, backends, ops, quantization
from fastalps.calibration import threshold_at
from fastalps.data import Clip
from fastalps.environment import has_fast_bfloat16
from fastalps.folding import fold_batch_norm
from fastalps.frame_scores import reduce_patches

KINDS = ("normal", "perturbed", "average")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def warmed_model(image_size=12, channels: int = 1, preset: str = "fast") -> ALPS:
    """A model whose batch norms have statistics, scales and shifts of their own."""
    model = ALPS(image_size=image_size, channels=channels, preset=preset)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                uniform = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(low + (high - low) * uniform)
    return model


@pytest.fixture(scope="module")
def model() -> ALPS:
    torch.manual_seed(11)
    return warmed_model()


def bytes_of(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


def moving(count: int, rng: torch.Generator, size=(30, 41)) -> torch.Tensor:
    """A static scene in which a block of noise moves."""
    frames = bytes_of((1, *size), rng).repeat(count, 1, 1)
    for t in range(count):
        row, column = (5 * t) % (size[0] - 8), (7 * t) % (size[1] - 8)
        frames[t, row : row + 8, column : column + 8] = bytes_of((8, 8), rng)
    return frames


# Images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "channels"), [(12, 1), ((13, 18), 3), (8, 2)])
def test_scores_are_those_of_the_model(rng: torch.Generator, kind, size, channels) -> None:
    network = warmed_model(size, channels)
    images = bytes_of((7, channels, *network.config.image_size), rng)
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


def test_batch_norm_is_folded(rng: torch.Generator) -> None:
    network = warmed_model((16, 12)).eval()
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


def test_scores_do_not_depend_on_the_batch_size(model: ALPS, rng: torch.Generator) -> None:
    images = bytes_of((37, 1, 12, 12), rng)
    whole = Scorer(model, precision="fp32", batch_size=64).score_images(images)
    for batch_size in (1, 5, 37):
        found = Scorer(model, precision="fp32", batch_size=batch_size).score_images(images)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_strided_and_mapped_images(model: ALPS, rng: torch.Generator, tmp_path) -> None:
    images = bytes_of((9, 1, 24, 12), rng)[::2, :, ::2]
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
    network = warmed_model().train()
    images = bytes_of((4, 1, 12, 12), rng)
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


# Frames ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["cover", "drop"])
@pytest.mark.parametrize("stride", [None, (5, 7)])
def test_patches_are_in_grid_order(model: ALPS, rng: torch.Generator, edge, stride) -> None:
    frames = bytes_of((3, 30, 41), rng)
    scorer = Scorer(model, precision="fp32", stride=stride, edge=edge)
    result = scorer.score_frames(frames)
    rows, columns = ops.patch_grid((30, 41), 12, stride, edge)
    assert result.patches.shape == (3, len(rows) * len(columns))
    assert result.kept is None
    for p in range(result.patches.shape[1]):
        row, column = rows[p // len(columns)], columns[p % len(columns)]
        patch = frames[:, None, row : row + 12, column : column + 12]
        torch.testing.assert_close(
            result.patches[:, p], scorer.score_images(patch), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("gated", [False, True])
def test_frame_pieces_do_not_change_scores(model: ALPS, rng, monkeypatch, gated) -> None:
    frames = moving(9, rng)
    gate = MotionGate(threshold=2.0) if gated else None
    scorer = Scorer(model, precision="fp32", stride=3, gate=gate)
    whole = scorer.score_frames(frames)
    for limit in (12_000, 200_000):  # single rows of patches; a few frames
        monkeypatch.setattr(
            "fastalps.chunks.plan_chunks.__kwdefaults__", {"bytes_per_pixel": 4, "limit": limit}
        )
        pieces = scorer.score_frames(frames)
        torch.testing.assert_close(pieces.patches, whole.patches, rtol=0, atol=1e-6)
        torch.testing.assert_close(pieces.frames, whole.frames, rtol=0, atol=1e-6)
        assert not gated or torch.equal(pieces.kept, whole.kept)


@pytest.mark.parametrize("kind", KINDS)
def test_gate_changes_no_score_that_it_keeps(model: ALPS, rng: torch.Generator, kind) -> None:
    frames = moving(8, rng)
    gate = MotionGate(threshold=2.0)
    gated = Scorer(model, kind, precision="fp32", gate=gate).score_frames(frames)
    plain = Scorer(model, kind, precision="fp32").score_frames(frames)
    assert torch.equal(gated.kept, gate.kept(frames, 12))
    assert 0 < int(gated.kept.sum()) < gated.kept.numel()
    torch.testing.assert_close(
        gated.patches[gated.kept], plain.patches[gated.kept], rtol=0, atol=1e-6
    )
    assert (gated.patches[~gated.kept] == 0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_stream_gives_the_scores_of_the_array(model: ALPS, rng: torch.Generator, gated) -> None:
    frames = moving(11, rng)
    gate = MotionGate(2.0, background=frames.median(0).values) if gated else None
    scorer = Scorer(model, precision="fp32", gate=gate)
    whole = scorer.score_frames(frames)
    for chunks in (frames.split(4), list(frames), [frames[:5].numpy(), frames[5:5], frames[5:]]):
        results = list(scorer.score_frames(iter(chunks)))
        assert [len(result) for result in results] == [
            1 if chunk.ndim == 2 else len(chunk) for chunk in chunks
        ]
        patches = torch.cat([result.patches for result in results])
        torch.testing.assert_close(patches, whole.patches, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            torch.cat([result.frames for result in results]), whole.frames, rtol=0, atol=1e-6
        )


def test_stream_is_lazy(model: ALPS, rng: torch.Generator) -> None:
    taken = []

    def source():
        for t in range(1000):
            taken.append(t)
            yield bytes_of((2, 24, 24), rng)

    results = Scorer(model).score_frames(source())
    assert not taken
    next(results)
    next(results)
    assert taken == [0, 1]


def test_stream_estimates_a_background(model: ALPS, rng: torch.Generator) -> None:
    frames = moving(40, rng)
    scorer = Scorer(model, gate=MotionGate(threshold=4.0))
    results = list(scorer.score_frames(frames.split(10)))
    expected = MotionGate(4.0, background=frames.median(0).values).kept(frames, 12)
    assert torch.equal(results[-1].kept, expected[30:])


def test_all_kinds_in_one_pass(model: ALPS, rng: torch.Generator) -> None:
    frames = moving(4, rng)
    gate = MotionGate(2.0, background=frames.median(0).values)
    every = Scorer(model, precision="fp32", gate=gate).scores_frames(frames)
    assert tuple(every) == KINDS
    for kind in KINDS:
        single = Scorer(model, kind, precision="fp32", gate=gate).score_frames(frames)
        torch.testing.assert_close(every[kind].patches, single.patches, rtol=0, atol=1e-6)
    streamed = list(Scorer(model, gate=gate).scores_frames(frames.split(2)))
    assert [tuple(result) for result in streamed] == [KINDS, KINDS]


@pytest.mark.parametrize("reduce", ["max", "mean", "topk"])
def test_frame_scores_reduce_their_patches(model: ALPS, rng: torch.Generator, reduce) -> None:
    result = Scorer(model, frame_reduce=reduce, top_k=2).score_frames(bytes_of((3, 30, 41), rng))
    ranked = result.patches.sort(1, descending=True).values
    expected = {"max": ranked[:, 0], "mean": ranked.mean(1), "topk": ranked[:, :2].mean(1)}[reduce]
    torch.testing.assert_close(result.frames, expected)


def test_reduction_of_kept_patches_only() -> None:
    patches = torch.tensor([[1.0, 5, 3, 2], [4, 9, 9, 9], [7, 7, 7, 7]])
    kept = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert reduce_patches(patches, "max", kept=kept).tolist() == [3, 4, 0]
    assert reduce_patches(patches, "mean", kept=kept).tolist() == [2, 4, 0]
    assert reduce_patches(patches, "topk", 2, kept).tolist() == [2.5, 4, 0]
    assert reduce_patches(patches, "topk", 9).tolist() == [2.75, 7.75, 7]
    assert reduce_patches(torch.empty(2, 0), "topk").tolist() == [0, 0]


def test_heatmaps_lie_where_the_patches_are(model: ALPS, rng: torch.Generator) -> None:
    frames = bytes_of((4, 30, 41), rng)
    result = Scorer(model).score_frames(frames)
    heatmaps = result.heatmaps()
    assert heatmaps.shape == (4, 30, 41)
    assert heatmaps.dtype == torch.float32
    rows, columns = ops.patch_grid((30, 41), 12)
    assert torch.equal(heatmaps[:, 0, 0], result.patches[:, 0])
    assert torch.equal(heatmaps[:, 29, 40], result.patches[:, -1])
    # Row 18 is covered by the last row of patches, moved back to the border, and the one before.
    assert rows == [0, 12, 18]
    assert columns == [0, 12, 24, 29]
    expected = (result.patches[:, 4] + result.patches[:, 8]) / 2
    torch.testing.assert_close(heatmaps[:, 20, 0], expected)
    highest = result.heatmaps(slice(1, 3), reduce="max")
    torch.testing.assert_close(highest[:, 20, 0], result.patches[1:3, [4, 8]].amax(1))
    assert torch.equal(result.heatmaps([3]), heatmaps[3:])


def test_colour_frames(rng: torch.Generator) -> None:
    network = warmed_model(10, 3)
    frames = bytes_of((2, 3, 20, 25), rng)
    result = Scorer(network, precision="fp32").score_frames(frames)
    corner = Scorer(network, precision="fp32").score_images(frames[:, :, -10:, -10:])
    torch.testing.assert_close(result.patches[:, -1], corner, rtol=1e-5, atol=1e-6)
    single = next(Scorer(network, precision="fp32").score_frames(iter(frames)))
    torch.testing.assert_close(single.patches, result.patches[:1], rtol=0, atol=1e-6)


def test_floating_frames(model: ALPS, rng: torch.Generator) -> None:
    frames = bytes_of((2, 30, 41), rng)
    scorer = Scorer(model, precision="fp32")
    expected = scorer.score_frames(frames).patches
    for values in (frames / 255, frames.double() / 255, (frames / 255)[:, None]):
        torch.testing.assert_close(scorer.score_frames(values).patches, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gate", [None, MotionGate()])
def test_no_frames_give_no_scores(model: ALPS, gate) -> None:
    result = Scorer(model, gate=gate).score_frames(torch.empty(0, 24, 36, dtype=torch.uint8))
    assert result.patches.shape == (0, 6)
    assert result.frames.shape == (0,)
    assert result.heatmaps().shape == (0, 24, 36)
    assert list(Scorer(model, gate=gate).score_frames(iter([]))) == []


# Precision -------------------------------------------------------------------------------------


def test_auto_precision_says_what_it_chose(model: ALPS, monkeypatch) -> None:
    if backends.load_native("cpu").available:
        assert Scorer(model).precision == "fp32"  # the engine's
    monkeypatch.setattr(backends, "load_native", lambda device: backends.State(False, "absent"))
    for fast, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(quantization, "has_fast_bfloat16", lambda device, fast=fast: fast)
        assert Scorer(model).precision == expected


@pytest.mark.filterwarnings("ignore:this cpu has no bf16")
def test_bf16_is_near_fp32(rng: torch.Generator) -> None:
    network = warmed_model(28)
    images = bytes_of((32, 1, 28, 28), rng)
    exact = Scorer(network, precision="fp32").score_images(images)
    scorer = Scorer(network, precision="bf16")
    assert scorer.precision == "bf16"
    torch.testing.assert_close(scorer.score_images(images), exact, rtol=1e-2, atol=0)


def test_emulated_bf16_warns(model: ALPS) -> None:
    if has_fast_bfloat16("cpu"):
        pytest.skip("this CPU has bf16 arithmetic")
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


@pytest.mark.parametrize("perturbation", ["noise", "none"])
def test_models_without_an_adversary(rng: torch.Generator, perturbation: str) -> None:
    network = ALPS(image_size=12, preset="fast", perturbation=perturbation)
    images = bytes_of((6, 1, 12, 12), rng)
    found = Scorer(network, precision="fp32").scores_images(images)
    expected = network.score(images / 255)
    torch.testing.assert_close(found.normal, expected.normal, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.normal, found.perturbed) == (perturbation == "none")


def test_gate_needs_gray() -> None:
    with pytest.raises(ValueError, match=r"gate works on gray frames.*takes 3 channels"):
        Scorer(ALPS(image_size=12, channels=3, preset="fast"), gate=MotionGate())


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


@pytest.mark.parametrize(
    ("frames", "gate", "error", "message"),
    [
        (torch.zeros(2, 11, 40), None, ValueError, "patch_size: 12x12 is larger than the frame"),
        (torch.zeros(2, 3, 24, 24), None, ValueError, r"model's 1 channel\(s\), got 3"),
        (torch.zeros(24, 24), None, ValueError, r"\(N, H, W\) or \(N, C, H, W\), got shape \(24"),
        (torch.zeros(2, 24, 24), MotionGate(), TypeError, "uint8 for the motion gate, got torch"),
        (torch.zeros(2, 24, 24).int(), None, TypeError, "uint8 .* got torch.int32"),
        (
            torch.zeros(2, 24, 24, dtype=torch.uint8),
            MotionGate(background=torch.zeros(24, 25, dtype=torch.uint8)),
            ValueError,
            "size 24 x 25 of the gate's background, got 24 x 24",
        ),
        (7, None, TypeError, "tensor, an array or an iterable of them, got int"),
    ],
)
def test_bad_frames_are_refused(model: ALPS, frames, gate, error, message) -> None:
    with pytest.raises(error, match=message):
        Scorer(model, gate=gate).score_frames(frames)


def test_frame_size_must_not_change_within_a_stream(model: ALPS, rng: torch.Generator) -> None:
    results = Scorer(model).score_frames([bytes_of((3, 24, 24), rng), bytes_of((1, 24, 25), rng)])
    next(results)
    with pytest.raises(ValueError, match="were 24 x 24, but frame 3 is 24 x 25"):
        next(results)


# Calibration -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*too few for a false-positive rate")
@pytest.mark.parametrize("target", [0.01, 0.05, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_threshold_is_the_smallest_that_holds_the_target(rng, target, ties) -> None:
    for count in (1, 2, 7, 100, 101, 1000):
        scores = torch.rand(count, generator=rng)
        if ties:
            scores = (scores * 10).round()
        threshold = threshold_at(scores, target)
        assert (scores > threshold).sum() <= target * count + 1e-9
        smaller = scores[scores < threshold]
        if smaller.numel():
            assert (scores > smaller.max()).sum() > target * count - 1e-9


def test_calibration_of_images(model: ALPS, rng: torch.Generator) -> None:
    images = bytes_of((200, 1, 12, 12), rng)
    scorer = Scorer(model, "normal")
    calibration = scorer.calibrate(images, target_fpr=0.05)
    assert (scorer.score_images(images) > calibration.threshold).sum() == 10
    assert (calibration.score, calibration.level, calibration.samples) == ("normal", "image", 200)
    assert calibration.target_false_positive_rate == 0.05


def test_calibration_of_frames_and_patches(model: ALPS, rng: torch.Generator) -> None:
    frames = moving(60, rng)
    gate = MotionGate(2.0, background=frames.median(0).values)
    scorer = Scorer(model, gate=gate, frame_reduce="topk", top_k=2)
    result = scorer.score_frames(frames)
    by_frame = scorer.calibrate(frames, 0.1, level="frame")
    assert int((result.frames > by_frame.threshold).sum()) == 6
    assert by_frame.samples == 60
    assert by_frame.settings["top_k"] == 2
    assert by_frame.settings["gate_threshold"] == 2.0
    by_patch = scorer.calibrate(frames, 0.1, level="patch")
    kept = int(result.kept.sum())
    assert by_patch.samples == kept
    assert int((result.patches > by_patch.threshold).sum()) == int(0.1 * kept)
    for data in (frames.split(7), [Clip("a", frames[:25]), Clip("b", frames[25:])]):
        assert scorer.calibrate(data, 0.1, level="frame") == by_frame


def test_calibration_refuses_what_it_cannot_use(model: ALPS, rng: torch.Generator) -> None:
    scorer = Scorer(model)
    images = bytes_of((20, 1, 12, 12), rng)
    for target in (0, 1, -0.5, 2, float("nan")):
        with pytest.raises(ValueError, match="target_fpr must be between 0 and 1"):
            scorer.calibrate(images, target)
    with pytest.raises(ValueError, match="normal_data must not be empty"):
        scorer.calibrate(images[:0], 0.1)
    for nothing in ([], torch.empty(0, 24, 24, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="normal_data must not be empty"):
            scorer.calibrate(nothing, 0.1, level="frame")
    with pytest.raises(ValueError, match="level must be one of image, patch, frame, got 'video'"):
        scorer.calibrate(images, 0.1, level="video")
    with pytest.warns(UserWarning, match="20 normal scores are too few .* use at least 100"):
        assert scorer.calibrate(images, 0.01).threshold == scorer.score_images(images).max()


# Memory and devices ----------------------------------------------------------------------------

MEMORY_PROBE = """
    import resource, sys
    import numpy as np
    import torch
    from fastalps import ALPS, MotionGate, Scorer

    torch.set_num_threads(1)
    count, way, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    gate = None if way == "plain" else MotionGate(threshold=30.0)
    scorer = Scorer(ALPS(image_size=16, preset="fast"), "normal", gate=gate)

    def source():
        generator = torch.Generator().manual_seed(0)
        scene = torch.randint(0, 200, (1, 48, 48), generator=generator, dtype=torch.uint8)
        for t in range(0, count, 50):
            frames = scene.repeat(50, 1, 1)
            frames[:, t % 32 : t % 32 + 16, :16] += 50
            yield frames

    if way == "mapped":
        with open(path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 48, 48)}
            np.lib.format.write_array_header_1_0(file, header)
            for frames in source():
                file.write(frames.numpy().data)
        total = len(scorer.score_frames(np.load(path, mmap_mode="r")))
    else:
        total = sum(len(result) for result in scorer.score_frames(source()))
    assert total == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("way", ["plain", "gated", "mapped"])
def test_memory_does_not_grow_with_the_video(way: str, tmp_path) -> None:
    def peak(count: int) -> int:
        path = str(tmp_path / f"{count}.npy")
        command = [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), str(count), way, path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return int(done.stdout)

    # 23 MB of frames more. Keeping a hundred bytes a patch, or the frames, would show.
    assert peak(12_000) - peak(2_000) < 10 * 1024


@pytest.mark.gpu
@needs_cuda
def test_cuda_graph_gives_the_scores_of_the_cpu(rng: torch.Generator) -> None:
    network = warmed_model(28)
    images = bytes_of((50, 1, 28, 28), rng)
    scorer = Scorer(network, precision="fp32", device="cuda", batch_size=16)
    expected = Scorer(network, precision="fp32", device="cpu").scores_images(images)
    for values in (images, images.cuda()):
        found = scorer.scores_images(values)
        assert found.normal.device == values.device
        for kind in KINDS:
            torch.testing.assert_close(
                getattr(found, kind).cpu(), getattr(expected, kind), rtol=1e-4, atol=1e-6
            )
    # Replays with new pixels; a graph that kept its first results would not follow.
    flipped = scorer.score_images(images.flip(0))
    torch.testing.assert_close(flipped, expected.average.flip(0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(flipped, expected.average, rtol=1e-4)


@pytest.mark.gpu
@needs_cuda
def test_frames_on_cuda(rng: torch.Generator) -> None:
    network = warmed_model()
    frames = moving(9, rng)
    gate = MotionGate(2.0)
    expected = Scorer(network, precision="fp32", gate=gate).score_frames(frames)
    scorer = Scorer(network, precision="fp32", gate=gate, device="cuda")
    for values in (frames, frames.cuda()):
        found = scorer.score_frames(values)
        assert found.patches.device == values.device
        torch.testing.assert_close(found.patches.cpu(), expected.patches, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.kept.cpu(), expected.kept)


def test_sizes_are_whole_numbers_of_any_kind(model: ALPS) -> None:
    scorer = Scorer(model, stride=np.int64(3), batch_size=np.int32(7), top_k=np.int16(2))
    assert scorer.stride == (3, 3)
    with pytest.raises(ValueError, match=r"stride: expected a number of pixels or a pair"):
        Scorer(model, stride=(7.9, 7.9))
    config = ALPS(np.int64(8), latent=np.int64(4), encoder=list(np.array([4, 4, 4]))).config
    assert config == ALPS(8, latent=4, encoder=[4, 4, 4]).config
    assert all(type(value) is int for value in (config.latent, *config.encoder))
