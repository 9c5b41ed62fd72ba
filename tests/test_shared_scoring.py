"""`torchrun -m fastalps.cli.score`: files of two processes are those of one, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ROOT
from tests.commands import run_in
from tests.images import save
from tests.video_servers import Server
from tests.videos import PATCH, run_on, run_on_images, scene, write

pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")

SCRIPT = str(ROOT / "tests" / "score_run.py")
CHUNK = ["--chunk", "5", "--overlays", "2", "--device", "cpu"]


class Inputs(NamedTuple):
    """Folders of runs and of what they score."""

    images_run: Path
    gray_run: Path
    motion_run: Path
    images: Path
    frames: Path
    video: Path
    broken: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    root = tmp_path_factory.mktemp("shared")
    frames = scene(33)
    # Light that grows: the background that is learned is another one at every chunk.
    for t in range(len(frames)):
        frames[t] = (frames[t].astype(int) + 2 * t).clip(0, 255)
    for t in range(len(frames)):
        save(root / "frames" / f"{t}.png", frames[t])
    for t in range(21):
        save(root / "images" / f"{t}.png", frames[t][:PATCH, t : t + PATCH])
    write(root / "a.mkv", frames)
    path = write(root / "broken.avi", scene(60), "mjpeg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return Inputs(
        run_on_images(root / "images-run"),
        run_on(root / "gray-run", frames),
        run_on(root / "motion-run", frames, motion=True),
        root / "images",
        root / "frames",
        root / "a.mkv",
        path,
    )


def run(processes: int, commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    return run_in(processes, SCRIPT, json.dumps(commands))


def codes(done: subprocess.CompletedProcess[str]) -> dict[int, list[int]]:
    """The exit codes of each process's commands."""
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return {int(line[1]): json.loads(line[2]) for line in lines if line[:1] == ["codes"]}


def test_two_processes_write_what_one_does(tmp_path, inputs) -> None:
    with Server(inputs.video.parent) as server:
        cases = {
            "images": [str(inputs.images_run), str(inputs.images), "--device", "cpu"],
            "gray": [str(inputs.gray_run), str(inputs.frames), *CHUNK],
            "motion": [str(inputs.motion_run), str(inputs.frames), *CHUNK, "--limit", "32"],
            "video": [str(inputs.gray_run), str(inputs.video), *CHUNK, "--annotated"],
            # The gate's background is learned as the frames come.
            "stream": [str(inputs.gray_run), f"{server.url}/a.mkv", *CHUNK],
            "broken": [str(inputs.motion_run), str(inputs.broken), *CHUNK],
        }
        done = {}
        for processes in (1, 2):
            out = tmp_path / str(processes)
            commands = [[*case, "--out", str(out / name)] for name, case in cases.items()]
            done[processes] = run(processes, commands)
    expected = [0, 0, 0, 0, 0, 2]
    assert codes(done[1]) == {0: expected}, done[1].stderr
    assert codes(done[2]) == {0: expected, 1: expected}, done[2].stderr
    names = ("scores.csv", "scores.jsonl", "scores.partial.csv", "scores.partial.jsonl")
    for name in cases:
        one, two = tmp_path / "1" / name, tmp_path / "2" / name
        assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
        for file in (one / n for n in names):
            assert not file.exists() or file.read_bytes() == (two / file.name).read_bytes()
        assert sorted(os.listdir(one / "overlays") if name != "images" else []) == sorted(
            os.listdir(two / "overlays") if name != "images" else []
        )
    rows = (tmp_path / "2" / "stream" / "scores.csv").read_text().splitlines()
    assert len(rows) == 34 and len({row.split(",")[2] for row in rows}) > 10
    assert (tmp_path / "2" / "broken" / "scores.partial.csv").exists()
    facts = json.loads((tmp_path / "2" / "gray" / "summary.json").read_text())["metrics"]
    assert facts["processes"] == 2
    # One process speaks.
    for processes in (1, 2):
        assert done[processes].stdout.count("wrote ") == len(cases)
        assert done[processes].stderr.count("fastalps-score: error:") == 1


def test_errors_end_all_processes_with_one_line(tmp_path, inputs) -> None:
    out = str(tmp_path / "out")
    cases = [
        ["--nonsense"],
        [str(inputs.gray_run), str(tmp_path / "absent"), "--out", out],
        [str(tmp_path), str(inputs.frames), "--out", out],
        [str(inputs.gray_run), str(inputs.frames), "--out", out, *CHUNK, "FAIL"],
    ]
    done = run(2, cases)
    assert codes(done) == {0: [2] * 4, 1: [2] * 4}, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("fastalps-score: ")]
    assert len(errors) == 4, done.stderr
    assert "absent does not exist" in errors[1]
    assert errors[3] == "fastalps-score: error: process 1: the roof leaks"
    assert not Path(out).exists() or not list(Path(out).iterdir())


def test_as_documented(tmp_path, inputs) -> None:
    command = ["-m", "fastalps.cli.score", str(inputs.motion_run), str(inputs.frames)]
    done = run_in(2, *command, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "33 frames" in done.stdout and "2 processes" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_interrupt_keeps_the_scores(tmp_path, inputs) -> None:
    path, out = write(tmp_path / "a.mkv", scene(200), rate=4), tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # In real time it takes 50 seconds.
    command += ["-m", "fastalps.cli.score", str(inputs.gray_run), str(path), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--realtime", "--chunk", "2", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # A shell's background jobs ignore it, and would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        rows, end = out / "scores.partial.csv", time.monotonic() + 60
        while not (rows.exists() and len(rows.read_text().splitlines()) > 4):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        # As a terminal does: to all processes of the group.
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert stderr.count("fastalps-score: stopped after") == 1, stderr
    assert stdout.count("wrote ") == 1
    assert json.loads((out / "summary.partial.json").read_text())["metrics"]["frames"] >= 4
