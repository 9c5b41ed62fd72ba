"""Frames of video files in memory: all of one, a sample of one, or a folder of them as clips."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from fastalps.data.containers import Clip
from fastalps.data.decode import SourceError
from fastalps.data.listing import natural_key, require_folder
from fastalps.data.video import VideoReader
from fastalps.data.video_source import VIDEO_SUFFIXES
from fastalps.errors import UserError
from fastalps.memory import check_memory

# A single recording is cut into so many clips, of which the last is held out.
PARTS = 8


def read_video(path: str | os.PathLike[str], limit: int | None = None) -> Tensor:
    """All frames of a video file, or its first `limit`, as gray: uint8 (T, H, W).

    Memory is that of the frames, twice while they are put together. Raises UserError as
    `VideoReader`.
    """
    with VideoReader(path, limit=limit) as video:
        if video.live:
            raise SourceError(f"{video.source} has no end; give a file")
        return torch.cat([frames for frames, _ in video])


def video_sample(path: str | os.PathLike[str], samples: int, longest: int) -> Tensor | None:
    """At most `samples` frames of a video file at even distances, uint8 (n, H, W).

    They are those that `fastalps.gate.clip_background` picks from the whole clip. None for a live
    source, and for one that has more than `longest` frames or does not state their number: it
    would have to be decoded to its end. Raises UserError as `VideoReader`.
    """
    with VideoReader(path) as video:
        count = video.expected or int((video.duration or 0) * (video.frame_rate or 0))
        if video.live or not 0 < count <= longest:
            return None
        chosen = {i * count // samples for i in range(samples)} if count > samples else None
        rows: list[Tensor] = []
        try:
            for frames, _ in video:
                first = video.frames - len(frames)
                rows += [
                    frame.clone()
                    for i, frame in enumerate(frames, first)
                    if not chosen or i in chosen
                ]
        except SourceError:
            # Who reads the video meets the same error after all frames before it.
            if not rows:
                raise
        return torch.stack(rows) if rows else None


def list_videos(folder: str | os.PathLike[str]) -> list[Path]:
    """The video files of a folder in natural order, hidden ones left out; at least one.

    Raises UserError for a folder that is missing or without a video.
    """
    base = require_folder(folder, "videos")
    found = [
        path
        for path in base.iterdir()
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        suffixes = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
        raise UserError(f"no videos ({suffixes}) in the folder {base}")
    return sorted(found, key=lambda path: natural_key(path.name))


def load_videos(folder: str | os.PathLike[str]) -> list[Clip]:
    """Decodes every video of a folder (not of its sub-folders) as gray.

    Args:
        folder: of videos of one camera, each a clip; a single one is cut into eight clips in time.

    Returns:
        clips without labels, whose frames lie in memory.

    Raises:
        UserError: no video, one that cannot be decoded, sizes that differ, more frames than half of
            the machine's memory holds.
    """
    paths = list_videos(folder)
    sizes = {}
    needed = 0
    for path in paths:
        # Only what the headers say: decoding all of it to find out may take hours.
        with VideoReader(path) as video:
            sizes[path] = video.frame_size
            frames = video.expected or int((video.duration or 0) * (video.frame_rate or 0))
            needed += frames * video.frame_size[0] * video.frame_size[1]
        if sizes[path] != sizes[paths[0]]:
            raise UserError(
                f"{path} is {sizes[path][0]}x{sizes[path][1]}, but {paths[0]} is "
                f"{sizes[paths[0]][0]}x{sizes[paths[0]][1]} (height x width); bring the videos to "
                "one size"
            )
    remedy = "train on fewer, shorter or smaller ones"
    check_memory(f"{folder}: decoded, the videos take", needed, remedy, copies=2)
    clips = [Clip(path.name, read_video(path)) for path in paths]
    if len(clips) > 1:
        return clips
    whole = clips[0].frames
    if len(whole) < 2 * PARTS:
        raise UserError(
            f"{paths[0]} has {len(whole)} frames, too few for a single recording; record at least "
            f"{2 * PARTS}"
        )
    return [
        Clip(f"{clips[0].name} part {i + 1}", part)
        for i, part in enumerate(whole.tensor_split(PARTS))
    ]
