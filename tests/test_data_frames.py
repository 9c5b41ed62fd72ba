"""Folders of frames, and the cache of what was decoded."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalps.data import iter_frames, read_frames
from fastalps.errors import UserError
from tests import ROOT
from tests.images import HEIGHT, WIDTH, bytes_of, save, write_frames


@pytest.mark.parametrize("workers", [None, 1, 5])
def test_read_frames(tmp_path: Path, rng: torch.Generator, workers: int | None) -> None:
    expected = write_frames(tmp_path, 12, rng, "frame{}.png")
    for stray in (".DS_Store", "._frame1.png", "Thumbs.db", "notes.txt"):
        (tmp_path / stray).write_bytes(b"not an image")
    frames, names = read_frames(tmp_path, workers=workers)
    assert names == tuple(f"frame{i}.png" for i in range(1, 13))
    assert frames.dtype == torch.uint8
    np.testing.assert_array_equal(frames.numpy(), expected)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_iter_frames(tmp_path: Path, rng: torch.Generator, chunk: int) -> None:
    expected = write_frames(tmp_path, 12, rng)
    pieces = list(iter_frames(tmp_path, chunk, workers=3))
    assert all(len(piece) == len(names) <= chunk for piece, names in pieces)
    np.testing.assert_array_equal(torch.cat([p for p, _ in pieces]).numpy(), expected)
    assert [n for _, names in pieces for n in names] == [f"{i:03d}.tif" for i in range(1, 13)]


@pytest.mark.parametrize("workers", [1, 2])
def test_iter_frames_decodes_ahead_but_not_all(
    tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    from fastalps.data import frames as frames_module

    write_frames(tmp_path, 60, rng)
    decoded = []
    original = frames_module.read_pixels
    monkeypatch.setattr(
        frames_module, "read_pixels", lambda path: decoded.append(path) or original(path)
    )
    stream = iter_frames(tmp_path, 5, workers=workers)
    next(stream)
    end = time.monotonic() + 30
    while len(decoded) < 9 and time.monotonic() < end:  # While the caller does something else.
        time.sleep(0.01)
    assert 9 <= len(decoded) <= 10
    stream.close()
    count = len(decoded)
    time.sleep(0.05)
    assert len(decoded) == count


def test_bad_frames(tmp_path: Path, rng: torch.Generator) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_frames(tmp_path / "none")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no images .*outer; give one of its sub-folders, .*inner"):
        read_frames(tmp_path / "outer")
    write_frames(tmp_path / "v", 6, rng, "{:03d}.jpg")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        read_frames(tmp_path / "v" / "001.jpg")
    with pytest.raises(UserError, match="chunk must be"):
        iter_frames(tmp_path / "v", 0)
    whole = (tmp_path / "v" / "004.jpg").read_bytes()
    (tmp_path / "v" / "004.jpg").write_bytes(whole[:-40])
    for read in (lambda: read_frames(tmp_path / "v"), lambda: list(iter_frames(tmp_path / "v", 2))):
        with pytest.raises(UserError, match=r"004\.jpg is damaged or truncated"):
            read()
    with pytest.raises(UserError, match=r"004\.jpg is damaged"):
        read_frames(tmp_path / "v", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    save(tmp_path / "v" / "004.jpg", bytes_of((HEIGHT, WIDTH + 1), rng))
    with pytest.raises(UserError, match=r"004\.jpg is 9x14, but .*001\.jpg is 9x13"):
        read_frames(tmp_path / "v")
    save(tmp_path / "v" / "005.png", bytes_of((HEIGHT, WIDTH), rng))
    with pytest.raises(UserError, match=r"005 twice, as 005\.jpg and 005\.png"):
        read_frames(tmp_path / "v")


# Cache -------------------------------------------------------------------------------------------


def test_cache_hits_and_rebuilds(
    tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "v", tmp_path / "made" / "cache"
    expected = write_frames(folder, 7, rng)
    first, _ = read_frames(folder, cache=cache)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of read-only arrays
        patch.setattr("fastalps.data.frames.decode_frames", None)  # a hit decodes nothing
        second, _ = read_frames(folder, cache=cache)
        second.fill_(0)  # reaches the process's own copy only
        third, _ = read_frames(folder, cache=cache)
    for frames in (first, third):
        np.testing.assert_array_equal(frames.numpy(), expected)

    changed = bytes_of((HEIGHT, WIDTH), rng)
    save(folder / "003.tif", changed)
    os.utime(folder / "003.tif", ns=(1, 1))
    frames, _ = read_frames(folder, cache=cache)
    np.testing.assert_array_equal(frames[2].numpy(), changed)
    assert len(list(cache.glob("*.npy"))) == 1 and len(list(cache.iterdir())) == 2

    (folder / "007.tif").unlink()
    assert len(read_frames(folder, cache=cache)[0]) == 6


@pytest.mark.parametrize("damage", ["short", "text", "no manifest", "bad manifest", "other shape"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, rng: torch.Generator, damage: str) -> None:
    folder, cache = tmp_path / "v", tmp_path / "cache"
    expected = write_frames(folder, 4, rng)
    read_frames(folder, cache=cache)
    (array,), (manifest,) = cache.glob("*.npy"), cache.glob("*.json")
    if damage == "short":
        array.write_bytes(array.read_bytes()[:-5])
    elif damage == "text":
        array.write_bytes(b"hello")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("[")
    else:
        np.save(array, np.zeros((2, 2), dtype=np.uint8))
    for _ in range(2):
        np.testing.assert_array_equal(read_frames(folder, cache=cache)[0].numpy(), expected)


def test_two_videos_with_equal_file_lists_do_not_mix(tmp_path: Path, rng: torch.Generator) -> None:
    expected = {}
    for clip in ("a", "b"):
        folder = tmp_path / clip / "frames"
        expected[clip] = write_frames(folder, 3, rng)
        for path in folder.iterdir():
            os.utime(path, ns=(10**18, 10**18))
    for _ in range(2):
        for clip, frames in expected.items():
            got, _names = read_frames(tmp_path / clip / "frames", cache=tmp_path / "cache")
            np.testing.assert_array_equal(got.numpy(), frames)


def test_unwritable_cache_warns_once(
    tmp_path: Path, rng: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_frames(tmp_path / "v", 3, rng)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            frames, _ = read_frames(tmp_path / "v", cache=blocked / "cache")
            np.testing.assert_array_equal(frames.numpy(), expected)
    (record,) = caplog.records
    assert "going on without the cache" in record.getMessage()


def test_full_disk_falls_back(
    tmp_path: Path, rng: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    frames = bytes_of((40, 64, 64), rng)
    for i, frame in enumerate(frames):
        save(tmp_path / "v" / f"{i}.png", frame)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = tmp_path / "cache"
    # A limit on file sizes makes write() fail as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        got, _ = read_frames(tmp_path / "v", cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    np.testing.assert_array_equal(got.numpy(), frames)
    assert not list(cache.iterdir())
    assert "going on without the cache" in caplog.text


def test_processes_that_write_one_cache_at_once(tmp_path: Path, rng: torch.Generator) -> None:
    expected = write_frames(tmp_path / "v", 30, rng)
    code = (
        "import sys, hashlib; from fastalps.data import read_frames\n"
        "for _ in range(5):\n"
        "    frames, _ = read_frames(sys.argv[1], cache=sys.argv[2])\n"
        "    print(hashlib.sha256(frames.numpy().tobytes()).hexdigest())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "v"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    digest = hashlib.sha256(expected.tobytes()).hexdigest()
    assert outputs == [[digest] * 5] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
