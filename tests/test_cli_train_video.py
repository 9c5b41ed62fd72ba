"""`fastalps-train` on a folder of videos, and the tutorial from there to scores."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from fastalps.cli import score, train
from tests import ROOT
from tests.commands import error_of, rows_of
from tests.videos import FRAMES, HEIGHT, run_on, scene, write

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")


TRAIN = ["--dataset", "video", "--preset", "fast", "--latent", "4", "--patch-size", "10"]
TRAIN += ["--epochs", "1", "--batch-size", "32", "--gate-threshold", "2", "--target-fpr", "0.1"]


@pytest.mark.parametrize("frames", ["gray", "motion"])
def test_training_on_videos(tmp_path, frames, capsys) -> None:
    root, run = tmp_path / "normal", tmp_path / "run"
    root.mkdir()
    # One recording, of which the last eighth in time is held out; or one clip each.
    for name in ["a.mkv"] if frames == "gray" else ["a2.mkv", "a10.avi"]:
        write(root / name, scene(80))
    (root / ".hidden.mkv").write_bytes(b"x")
    (root / "notes.txt").write_bytes(b"x")
    arguments = [*TRAIN, "--frames", frames, "--root", str(root), "--out", str(run)]
    assert train.main(arguments) == 0
    rows = rows_of(run / "scores.csv")
    assert {row["clip"] for row in rows} == {"a.mkv part 8" if frames == "gray" else "a10.avi"}
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {
        f"{name}.png" for name in ("losses", "histogram", "timeline", "reconstructions")
    }
    record = json.loads((run / "metrics.json").read_text())
    assert record["metrics"]["held_out_frames"] == len(rows) and record["protocol"] == "strict"
    assert "no AUROC" in capsys.readouterr().out
    out = tmp_path / "out"
    video = next(root.glob("a*"))
    assert score.main([str(run), str(video), "--out", str(out)]) == 0
    assert len(rows_of(out / "scores.csv")) == 80


def test_bad_training_videos(tmp_path, capsys, monkeypatch) -> None:
    root, run = tmp_path / "normal", tmp_path / "run"
    root.mkdir()

    def fails(message: str, *options: str) -> None:
        assert train.main([*TRAIN, "--root", str(root), "--out", str(run), *options]) == 2
        assert message in error_of(capsys)
        assert not run.exists()

    fails("no videos")
    write(root / "a.mkv", scene(10))
    fails("too few for a single recording")
    fails("--cache does not apply", "--cache", str(tmp_path))
    write(root / "b.mkv", scene(10, HEIGHT + 8))
    fails("bring the videos to one size")
    (root / "b.mkv").write_bytes(b"junk" * 100)
    fails("b.mkv")
    (root / "b.mkv").unlink()
    monkeypatch.setattr("fastalps.memory.memory_bytes", lambda: 1000)
    fails("of memory")


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys) -> None:
    text = (ROOT / "docs" / "video.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_on(tmp_path / "runs" / "gate", scene(), motion=True)
    write(tmp_path / "today.mp4", scene(), "mpeg4")
    blocks = [part.partition("\n") for part in text.split("```")[1::2]]
    # What is not Python is for a shell, and needs a camera, or was printed.
    assert {kind for kind, _, _ in blocks} == {"sh", "python", "text"}
    for kind, _, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/video.md", "exec"), {})
    assert f"of {FRAMES} frames flagged" in capsys.readouterr().out
    # Every command of the tutorial has only options that there are.
    for kind, _, code in blocks:
        for line in code.splitlines() if kind == "sh" else ():
            for option in [word for word in line.split() if word.startswith("--")]:
                assert option in _help(line.split()[0])


@functools.cache
def _help(name: str) -> str:
    module = {"fastalps-train": "train", "fastalps-score": "score"}[name]
    done = subprocess.run(
        [sys.executable, "-m", f"fastalps.cli.{module}", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
