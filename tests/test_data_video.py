"""Videos and streams as input: what is decoded, what is scored, and how it fails."""

from __future__ import annotations

import functools
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
from fastalps.cli import score, train
from fastalps.data import video as video_module
from fastalps.data import video_decoder
from fastalps.data.video import VideoReader
from fastalps.data.video_clips import read_video
from fastalps.data.video_decoder import VideoDecoder
from fastalps.data.video_source import shown
from fastalps.errors import UserError
from tests import ROOT
from tests.commands import error_of, rows_of
from tests.images import save
from tests.video_servers import Camera, Server
from tests.videos import FRAMES, HEIGHT, PATCH, RATE, WIDTH, run_on, scene, write

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")


@pytest.fixture(scope="module", params=["gray", "motion"])
def run(request, tmp_path_factory) -> Path:
    return run_on(tmp_path_factory.mktemp(request.param), scene(), motion=request.param == "motion")


@pytest.fixture(scope="module")
def gray_run(tmp_path_factory) -> Path:
    return run_on(tmp_path_factory.mktemp("gray"), scene())


# Decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_lossless_video_gives_the_frames(tmp_path, suffix) -> None:
    frames = scene()
    with VideoReader(write(tmp_path / f"a{suffix}", frames), chunk=7) as video:
        assert video.frame_size == (HEIGHT, WIDTH) and video.frame_rate == RATE
        assert not video.live
        chunks = list(video)
    assert [len(part) for part, _ in chunks] == [7, 7, 7, 3]
    assert np.array_equal(torch.cat([part for part, _ in chunks]).numpy(), frames)
    times = [seconds for _, part in chunks for seconds in part]
    np.testing.assert_allclose(times, np.arange(FRAMES) / RATE, atol=2e-3)


def test_luma_is_widened_to_full_range(tmp_path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (2, HEIGHT, WIDTH))
    decoded = read_video(write(tmp_path / "ramp.mp4", ramp, "mpeg4")).numpy().astype(int)
    # The codec keeps 16 to 235 of it, and loses a little.
    assert decoded.min() < 4 and decoded.max() > 251
    assert np.abs(decoded - ramp).mean() < 3


def test_colour_becomes_its_luma(tmp_path) -> None:
    path = tmp_path / "red.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv444p"
        red = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        red[..., 0] = 255
        for packet in stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")):
            container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    # ITU-R 601: 0.299 of red.
    assert abs(int(read_video(path)[0, 0, 0]) - 76) <= 2


def test_limit_ends_early_and_memory_is_bounded(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "a.mkv", scene())
    with VideoReader(path, limit=5) as video:
        assert sum(len(part) for part, _ in video) == 5
    monkeypatch.setattr(video_module, "_CHUNK_BYTES", 3 * HEIGHT * WIDTH)
    monkeypatch.setattr(video_module, "_QUEUE_BYTES", 4 * HEIGHT * WIDTH)
    with VideoReader(path) as video:
        time.sleep(0.2)
        assert video._queue.qsize() <= 4
        assert {len(part) for part, _ in video} == {3}


def test_frames_are_dropped_only_when_asked(tmp_path) -> None:
    path = write(tmp_path / "a.mkv", scene(), rate=200)
    for realtime in (False, True):
        with VideoReader(path, chunk=2, realtime=realtime) as video:
            seen = 0
            for part, _ in video:
                seen += len(part)
                time.sleep(0.05)
        assert seen + video.dropped == FRAMES
        assert (video.dropped > 0) == realtime


def test_realtime_plays_a_file_at_its_speed(tmp_path) -> None:
    path = write(tmp_path / "a.mkv", scene(10), rate=20)
    begin = time.monotonic()
    with VideoReader(path, realtime=True) as video:
        assert sum(len(part) for part, _ in video) == 10
    assert 0.4 < time.monotonic() - begin < 5


def test_passwords_are_not_shown() -> None:
    assert shown("rtsp://user:secret@camera:554/live?key=1") == "rtsp://camera:554/live"
    assert shown("folder/a@b.mp4") == "folder/a@b.mp4"


# Scoring ----------------------------------------------------------------------------------------


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


# Bad input --------------------------------------------------------------------------------------


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


def test_damaged_packets_are_skipped_and_counted(tmp_path, caplog) -> None:
    path = write(tmp_path / "a.avi", scene(), "mjpeg")
    content = path.read_bytes()
    # A JPEG image in the middle, but not the header of the next: the container stays whole.
    starts = [i for i in range(len(content)) if content[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == FRAMES
    begin, end = starts[FRAMES // 2], starts[FRAMES // 2 + 1] - 16
    path.write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    with VideoReader(path) as video:
        assert sum(len(part) for part, _ in video) == FRAMES - 1
    assert video.damaged == 1 and "a damaged packet is skipped" in caplog.text


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


# Training ---------------------------------------------------------------------------------------

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
