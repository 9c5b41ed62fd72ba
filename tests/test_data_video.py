"""Videos as frames: what is decoded, in which chunks, and what is damaged."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from fastalps.data import video as video_module
from fastalps.data.video import VideoReader
from fastalps.data.video_clips import read_video
from fastalps.data.video_source import shown
from tests.videos import FRAMES, HEIGHT, RATE, WIDTH, scene, write

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'fastalps[video]'")


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
