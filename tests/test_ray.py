"""Ray Data: a folder of videos, scored by a real local cluster whose workers die."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastalps
from fastalps.cli import score
from fastalps.errors import UserError
from fastalps.integrations.ray import FrameScorer, VideoScorer
from tests import ROOT
from tests.commands import rows_of
from tests.videos import FRAMES, PATCH, run_on, run_on_images, scene, write

pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")

VIDEOS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs, and videos each of which shows something else."""
    root = tmp_path_factory.mktemp("ray")
    run_on(root / "gray", scene())
    run_on(root / "motion", scene(), motion=True)
    run_on_images(root / "images")
    (root / "videos").mkdir()
    for i in range(VIDEOS):
        write(root / "videos" / f"{i}.mkv", np.roll(scene(), 5 * i, 2))
    return root


def expected_scores(folder: Path, run: str, out: Path) -> dict[tuple[str, str], float]:
    """(path, frame) -> score, by the command."""
    scores = {}
    for path in sorted((folder / "videos").iterdir()):
        arguments = [str(folder / run), str(path), "--out", str(out / path.stem), "--device", "cpu"]
        assert score.main([*arguments, "--chunk", "7", "--overlays", "0"]) == 0
        for row in rows_of(out / path.stem / "scores.csv"):
            scores[str(path), row["frame"]] = float(row["score"])
    return scores


@pytest.mark.parametrize("run", ["gray", "motion"])
def test_rows_are_those_of_the_command(folder, tmp_path, run) -> None:
    expected = expected_scores(folder, run, tmp_path)
    scorer = VideoScorer(folder / run, chunk=7, device="cpu")
    paths = np.array([path for path, _ in dict.fromkeys(expected)], dtype=object)
    batches = list(scorer({"path": np.array(sorted(set(paths)), dtype=object)}))
    assert [len(batch["score"]) for batch in batches] == [7, 7, 7, 3] * VIDEOS
    found = {
        (path, frame): float(value)
        for batch in batches
        for path, frame, value in zip(batch["path"], batch["frame"], batch["score"], strict=True)
    }
    assert found == expected
    flagged = np.concatenate([batch["flagged"] for batch in batches])
    values = np.concatenate([batch["score"] for batch in batches])
    assert (flagged == (values > scorer.calibration.threshold)).all()


def test_a_broken_video_stops_the_job_or_keeps_its_word(folder, tmp_path) -> None:
    broken = write(tmp_path / "broken.avi", scene(60), "mjpeg")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    paths = np.array([str(broken), str(folder / "videos" / "0.mkv")], dtype=object)
    with pytest.raises(UserError, match="broke off"):
        list(VideoScorer(folder / "gray")({"path": paths}))
    batches = list(VideoScorer(folder / "gray", errors="keep")({"path": paths}))
    errors = [text for batch in batches for text in batch["error"]]
    assert len(errors) > FRAMES + 10 and sum(map(bool, errors)) == 1
    last = next(batch for batch in batches if batch["error"][0])
    assert "broke off" in last["error"][0] and np.isnan(last["score"]).all()
    assert not last["flagged"].any()


def test_frames_and_images(folder) -> None:
    frames = scene()
    background = np.asarray(fastalps.gate.clip_background(frames))
    scorer = FrameScorer(folder / "gray", background=background, device="cpu")
    found = scorer({"image": frames, "path": np.arange(FRAMES)})
    assert set(found) == {"path", "score", "flagged"} and found["score"].shape == (FRAMES,)
    assert torch.equal(
        torch.from_numpy(found["score"]),
        scorer.scorer.score_frames(torch.from_numpy(frames)).frames,
    )
    images = np.ascontiguousarray(frames[:, :PATCH, :PATCH, None])
    flags = FrameScorer(folder / "images", device="cpu", threshold=0.0)({"image": images})
    assert flags["flagged"].all()


def test_bad_use(folder) -> None:
    with pytest.raises(UserError, match="errors must be"):
        VideoScorer(folder / "gray", errors="ignore")
    with pytest.raises(UserError, match="no run on gray video"):
        VideoScorer(folder / "images")
    with pytest.raises(UserError, match="no column 'path'; it has file"):
        list(VideoScorer(folder / "gray")({"file": np.array(["x"])}))
    with pytest.raises(UserError, match="VideoScorer"):
        FrameScorer(folder / "motion")
    with pytest.raises(UserError, match="background"):
        FrameScorer(folder / "gray")
    sizes = np.array([np.zeros((3, 3)), np.zeros((4, 4))], dtype=object)
    with pytest.raises(UserError, match="differ in size"):
        FrameScorer(folder / "images")({"image": sizes})


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_cluster_scores_a_folder_and_survives_the_death_of_a_worker(
    folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastalps[ray]'")
    expected = expected_scores(folder, "motion", tmp_path)
    death = tmp_path / "died"

    class Mortal(VideoScorer):
        """Its process dies in the middle of a video, once."""

        def _score(self, path: str) -> Any:
            for number, item in enumerate(super()._score(path)):
                if path.endswith("2.mkv") and number == 2 and not death.exists():
                    death.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": environment},
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        paths = [{"path": str(path)} for path in sorted((folder / "videos").iterdir())]
        rows = (
            ray.data.from_items(paths, override_num_blocks=VIDEOS)
            .map_batches(
                Mortal,
                fn_constructor_args=[str(folder / "motion")],
                fn_constructor_kwargs={"chunk": 7, "device": "cpu"},
                batch_size=1,
                num_cpus=1,
                concurrency=2,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    assert death.exists()
    # Each frame once, those of the video that was begun anew, too.
    assert len(rows) == VIDEOS * FRAMES
    assert {(row["path"], row["frame"]): float(row["score"]) for row in rows} == expected
