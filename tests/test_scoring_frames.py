"""Scorer on frames: patches, chunks and streams, gated, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from fastalps import ALPS, MotionGate, Scorer, ops
from tests.clips import moving
from tests.conftest import needs_cuda
from tests.images import pixels_of
from tests.networks import SCORES, randomise


@pytest.mark.parametrize("edge", ["cover", "drop"])
@pytest.mark.parametrize("stride", [None, (5, 7)])
def test_patches_are_in_grid_order(model: ALPS, rng: torch.Generator, edge, stride) -> None:
    frames = pixels_of((3, 30, 41), rng)
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


@pytest.mark.parametrize("kind", SCORES)
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


def test_stream_of_frames_with_their_channel(model: ALPS, rng: torch.Generator) -> None:
    frames = moving(9, rng)
    scorer = Scorer(model, precision="fp32", gate=MotionGate(2.0))
    plain = [r.patches for r in scorer.score_frames(iter(frames.split(3)))]
    found = [r.patches for r in scorer.score_frames(iter(frames[:, None].split(3)))]
    assert torch.equal(torch.cat(found), torch.cat(plain))


def test_stream_is_lazy(model: ALPS, rng: torch.Generator) -> None:
    taken = []

    def source():
        for t in range(1000):
            taken.append(t)
            yield pixels_of((2, 24, 24), rng)

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
    assert tuple(every) == SCORES
    for kind in SCORES:
        single = Scorer(model, kind, precision="fp32", gate=gate).score_frames(frames)
        torch.testing.assert_close(every[kind].patches, single.patches, rtol=0, atol=1e-6)
    streamed = list(Scorer(model, gate=gate).scores_frames(frames.split(2)))
    assert [tuple(result) for result in streamed] == [SCORES, SCORES]


def test_colour_frames(rng: torch.Generator) -> None:
    network = randomise(ALPS(10, 3, "fast"), 5)
    frames = pixels_of((2, 3, 20, 25), rng)
    result = Scorer(network, precision="fp32").score_frames(frames)
    corner = Scorer(network, precision="fp32").score_images(frames[:, :, -10:, -10:])
    torch.testing.assert_close(result.patches[:, -1], corner, rtol=1e-5, atol=1e-6)
    single = next(Scorer(network, precision="fp32").score_frames(iter(frames)))
    torch.testing.assert_close(single.patches, result.patches[:1], rtol=0, atol=1e-6)


def test_floating_frames(model: ALPS, rng: torch.Generator) -> None:
    frames = pixels_of((2, 30, 41), rng)
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


# Bad input -------------------------------------------------------------------------------------


def test_gate_needs_gray() -> None:
    with pytest.raises(ValueError, match=r"gate works on gray frames.*takes 3 channels"):
        Scorer(ALPS(image_size=12, channels=3, preset="fast"), gate=MotionGate())


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
    results = Scorer(model).score_frames([pixels_of((3, 24, 24), rng), pixels_of((1, 24, 25), rng)])
    next(results)
    with pytest.raises(ValueError, match="were 24 x 24, but frame 3 is 24 x 25"):
        next(results)


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
def test_frames_on_cuda(rng: torch.Generator) -> None:
    network = randomise(ALPS(12, preset="fast"), 5)
    frames = moving(9, rng)
    gate = MotionGate(2.0)
    expected = Scorer(network, precision="fp32", gate=gate).score_frames(frames)
    scorer = Scorer(network, precision="fp32", gate=gate, device="cuda")
    for values in (frames, frames.cuda()):
        found = scorer.score_frames(values)
        assert found.patches.device == values.device
        torch.testing.assert_close(found.patches.cpu(), expected.patches, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.kept.cpu(), expected.kept)
