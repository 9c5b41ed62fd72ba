"""`fastalps-score` on videos, pipes, streams and cameras: scores, results, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastalps
from fastalps import Scorer
from fastalps.cli import score
from fastalps.data import video_decoder
from fastalps.data.video import VideoReader
from fastalps.data.video_decoder import VideoDecoder
from fastalps.errors import UserError
from tests.commands import error_of, rows_of
from tests.images import save
from tests.video_servers import Camera, Server
from tests.videos import FRAMES, HEIGHT, PATCH, WIDTH, run_on, scene, write

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")


@pytest.fixture(scope="module", params=["gray", "motion"])
def run(request, tmp_path_factory) -> Path:
    return run_on(tmp_path_factory.mktemp(request.param), scene(), motion=request.param == "motion")


@pytest.fixture(scope="module")
def gray_run(tmp_path_factory) -> Path:
    return run_on(tmp_path_factory.mktemp("gray"), scene())


def test_a_video_scores_as_its_frames_do(run, tmp_path, capsys) -> None:
    frames = scene()
    for t, pixels in enumerate(frames):
        save(tmp_path / "frames" / f"{t:03d}.png", pixels)
    video = write(tmp_path / "a.mkv", frames)
    tables = []
    for source in (tmp_path / "frames", video):
        out = tmp_path / f"out-{source.name}"
        assert score.main([str(run), str(source), "--out", str(out), "--chunk", "5"]) == 0
        tables.append(rows_of(out / "scores.csv"))
        lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
        assert [line["score"] for line in lines] == [float(row["score"]) for row in tables[-1]]
        assert [line["flagged"] for line in lines] == [row["flagged"] == "1" for row in tables[-1]]
        names = {path.name for path in out.iterdir()}
        assert names >= {"scores.csv", "scores.jsonl", "timeline.png", "summary.json", "overlays"}
        assert not [name for name in names if "partial" in name]
    assert len(tables[1]) == FRAMES and any(row["flagged"] == "1" for row in tables[1])
    for still, moving in zip(*tables, strict=True):
        assert float(still["score"]) == pytest.approx(float(moving["score"]), rel=1e-5)
    assert [row["frame"] for row in tables[1]] == [f"{t + 1:06d}" for t in range(FRAMES)]
    assert float(tables[1][10]["time"]) == pytest.approx(1.0, abs=2e-3)
    summary = json.loads((out / "summary.json").read_text())["metrics"]
    assert summary["frames"] == FRAMES and summary["complete"] and summary["dropped_frames"] == 0


@pytest.mark.skipif(os.name == "nt", reason="has no /dev/fd")
def test_a_pipe_is_read_once(run, tmp_path) -> None:
    content = write(tmp_path / "a.mkv", scene()).read_bytes()
    source, sink = os.pipe()

    def fill() -> None:
        with os.fdopen(sink, "wb") as pipe:
            pipe.write(content)

    writer = threading.Thread(target=fill)
    writer.start()
    try:
        assert score.main([str(run), f"/dev/fd/{source}", "--out", str(tmp_path / "out")]) == 0
    finally:
        os.close(source)
        writer.join()
    # A gate without a background learns it from the first chunk, here the whole.
    assert score.main([str(run), str(tmp_path / "a.mkv"), "--out", str(tmp_path / "file")]) == 0
    piped, whole = (rows_of(tmp_path / name / "scores.csv") for name in ("out", "file"))
    assert [row["score"] for row in piped] == [row["score"] for row in whole]


@pytest.mark.skipif(os.name == "nt", reason="has no FIFOs")
def test_a_fifo_does_not_wait_for_a_second_writer(gray_run, tmp_path) -> None:
    fifo, video = tmp_path / "fifo", write(tmp_path / "a.mkv", scene())
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(video.read_bytes()), daemon=True)
    writer.start()
    command = [sys.executable, "-m", "fastalps.cli.score", str(gray_run), str(fifo)]
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, timeout=60)
    assert len(rows_of(tmp_path / "out" / "scores.csv")) == FRAMES


# A transport stream states no duration: it is no live stream for all that.
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.ts", "mpeg2video")])
def test_a_stream_over_http_scores_as_the_file(tmp_path, name: str, codec: str) -> None:
    run = run_on(tmp_path / "run", scene(), motion=True)
    write(tmp_path / name, scene(), codec)
    with Server(tmp_path) as server:
        for source in (str(tmp_path / name), f"{server.url}/{name}"):
            out = tmp_path / ("http" if "://" in source else "file")
            assert score.main([str(run), source, "--out", str(out)]) == 0
    assert (tmp_path / "http/scores.csv").read_text() == (tmp_path / "file/scores.csv").read_text()


def test_a_live_stream_is_connected_to_again(tmp_path, monkeypatch, caplog, gray_run) -> None:
    monkeypatch.setattr(video_decoder, "_RETRY_SECONDS", 0.01)
    # Without a length, and of a format that states none: it might go on for ever.
    write(tmp_path / "a.mjpeg", scene(), "mjpeg")
    with Server(tmp_path, live=True) as server:
        out = tmp_path / "out"
        arguments = [str(gray_run), f"{server.url}/a.mjpeg", "--out", str(out)]
        assert score.main([*arguments, "--limit", str(2 * FRAMES)]) == 0
    assert len(rows_of(out / "scores.csv")) == 2 * FRAMES
    assert "connecting again in" in caplog.text and "connected again" in caplog.text
    summary = json.loads((out / "summary.json").read_text())["metrics"]
    assert summary["live"] and summary["reconnections"] >= 1


def test_an_rtsp_camera(tmp_path, monkeypatch, caplog, capsys, gray_run) -> None:
    monkeypatch.setattr(video_decoder, "_RETRY_SECONDS", 0.01)
    frames, out = scene(), tmp_path / "out"
    with Camera(frames, password="me:secret") as camera:
        # The film ends, and the camera hangs up, after every 24 frames.
        with VideoReader(camera.url, limit=2 * FRAMES) as video:
            assert video.live and video.frame_size == (HEIGHT, WIDTH)
            seen = torch.cat([part for part, _ in video]).numpy().astype(int)
        assert camera.connections >= 2 and video.reconnected >= 1 and video.dropped == 0
        arguments = ["--out", str(out), "--limit", str(FRAMES)]
        assert score.main([str(gray_run), camera.url, *arguments]) == 0
        url = camera.url.replace("secret", "wrong")
        arguments[1] = str(tmp_path / "refused")
        assert score.main([str(gray_run), url, *arguments]) == 2
    # MPEG-2 loses a little.
    assert np.abs(seen - np.concatenate([frames, frames])).mean() < 3
    assert len(rows_of(out / "scores.csv")) == FRAMES
    message = capsys.readouterr().err
    assert "401 Unauthorized" in message and not (tmp_path / "refused").exists()
    written = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".html")]
    assert len(written) == 2 and "rtsp://127.0.0.1" in written[0]
    for text in (message, caplog.text, *written):
        assert "secret" not in text and "wrong" not in text


def test_attempts_to_connect_again_are_limited(tmp_path, monkeypatch, capsys, gray_run) -> None:
    monkeypatch.setattr(video_decoder, "_RETRY_SECONDS", 0.01)
    write(tmp_path / "a.mjpeg", scene(), "mjpeg")
    server = Server(tmp_path, live=True)
    with server, VideoReader(f"{server.url}/a.mjpeg", reconnects=2) as video:
        chunks = iter(video)
        assert len(next(chunks)[0]) > 0
        server.close()
        with pytest.raises(UserError, match="2 attempts to connect again failed"):
            list(chunks)


def test_results_replace_those_of_another_input_and_nothing_else(
    tmp_path, capsys, gray_run
) -> None:
    def scored(source: Path, *options: str) -> int:
        return score.main([str(gray_run), str(source), "--out", str(out), *options])

    def names() -> set[str]:
        return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}

    out, first = tmp_path / "out", write(tmp_path / "a.mkv", scene())
    second = write(tmp_path / "b.mkv", scene(6))
    assert scored(first, "--annotated", "--overlays", "5") == 0
    before = names()
    assert {"annotated.mp4", "report.html"} <= before and len(before) == 6 + 5
    # As a run that broke off leaves them, and files of the user's own.
    for name in before - {name for name in before if "/" in name}:
        (out / name).with_suffix(f".partial{Path(name).suffix}").write_text("x")
    mine = {"notes.txt", "more.partial.csv", "overlays/mine.png"}
    for name in mine:
        (out / name).write_text("mine")
    before = names()
    # What cannot be read leaves all as it was.
    (tmp_path / "junk.mkv").write_bytes(b"junk" * 100)
    for source in (tmp_path / "junk.mkv", tmp_path / "absent.mkv"):
        assert scored(source) == 2
        assert names() == before
    assert scored(second, "--overlays", "1") == 0
    plain = {"scores.csv", "scores.jsonl", "timeline.png", "summary.json", "report.html"}
    overlay = {name for name in names() if name.startswith("overlays/0")}
    assert names() == plain | mine | overlay and len(overlay) == 1
    assert len(rows_of(out / "scores.csv")) == 6


def test_results_apart_from_the_input(tmp_path, capsys, gray_run) -> None:
    out = tmp_path / "out"
    out.mkdir()
    video = write(tmp_path / "a.mkv", scene(6)).rename(out / "annotated.mp4")
    (out / "overlays").mkdir()
    for source, message in (
        (video, "is among the results"),
        (out / "overlays", "is among the results"),
        (out, "--out must lie outside of the input"),
    ):
        assert score.main([str(gray_run), str(source), "--out", str(out)]) == 2
        assert message in error_of(capsys)
    assert {path.name for path in out.iterdir()} == {"annotated.mp4", "overlays"}


def test_bad_videos(tmp_path, capsys, gray_run) -> None:
    def fails(source: str | Path, message: str, *options: str) -> None:
        out = tmp_path / "out"
        assert score.main([str(gray_run), str(source), "--out", str(out), *options]) == 2
        assert message in error_of(capsys)
        assert not out.exists() or not list(out.iterdir())

    fails(tmp_path / "absent.mp4", "does not exist")
    (tmp_path / "empty.mp4").write_bytes(b"")
    fails(tmp_path / "empty.mp4", "is empty")
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 1000)
    fails(tmp_path / "junk.mp4", "it is no video, or damaged")
    whole = write(tmp_path / "whole.mp4", scene(), "mpeg4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    fails(tmp_path / "cut.mp4", "damaged")
    write(tmp_path / "small.mkv", scene()[:, :8, :8])
    fails(tmp_path / "small.mkv", "larger than the frame")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    fails(tmp_path / "sound.wav", "holds no video")
    fails(tmp_path, "no images", "--limit", "3")
    fails(tmp_path, "--realtime is for videos and cameras", "--realtime")
    fails(tmp_path / "small.mkv", "limit must be", "--limit", "0")
    fails(tmp_path / "small.mkv", "timeout must be", "--timeout", "0")
    fails("http://127.0.0.1:9/a.mp4", "Connection refused")
    fails("rtsp://me:secret@127.0.0.1:9/a", "cannot open rtsp://127.0.0.1:9/a")
    with Server(tmp_path, silent=True) as server:
        fails(f"{server.url}/a.mp4", "no answer within 0.3 s", "--timeout", "0.3")


def test_a_size_that_changes_keeps_the_scores_before(tmp_path, capsys, gray_run) -> None:
    parts = [scene(), scene(FRAMES, HEIGHT + 8, WIDTH)]
    names = [tmp_path / f"{i}.ts" for i in range(2)]
    for path, frames in zip(names, parts, strict=True):
        write(path, frames, "mpeg2video", rate=25)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(path.read_bytes() for path in names))
    out = tmp_path / "out"
    assert score.main([str(gray_run), str(joined), "--out", str(out)]) == 2
    message = error_of(capsys)
    assert "the size changes from 40x60 to 48x60" in message and "kept" in message
    kept = rows_of(out / "scores.partial.csv")
    assert FRAMES - 2 <= len(kept) <= FRAMES
    assert len((out / "scores.partial.jsonl").read_text().splitlines()) == len(kept)
    assert not (out / "scores.csv").exists() and not (out / "summary.json").exists()
    summary = json.loads((out / "summary.partial.json").read_text())["metrics"]
    assert not summary["complete"] and "size changes" in summary["ended_by"]


def test_a_stream_that_dies_keeps_the_scores_before(tmp_path, capsys, gray_run) -> None:
    path = write(tmp_path / "a.avi", scene(200), "mjpeg")
    size = path.stat().st_size
    # The header announces all, the sender stops in the middle.
    with Server(tmp_path, cut=size // 2) as server:
        out = tmp_path / "out"
        arguments = [str(gray_run), f"{server.url}/a.avi", "--out", str(out), "--chunk", "8"]
        assert score.main(arguments) == 2
    assert "broke off after" in error_of(capsys)
    assert 50 < len(rows_of(out / "scores.partial.csv")) < 150
    assert not (out / "scores.csv").exists()


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mkv", "mjpeg"), (".webm", "libvpx"), (".avi", "mjpeg")]
)
def test_a_file_cut_short_is_told(tmp_path, capsys, gray_run, suffix: str, codec: str) -> None:
    whole = write(tmp_path / f"a{suffix}", scene(80), codec)
    content = whole.read_bytes()
    with VideoReader(whole) as video:
        assert sum(len(part) for part, _ in video) == 80
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(content[: len(content) * 2 // 3])
    out = tmp_path / "out"
    assert score.main([str(gray_run), str(cut), "--out", str(out)]) == 2
    assert "broke off after" in error_of(capsys)
    assert 20 < len(rows_of(out / "scores.partial.csv")) < 80
    assert not (out / "scores.csv").exists()


def test_unknown_frame_rate(tmp_path, gray_run, monkeypatch) -> None:
    path = write(tmp_path / "a.mkv", scene())

    def timed(self, frame, original=VideoDecoder._timed):
        return original(self, frame)[0], None

    monkeypatch.setattr(VideoDecoder, "_rate", lambda self, stream: None)
    monkeypatch.setattr(VideoDecoder, "_timed", timed)
    out = tmp_path / "out"
    assert score.main([str(gray_run), str(path), "--out", str(out)]) == 0
    assert [row["time"] for row in rows_of(out / "scores.csv")] == [""] * FRAMES
    assert json.loads((out / "summary.json").read_text())["metrics"]["frame_rate"] is None


def test_a_model_of_another_kind(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.mkv", scene())
    model = fastalps.ALPS(PATCH, 3, "fast", latent=4)
    colour = torch.randint(0, 256, (20, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    calibration = Scorer(model).calibrate(colour, 0.2, level="frame")
    fastalps.save(model, tmp_path / "colour.safetensors", calibration)
    model = fastalps.ALPS(PATCH, 1, "fast", latent=4)
    calibration = Scorer(model).calibrate(colour[:, :1, :PATCH, :PATCH], 0.2)
    fastalps.save(model, tmp_path / "image.safetensors", calibration)
    out = tmp_path / "out"
    for name, message in (("colour", "takes 3 channels"), ("image", "the run is on images")):
        arguments = [str(tmp_path / f"{name}.safetensors"), str(path), "--out", str(out)]
        assert score.main(arguments) == 2
        assert message in error_of(capsys)
    (tmp_path / "file").write_text("x")
    arguments = [str(tmp_path / "colour.safetensors"), str(path), "--out", str(tmp_path / "file")]
    assert score.main(arguments) == 2
    assert "cannot create the folder" in error_of(capsys)
    assert not out.exists() or not list(out.iterdir())


def test_without_pyav(tmp_path, capsys, monkeypatch, gray_run) -> None:
    path = write(tmp_path / "a.mkv", scene())
    monkeypatch.setitem(sys.modules, "av", None)
    assert score.main([str(gray_run), str(path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'fastalps[video]'" in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_interrupt_keeps_the_scores(tmp_path, gray_run) -> None:
    path = write(tmp_path / "a.mkv", scene(200), rate=4)
    out = tmp_path / "out"
    # In real time it takes 50 seconds.
    options = [str(gray_run), str(path), "--out", str(out), "--realtime", "--chunk", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastalps.cli.score", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (out / "scores.partial.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    assert not (out / "scores.csv").exists()
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "stopped after" in text and "Traceback" not in text
    assert len(rows_of(out / "scores.partial.csv")) >= 2 and not (out / "scores.csv").exists()


def test_interrupt_is_the_end_of_a_camera(tmp_path, gray_run, monkeypatch, capsys) -> None:
    path = write(tmp_path / "a.mkv", scene())
    taken = []

    def interrupted(self, patient, original=VideoReader._next):
        # Between two chunks, whose lengths depend on how fast frames come.
        if patient and len(taken) >= 9:
            raise KeyboardInterrupt
        item = original(self, patient)
        taken.extend([] if item is None else [item])
        return item

    monkeypatch.setattr(VideoDecoder, "_is_live", lambda self: True)
    monkeypatch.setattr(VideoReader, "_next", interrupted)
    out = tmp_path / "out"
    assert score.main([str(gray_run), str(path), "--out", str(out), "--chunk", "3"]) == 130
    assert "stopped after" in capsys.readouterr().err
    assert len(rows_of(out / "scores.csv")) == len(taken) >= 9
    assert not list(out.glob("*partial*")) and (out / "report.html").exists()
