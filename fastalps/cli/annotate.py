"""A video of the frames under their heatmaps, with scores and flags."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fastalps.cli.overlays import Frame, titled_overlay
from fastalps.cli.score_files import partial
from fastalps.data.video_decoder import import_av
from fastalps.errors import UserError

ANNOTATED = "annotated.mp4"
# Where the source states no frame rate.
DEFAULT_RATE = 25.0
_BIT_RATE = 4_000_000


class AnnotatedVideo:
    """An mp4 of annotated frames, called annotated.partial.mp4 until `finish`.

    It is H.264 where this build of FFmpeg has an encoder for it, else MPEG-4 part 2. Fragments of
    it can be played even if the program is killed. It is made with the first frame.

    Args:
        folder: where it goes.
        frame_rate: frames a second; None = 25.

    Raises:
        UserError: PyAV is missing, or the file cannot be written.
    """

    def __init__(self, folder: Path, frame_rate: float | None) -> None:
        self._av = import_av()
        self._path = folder / ANNOTATED
        self._rate = Fraction(frame_rate or DEFAULT_RATE).limit_denominator(1001)
        self._container: Any = None
        self._stream: Any = None

    def add(self, frame: Frame) -> None:
        """Appends a frame."""
        picture = np.asarray(titled_overlay(frame))
        # The codecs halve the colour planes: an odd last row or column is left out.
        height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
        try:
            if self._container is None:
                self._open(width, height)
            pixels = np.ascontiguousarray(picture[:height, :width])
            self._mux(self._av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        except (self._av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def _open(self, width: int, height: int) -> None:
        self._container = self._av.open(
            str(partial(self._path)),
            "w",
            options={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
        )
        known = self._av.codec.codecs_available
        codec = next(name for name in ("libx264", "libopenh264", "mpeg4") if name in known)
        self._stream = self._container.add_stream(codec, rate=self._rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            self._stream.options = {"preset": "veryfast", "crf": "23"}
        else:
            self._stream.bit_rate = _BIT_RATE

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def close(self) -> None:
        """Ends the file under the name that it has."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            for packet in self._stream.encode():
                container.mux(packet)
            container.close()
        except (self._av.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Ends the file and gives it its final name."""
        self.close()
        if partial(self._path).exists():
            os.replace(partial(self._path), self._path)

    def _failed(self, error: BaseException) -> UserError:
        reason = getattr(error, "strerror", None) or error
        return UserError(f"cannot write {self._path}: {reason}; check the folder and its space")
