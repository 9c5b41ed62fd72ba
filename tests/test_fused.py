"""The fused CUDA kernels: what they cover here, and on a GPU their scores, gate and graphs.

`test_fused_emulation.py` proves the kernels' indices without a GPU.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastalps import ALPS, MotionGate, Scorer, ops, use_backend
from fastalps.fused import FusedEngine, why_not
from fastalps.fused.packing import SHAPES, fragments, pack_fused, shape_number
from fastalps.models import model_config
from fastalps.testing import SCORE_ERROR, poisoned
from tests.fused_reference import NAMES, STRIDE, Reference, frames_of, make_model, patches_of
from tests.networks import exact, relative

BF16 = SCORE_ERROR[torch.bfloat16]


# Without a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "precision", "reason"),
    [
        ({}, "fp32", "compute in bf16, not in fp32"),
        ({"image_size": 32}, "bf16", "images of 32 x 32"),
        ({"image_size": (30, 28)}, "bf16", "images of 30 x 28"),
        ({"channels": 3}, "bf16", "3 channel(s)"),
        ({"latent": 64}, "bf16", "latent 64"),
        ({"distorter": (16, 32, 64)}, "bf16", "compiled for one channel and the widths of"),
        ({"perturbation": "noise"}, "bf16", "draw no noise"),
    ],
)
def test_reasons(options, precision, reason):
    config = model_config(**{"image_size": 28, "preset": "paper", **options})
    assert reason in why_not(config, torch.device("cuda"), precision)
    assert "run on CUDA devices, not on cpu" in why_not(config, torch.device("cpu"), precision)


def test_covered_without_a_library():
    config = model_config(30, 1, "fast")
    assert shape_number(config) == SHAPES.index(("fast", 30))
    if not torch.cuda.is_available():
        assert "CUDA" in why_not(config, torch.device("cuda"), "bf16")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_size": 32}, "images of 32 x 32"),
        ({"perturbation": "noise"}, "draw no noise"),
    ],
)
def test_refuses_what_it_would_score_wrongly(options, reason):
    with pytest.raises(ValueError, match=reason):
        FusedEngine(ALPS(**options), torch.device("cuda"))


def test_fragments_hold_each_weight_once():
    """Lane 4 * n + t of a fragment: terms 2t, 2t + 1, 2t + 8, 2t + 9 of output n; zeros beyond."""
    matrix = torch.arange(1.0, 1 + 20 * 9).reshape(20, 9)
    packed = fragments(matrix)
    assert packed.shape == (2 * 2, 32, 4)
    for step in range(2):
        for tile in range(2):
            for lane in range(32):
                output, quad = 8 * tile + lane // 4, lane % 4
                for place, term in enumerate((0, 1, 8, 9)):
                    row = 16 * step + 2 * quad + term
                    expected = matrix[row, output] if row < 20 and output < 9 else 0
                    assert packed[2 * step + tile, lane, place] == expected


def test_packing_without_a_distorter():
    plain = pack_fused(ALPS(28, 1, "fast", perturbation="none"))
    full = pack_fused(ALPS(28, 1, "fast"))
    assert plain.weights.shape == full.weights.shape and plain.biases.shape == full.biases.shape
    assert plain.weights.dtype == torch.bfloat16 and plain.biases.dtype == torch.float32


# On a GPU ----------------------------------------------------------------------------------------


def engine_for(model: ALPS) -> FusedEngine:
    """The fused kernels of a model; skips the test where they cannot run."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    if reason := why_not(model.config, device, "bf16"):
        pytest.skip(reason)
    return FusedEngine(model, device)


def cut_of(model: ALPS, edge: str = "cover") -> tuple:
    return model.config.image_size, STRIDE, edge


@pytest.mark.gpu
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16], ids=str)
def test_values(shape, dtype, rng):
    """Near float64, and nearer to the model that rounds to bf16 where the kernels do."""
    model = make_model(shape, rng, bound="tanh")
    engine = engine_for(model)
    frames = frames_of(shape, rng, 5)
    images = patches_of(frames, model.config.image_size[0], STRIDE)
    values = frames if dtype == torch.uint8 else (frames.double() / 255).to(dtype)
    with poisoned():
        found, kept = engine.frame_errors(values.cuda(), cut_of(model), "both")
    assert kept is None and found.shape == (2, 5, 6)
    assert relative(found.flatten(1), exact(model, images)) <= BF16
    if dtype != torch.float16:
        expected = Reference(model).errors(images)
        assert relative(found.flatten(1), expected) <= 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("bound", ["none", "tanh", "norm"])
@pytest.mark.parametrize("passes", ["normal", "perturbed", "both"])
def test_passes_and_bounds(bound, passes, rng):
    model = make_model(SHAPES.index(("fast", 28)), rng, bound=bound, strength=0.5)
    images = torch.rand(37, 1, 28, 28, generator=rng)
    found = engine_for(model).errors(images.cuda(), passes)
    rows = {"normal": [0], "perturbed": [1], "both": [0, 1]}[passes]
    assert relative(found, exact(model, images)[rows]) <= BF16


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [3, 7, 31])
def test_smoothing(smoothing, rng):
    model = make_model(SHAPES.index(("fast", 28)), rng, smoothing=smoothing)
    images = torch.rand(37, 1, 28, 28, generator=rng)
    found = engine_for(model).errors(images.cuda(), "both")
    reference = Reference(model)
    expected, plain = reference.errors(images.double()), reference.errors(images.double(), 1)
    # As in test_fused_emulation.py: residuals of both signs cancel, their roundings need not.
    room = 4e-3 * (expected * plain).sqrt()
    assert ((found.double().cpu() - expected).abs() <= room).all()


@pytest.mark.gpu
def test_without_perturbation(rng):
    model = make_model(SHAPES.index(("fast", 28)), rng, perturbation="none")
    images = torch.rand(9, 1, 28, 28, generator=rng)
    found = engine_for(model).errors(images.cuda(), "both")
    assert found.shape == (2, 9) and torch.equal(found[0], found[1])
    assert relative(found, exact(model, images)) <= BF16


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SHAPES.index(("fast", 28)), SHAPES.index(("network-b", 30))])
def test_batch_sizes(shape, rng):
    """A score has the same bits whatever else is in the call, in one chunk or in several."""
    model = make_model(shape, rng)
    engine = engine_for(model)
    size = model.config.image_size[0]
    images = torch.randint(0, 256, (67, 1, size, size), dtype=torch.uint8, generator=rng).cuda()
    whole = engine.errors(images, "both")
    for count in (0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 67):
        with poisoned():
            found = engine.errors(images[:count], "both")
        assert torch.equal(found, whole[:, :count])
    engine.chunk = 24
    with poisoned():
        assert torch.equal(engine.errors(images, "both"), whole)
    spread = torch.zeros(67, 1, size, 2 * size, dtype=torch.uint8, device="cuda")[..., ::2]
    spread.copy_(images)
    assert torch.equal(engine.errors(spread, "both"), whole)


def scene(shape: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames of noise over a still background, each still in another place; the background."""
    frames = frames_of(shape, rng, 7)
    background = frames_of(shape, rng)[0]
    for number, frame in enumerate(frames):
        frame[: 4 * number] = background[: 4 * number]
    frames[3] = background
    return frames, background


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [None, 5])
def test_gate(chunk, rng):
    shape = SHAPES.index(("fast", 30))
    model = make_model(shape, rng)
    engine = engine_for(model)
    engine.chunk = chunk or engine.chunk
    frames, background = (part.cuda() for part in scene(shape, rng))
    every, _ = engine.frame_errors(frames, cut_of(model), "both")
    _, index = ops.active_patches(frames, background, 30, STRIDE, threshold=40.0)
    expected = torch.zeros(7, every.shape[2], dtype=torch.bool, device="cuda")
    expected[index[:, 0], index[:, 1]] = True
    assert 0 < expected.sum() < expected.numel()
    with poisoned():
        found, kept = engine.frame_errors(frames, cut_of(model), "both", background, 40.0)
    assert torch.equal(kept, expected)
    assert torch.equal(found, every * expected)
    # Nothing moves: nothing is scored.
    with poisoned():
        found, kept = engine.frame_errors(frames, cut_of(model), "both", background, 255.0)
    assert not kept.any() and not found.any()


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_graph(gated, rng):
    """Captured, poisoned, replayed on other frames and another stream, updated after capture."""
    shape = SHAPES.index(("fast", 28))
    model, other = make_model(shape, rng), make_model(shape, rng)
    engine = engine_for(model)
    frames, background = (part.cuda() for part in scene(shape, rng))
    gate = (background, 40.0) if gated else ()
    still = frames.clone()
    engine.frame_errors(still, cut_of(model), "both", *gate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        errors, kept = engine.frame_errors(still, cut_of(model), "both", *gate)

    def check(pixels: Tensor, now: FusedEngine) -> None:
        errors.fill_(torch.nan)
        still.copy_(pixels)
        graph.replay()
        expected, moved = now.frame_errors(pixels, cut_of(model), "both", *gate)
        assert torch.equal(errors, expected)
        assert moved is None or torch.equal(kept, moved)

    check(frames, engine)
    check(frames.flip(0).contiguous(), engine)
    # Another shape meanwhile, and a replay on another stream.
    engine.frame_errors(frames[:2], cut_of(model), "normal")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(frames, engine)
    torch.cuda.current_stream().wait_stream(stream)
    before = errors.clone()
    engine.update(other)
    check(frames, FusedEngine(other, torch.device("cuda")))
    assert not torch.equal(errors, before)
    with pytest.raises(ValueError, match="configuration"):
        engine.update(ALPS(30, 1, "fast"))


def graphs_of(engine: FusedEngine) -> int:
    """How many kinds of calls are replayed."""
    return sum(made is not None for made in engine._repeats._known.values())


def one_by_one(
    engine: FusedEngine, frames: Tensor, cut: tuple, *gate
) -> tuple[Tensor, Tensor | None]:
    """What single frames give, put together when the last one has been asked for."""
    found = [engine.frame_errors(frame[None], cut, "both", *gate) for frame in frames]
    errors = torch.cat([errors for errors, _ in found], 1)
    return errors, torch.cat([kept for _, kept in found]) if gate else None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SHAPES.index(("fast", 28)), SHAPES.index(("network-b", 30))])
@pytest.mark.parametrize(
    ("dtype", "gated"),
    [
        (torch.uint8, False),
        (torch.uint8, True),  # All that the gate takes.
        (torch.float32, False),
        (torch.float16, False),
    ],
    ids=str,
)
def test_repeated_calls(shape, dtype, gated, rng):
    """Replayed, with other frames each time, as in one call; no result is written to again."""
    model, other = make_model(shape, rng), make_model(shape, rng)
    engine, cut = engine_for(model), cut_of(model)
    frames, background = (part.cuda() for part in scene(shape, rng))
    values = frames if dtype == torch.uint8 else (frames.double() / 255).to(dtype)
    gate = (background, 40.0) if gated else ()
    whole, moved = engine.frame_errors(values, cut, "both", *gate)
    assert graphs_of(engine) == 0
    for mode in (torch.inference_mode(), torch.enable_grad(), poisoned()):
        with mode:
            found, kept = one_by_one(engine, values, cut, *gate)
        assert torch.equal(found, whole)
        assert moved is None or torch.equal(kept, moved)
    assert graphs_of(engine) == 1
    spread = torch.zeros(*values.shape[:2], 2 * values.shape[2], dtype=dtype, device="cuda")
    spread[..., ::2] = values
    assert torch.equal(one_by_one(engine, spread[..., ::2], cut, *gate)[0], whole)
    assert graphs_of(engine) == 1

    engine.update(other)
    expected, _ = FusedEngine(other, torch.device("cuda")).frame_errors(values, cut, "both", *gate)
    assert torch.equal(one_by_one(engine, values, cut, *gate)[0], expected)
    assert not torch.equal(expected, whole)


@pytest.mark.gpu
def test_repeated_calls_of_another_background(rng):
    shape = SHAPES.index(("fast", 30))
    model = make_model(shape, rng)
    engine, cut = engine_for(model), cut_of(model)
    frames, background = (part.cuda() for part in scene(shape, rng))
    still = background.clone()
    for _ in range(3):
        for other, threshold in ((background, 40.0), (frames[2], 40.0), (background, 10.0)):
            still.copy_(other)
            _, kept = one_by_one(engine, frames, cut, still, threshold)
            _, index = ops.active_patches(frames, other, 30, STRIDE, threshold=threshold)
            expected = torch.zeros_like(kept)
            expected[index[:, 0], index[:, 1]] = True
            assert torch.equal(kept, expected)


@pytest.mark.gpu
def test_repeated_calls_of_many_kinds(rng):
    """More kinds than are remembered, with both passes and one, in turn and in a row."""
    shape = SHAPES.index(("fast", 28))
    model = make_model(shape, rng)
    engine, cut = engine_for(model), cut_of(model)
    frames = frames_of(shape, rng, 7).cuda()
    whole, _ = engine.frame_errors(frames, cut, "both")
    kinds = [(count, "both", slice(0, 2)) for count in range(1, 6)]
    kinds += [(3, "normal", slice(0, 1)), (3, "perturbed", slice(1, 2))]
    for order in (3 * kinds, [kind for kind in kinds for _ in range(3)]):
        found = [engine.frame_errors(frames[:n], cut, passes)[0] for n, passes, _ in order]
        for errors, (count, _, rows) in zip(found, order, strict=True):
            assert torch.equal(errors, whole[rows, :count])
    assert graphs_of(engine) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("streams", [1, 2, 5])
def test_repeated_calls_from_streams_and_threads(streams, threads, rng):
    """Each stream and thread at its own pace, with one engine."""
    shape = SHAPES.index(("network-b", 30))
    model = make_model(shape, rng)
    engine, cut = engine_for(model), cut_of(model)
    frames = frames_of(shape, rng, 40).cuda()
    whole, _ = engine.frame_errors(frames, cut, "both")
    pool = [torch.cuda.Stream() for _ in range(streams)]
    torch.cuda.synchronize()

    def work(first: int) -> list[tuple[int, Tensor]]:
        found = []
        for number in range(first, 200):
            with torch.cuda.stream(pool[number % streams]):
                place = (7 * number + first) % 40
                frame = frames[place : place + 1]
                found.append((place, engine.frame_errors(frame, cut, "both")[0]))
        return found

    with ThreadPoolExecutor(threads) as workers:
        found = [pair for part in workers.map(work, range(threads)) for pair in part]
    torch.cuda.synchronize()
    assert all(torch.equal(errors, whole[:, place : place + 1]) for place, errors in found)
    assert graphs_of(engine) == streams or streams == 5


@pytest.mark.gpu
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_caller_captures_what_would_be_replayed(calls, rng):
    """After no, one or two calls of the kind: the caller's graph has the kernels itself."""
    shape = SHAPES.index(("fast", 28))
    model = make_model(shape, rng)
    engine, cut = engine_for(model), cut_of(model)
    frames = frames_of(shape, rng, 7).cuda()
    whole, _ = engine.frame_errors(frames, cut, "both")
    still = frames[:1].clone()
    for _ in range(calls):
        engine.frame_errors(still, cut, "both")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        errors, _ = engine.frame_errors(still, cut, "both")
    assert graphs_of(engine) == (calls == 2)
    for number, frame in enumerate(frames.split(1)):
        errors.fill_(torch.nan)
        still.copy_(frame)
        graph.replay()
        assert torch.equal(errors, whole[:, number : number + 1])
        assert torch.equal(engine.frame_errors(frame, cut, "both")[0], errors)
    # The caller's graph does not need the engine's.
    engine._repeats._known.clear()
    graph.replay()
    assert torch.equal(errors, whole[:, -1:])


@pytest.mark.gpu
def test_frames_of_a_camera(rng):
    """One at a time through a scorer, from the device and from the host."""
    shape = SHAPES.index(("fast", 30))
    model = make_model(shape, rng)
    engine_for(model)
    frames, background = scene(shape, rng)
    for gate in (None, MotionGate(40.0, background)):
        scorer = Scorer(model, precision="bf16", stride=STRIDE, gate=gate, device="cuda")
        whole = scorer.scores_frames(frames)
        for pixels in (frames, frames.cuda()):
            found = [scorer.scores_frames(frame) for frame in pixels.split(1)]
            for kind, expected in whole.items():
                for name in ("patches", "frames", "kept"):
                    if getattr(expected, name) is not None:
                        parts = [getattr(scores[kind], name) for scores in found]
                        assert parts[0].device == pixels.device and not parts[0].is_pinned()
                        assert torch.equal(torch.cat(parts).cpu(), getattr(expected, name))
        # What a scorer keeps for its next call is not a copy's.
        assert torch.equal(
            copy.deepcopy(scorer).score_frames(frames).patches, whole["average"].patches
        )


@pytest.mark.gpu
def test_scorer(rng, caplog):
    shape = SHAPES.index(("paper", 30))
    model = make_model(shape, rng)
    engine_for(model)
    frames, background = scene(shape, rng)
    gate = MotionGate(40.0, background)
    options = {"stride": STRIDE, "gate": gate, "device": "cuda"}
    scorer = Scorer(model, precision="bf16", **options)
    assert scorer.method == "fused"
    layers = Scorer(model, precision="fp32", **options)
    assert layers.method == "layers"
    for pixels in (frames, frames.cuda()):
        found, expected = scorer.score_frames(pixels), layers.score_frames(pixels)
        assert found.patches.device == pixels.device
        assert torch.equal(found.kept, expected.kept)
        torch.testing.assert_close(found.patches, expected.patches, rtol=BF16, atol=1e-6)
    with use_backend("reference"):
        assert scorer.method == "layers"
    with caplog.at_level(logging.INFO, logger="fastalps"):
        assert Scorer(ALPS(32), precision="bf16", device="cuda").method == "layers"
    assert "images of 32 x 32" in caplog.text


@pytest.mark.gpu
def test_refuses_wrong_buffers(rng):
    model = make_model(SHAPES.index(("fast", 28)), rng)
    engine = engine_for(model)
    frames = torch.zeros(2, 28, 28, dtype=torch.uint8, device="cuda")
    engine.weights = engine.weights[:-1]
    with pytest.raises(RuntimeError, match="weights"):
        engine.frame_errors(frames, cut_of(model), "both")
    engine = engine_for(model)
    with pytest.raises(RuntimeError, match="larger than the frame"):
        torch.ops.fastalps.fused_errors(
            frames[:, :20], None, 0.0, STRIDE, True, engine.shape, engine.weights, engine.biases,
            0, 0.2, 1.0, 1, True, True, 1, engine._empty(1 << 16, torch.uint8), None, None,
            torch.empty(2, 2, device="cuda"),
        )  # fmt: skip
