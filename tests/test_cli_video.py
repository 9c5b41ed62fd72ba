"""The commands on video: patches of walkers in, frames with intruders flagged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalps.cli import score, train
from fastalps.data import (
    load_ucsd,
    motion_frames,
    moving_patches,
    patch_task,
    still_background,
)
from fastalps.errors import UserError
from fastalps.gate import MotionGate, clip_background
from tests.commands import rows_of
from tests.images import save
from tests.videos import FRAMES, HEIGHT, INTRUSION, WIDTH, write_street

OPTIONS = ["--dataset", "ucsd-ped2", "--preset", "fast", "--latent", "4", "--patch-size", "10"]
OPTIONS += ["--epochs", "12", "--batch-size", "32", "--target-fpr", "0.1"]


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    return write_street(tmp_path_factory.mktemp("street"), torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["gray", "motion"])
def run(request, street) -> Path:
    folder = street.parent / f"run-{request.param}"
    options = [*OPTIONS, "--frames", request.param, "--root", str(street)]
    assert train.main([*options, "--out", str(folder)]) == 0
    return folder


def test_moving_patches_are_those_of_the_gate(street) -> None:
    clips = load_ucsd(street, "ped2", "train")
    gate = MotionGate(3.0)
    patches = moving_patches(clips, 10, gate)
    expected = []
    for clip in clips:
        kept = gate.kept(clip.frames, 10)
        tiles = clip.frames.unfold(1, 10, 10).unfold(2, 10, 10).flatten(1, 2)
        expected.append(tiles[kept])
        difference = (tiles.float() - _tiles(clip_background(clip.frames))).abs().mean((2, 3))
        assert torch.equal(kept, difference > 3)
    assert torch.equal(patches[:, 0], torch.cat(expected))
    assert len(patches) < sum(len(clip.frames) for clip in clips) * 24


def _tiles(frame: torch.Tensor) -> torch.Tensor:
    return frame[None].unfold(1, 10, 10).unfold(2, 10, 10).flatten(1, 2).float()


def test_motion_frames_are_the_change_since_the_frame_before(rng) -> None:
    frames = torch.randint(0, 256, (5, 6, 7), dtype=torch.uint8, generator=rng)
    expected = 128 + frames[1:].int() - frames[:-1].int()
    moved = motion_frames(frames)
    assert torch.equal(moved[1:].int(), expected.clamp(0, 255))
    assert (moved[0] == 128).all() and torch.equal(moved[0], still_background((6, 7)))
    # In pieces, and by a view that is not contiguous.
    pieces = [motion_frames(frames[:2]), motion_frames(frames[2:], frames[1])]
    assert torch.equal(torch.cat(pieces), moved)
    assert torch.equal(motion_frames(frames.mT).mT, moved)
    assert motion_frames(frames[:0]).shape == (0, 6, 7)


def test_task_holds_whole_clips_out(street) -> None:
    clips = load_ucsd(street, "ped2", "train")
    task, held_out = patch_task("street", clips, 10, MotionGate())
    assert [clip.name for clip in held_out] == ["Train004"]
    assert torch.equal(task.train, moving_patches(clips[:3], 10, MotionGate()))
    assert not task.validation_labels.any() and len(task.test) == 0
    with pytest.raises(UserError, match="at least 2"):
        patch_task("street", clips[:1], 10, MotionGate())
    with pytest.raises(UserError, match="nothing moves"):
        patch_task("street", clips, 10, MotionGate(250))


def test_training_run(run) -> None:
    record = json.loads((run / "metrics.json").read_text())
    # No anomaly may be seen before test, whatever the default protocol is for images.
    assert record["protocol"] == "strict" and record["chosen_by"] == "loss"
    frame = record["metrics"]["reported"]["frame"]["micro"]["max"]["gated"]
    patch = record["metrics"]["reported"]["patch"]
    assert frame["count"] == 2 * FRAMES and frame["auroc"] > 0.9
    assert patch["gated"]["auroc"] > 0.8 and patch["all"]["count"] > patch["gated"]["count"]
    assert record["metrics"]["motion_baseline"]["patch"]["all"]["auroc"] > 0.5
    assert record["calibration"]["level"] == "frame"
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {f"{n}.png" for n in ("losses", "roc", "histogram", "reconstructions")} | {
        "timeline.png"
    }


def test_scores_agree_between_the_commands(run, street, tmp_path, capsys) -> None:
    clip, out = street / "Test" / "Test001", tmp_path / "scored"
    (clip / ".DS_Store").write_bytes(b"x")
    (clip / "._001.png").write_bytes(b"x")
    # Chunks smaller than the clip: the stream must give what the whole gives.
    arguments = [str(run), str(clip), "--out", str(out), "--chunk", "5", "--overlays", "3"]
    assert score.main(arguments) == 0
    assert "passed the motion gate" in capsys.readouterr().out
    expected = [row for row in rows_of(run / "scores.csv") if row["clip"] == "Test001"]
    found = rows_of(out / "scores.csv")
    assert [row["frame"] for row in found] == [f"{t:03d}.png" for t in range(1, FRAMES + 1)]
    for row, wanted in zip(found, expected, strict=True):
        assert float(row["score"]) == pytest.approx(float(wanted["average"]), rel=1e-4)
        assert row["flagged"] == wanted["flagged"]
    flagged = {i for i, row in enumerate(found, 1) if row["flagged"] == "1"}
    intruder = set(range(INTRUSION[0], INTRUSION[1] + 1))
    assert intruder <= flagged
    scores = {i: float(row["score"]) for i, row in enumerate(found, 1)}
    quiet = sorted(value for i, value in scores.items() if i not in intruder)
    assert min(scores[i] for i in intruder) > quiet[len(quiet) // 2]
    overlays = sorted((out / "overlays").iterdir())
    assert len(overlays) == 3
    with Image.open(overlays[0]) as picture:
        # Gray frames: colour can only come from the heatmap and the border.
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert (abs(pixels[..., 0] - pixels[..., 2]) > 40).mean() > 0.01
        assert picture.width % WIDTH == 0 and (picture.height - 22) % HEIGHT == 0


def test_every_overlay(run, street, tmp_path) -> None:
    clip = str(street / "Test" / "Test002")
    for count, expected in ((-1, FRAMES), (0, 0)):
        out = tmp_path / f"all{count}"
        assert score.main([str(run), clip, "--out", str(out), f"--overlays={count}"]) == 0
        folder = out / "overlays"
        assert len(list(folder.iterdir()) if folder.exists() else []) == expected


def test_bad_clips(run, street, tmp_path, capsys) -> None:
    def fails(source: Path, message: str) -> None:
        out = tmp_path / "out"
        assert score.main([str(run), str(source), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not (out / "scores.csv").exists()

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no images")
    fails(tmp_path / "absent", "does not exist")
    fails(street / "Test" / "Test001" / "001.png", "is one image")
    frame = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    save(tmp_path / "mixed" / "001.png", frame)
    save(tmp_path / "mixed" / "002.png", frame[:-1])
    fails(tmp_path / "mixed", "one size")
    save(tmp_path / "small" / "001.png", frame[:8, :8])
    fails(tmp_path / "small", "larger than the frame")
    save(tmp_path / "cut" / "001.jpg", frame)
    content = (tmp_path / "cut" / "001.jpg").read_bytes()
    (tmp_path / "cut" / "001.jpg").write_bytes(content[: len(content) // 2])
    fails(tmp_path / "cut", "001.jpg")
