"""What `fastalps-score` reads frames from: a folder of them, or a video."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastalps.cli.options import ScoreOptions
from fastalps.data import IMAGE_SUFFIXES, iter_frames, still_background
from fastalps.data.decode import worker_count
from fastalps.data.frames import frame_sample
from fastalps.data.video import VideoReader
from fastalps.data.video_clips import video_sample
from fastalps.data.video_source import is_url, is_video, shown
from fastalps.errors import UserError
from fastalps.gate import CLIP_SAMPLES, clip_background
from fastalps.stage_times import StageTimes

# Frames of a video file that are decoded once more in advance, for the background of its gate.
BACKGROUND_FRAMES = 4096


@dataclass(frozen=True)
class Chunk:
    """Successive frames.

    Attributes:
        frames: uint8 (n, H, W).
        names: of each; the file's, or the number from 1.
        times: seconds since the first frame; None = unknown.
    """

    frames: Tensor
    names: list[str]
    times: list[float | None]


class Source:
    """Frames of a folder, a video file, a camera or an address, in chunks; to be used as a context.

    Args:
        path: of the folder or file, or the address.
        options: chunk, workers, limit, timeout and reconnects count.
        realtime: see `VideoReader`.
        times: gets what the decoding threads worked; None = nothing is timed.

    Attributes:
        name: as it may be shown: of a file without its folder, of an address without a password.
        video: the reader; None = a folder.
        threads: that decode.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """

    def __init__(
        self,
        path: str,
        options: ScoreOptions,
        realtime: bool,
        times: StageTimes | None = None,
    ) -> None:
        self._path, self._options, self._times = path, options, times
        self.name = shown(path) if is_url(path) else Path(path).name or path
        self.video: VideoReader | None = None
        self.threads = worker_count(options.workers)
        if os.path.isfile(path) and Path(path).suffix.lower() in IMAGE_SUFFIXES:
            raise UserError(
                f"{path} is one image; give the folder of the clip's frames, or a video"
            )
        if is_video(path):
            self.threads = 1
            self.video = VideoReader(
                path,
                options.chunk,
                realtime=realtime,
                limit=options.limit,
                timeout=options.timeout,
                reconnects=options.reconnects,
                times=times,
            )
        elif realtime:
            raise UserError(f"--realtime is for videos and cameras; {path} is none")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        if self.video is not None:
            self.video.close()

    @property
    def live(self) -> bool:
        """Whether it has no end."""
        return self.video is not None and self.video.live

    def background(self, moving: bool) -> Tensor | None:
        """What the motion gate compares frames with, uint8 (H, W): no change for frames of motion,
        else the median of the clip; None = to be learned as the frames come."""
        if self.video is None:
            sample = frame_sample(self._path, 1 if moving else CLIP_SAMPLES, self.threads)
            size = (sample.shape[1], sample.shape[2])
            return still_background(size) if moving else clip_background(sample)
        if moving:
            return still_background(self.video.frame_size)
        # What a pipe has given it does not give again.
        if self.live or not os.path.isfile(self._path):
            return None
        seen = video_sample(self._path, CLIP_SAMPLES, BACKGROUND_FRAMES)
        return None if seen is None else clip_background(seen)

    def __iter__(self) -> Iterator[Chunk]:
        if self.video is not None:
            for frames, times in self.video:
                first = self.video.frames - len(frames) + 1
                names = [f"{first + i:06d}" for i in range(len(frames))]
                yield Chunk(frames, names, times)
            return
        left = self._options.limit
        stream = iter_frames(self._path, self._options.chunk, self.threads, self._times)
        for frames, files in stream:
            count = len(frames) if left is None else min(left, len(frames))
            if count:
                yield Chunk(frames[:count], list(files[:count]), [None] * count)
            if left is not None:
                left -= count
                if not left:
                    return
