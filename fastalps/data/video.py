"""Video files, cameras and network streams as gray frames, decoded on a thread of their own."""

from __future__ import annotations

import logging
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalps.data.decode import Pixels, SourceError
from fastalps.errors import UserError
from fastalps.stage_times import DECODE, StageTimes

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
# Decoded frames that wait for the caller, and frames of one chunk: 30 frames of 1080 x 1920.
_QUEUE_BYTES = _CHUNK_BYTES = 1 << 26
# Damaged packets one after the other; with more, nothing is to be expected any more.
_DAMAGED_IN_A_ROW = 200
# Seconds before the first attempt to connect again; each further one waits twice as long.
_RETRY_SECONDS = 1.0
_LONGEST_WAIT = 30.0

logger = logging.getLogger("fastalps")

Item = tuple[Pixels, float | None]


class _Ended(Exception):
    """Stands behind the last frame of a video that is complete."""


def is_url(source: str) -> bool:
    """Whether a source is an address such as rtsp://... or http://..., not a path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE) is not None


def is_video(source: str | os.PathLike[str]) -> bool:
    """Whether a source is for `VideoReader`: an address, a device or any file, but no folder."""
    source = os.fspath(source)
    return is_url(source) or (os.path.exists(source) and not os.path.isdir(source))


def shown(source: str | os.PathLike[str]) -> str:
    """A source as it may be written down: without the password and the query of an address."""
    source = os.fspath(source)
    if not is_url(source):
        return source
    address = source.partition("?")[0]
    return re.sub(r"(://)[^/@]*@", r"\1", address)


def import_av() -> Any:
    """PyAV; UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "video needs PyAV, which is not installed; pip install 'fastalps[video]'"
        ) from error
    return av


class VideoReader:
    """The frames of a video file, a camera or a stream as gray, in chunks; to be used as a context.

    A frame's gray levels are its luma as encoded (ITU-R 601 or 709, whichever the video says),
    widened to 0 to 255 where the video uses 16 to 235. Rotation flags are not applied.

    Decoding runs on its own thread, at most 64 MiB of frames ahead; memory does not depend on the
    video's length. A source without an end (a camera, a live stream) that stops is connected to
    again, `reconnects` times in a row at most, with a growing pause; its chunks hold what has come
    by then, so that a frame does not wait for a chunk to fill, except for the first.

    Args:
        source: path of a video file or a device (/dev/video0), or an address (rtsp://, http://).
        chunk: frames a piece at most; fewer where they would take more than 64 MiB.
        realtime: drop the oldest waiting frame where the caller is slower than the video, and
            count it; a file is played at its own speed. Otherwise no frame is ever dropped.
        limit: frames to give at most; None = all.
        timeout: seconds to wait for a connection and for each piece of data.
        reconnects: attempts in a row to connect to a live source again.
        times: gets what the thread worked, with its waits for data but not for the caller; None =
            nothing is timed.

    Attributes:
        source: as it may be shown, without a password.
        live: whether it has no end.
        frame_size: (height, width).
        frame_rate: frames a second as the source states it; None = it states none.
        duration: seconds, as the header announces them; None = it does not.
        expected: frames that the file's header announces; 0 = it does not.
        frames: frames given so far.
        dropped: frames dropped so far.
        damaged: packets that could not be decoded so far.
        reconnected: connections made after the first.

    Raises:
        UserError: PyAV is missing; no such file, device or address; no video in it; when reached:
            a frame of another size, a source that dies.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        chunk: int = 128,
        *,
        realtime: bool = False,
        limit: int | None = None,
        timeout: float = 10.0,
        reconnects: int = 5,
        times: StageTimes | None = None,
    ) -> None:
        for name, value in (("chunk", chunk), ("limit", limit)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise UserError(f"{name} must be a number of frames from 1 up, got {value!r}")
        if not timeout > 0:
            raise UserError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        if reconnects < 0:
            raise UserError(f"reconnects must be 0 or more, got {reconnects!r}")
        self._av = import_av()
        self._address = os.fspath(source)
        self.source = shown(source)
        self.realtime = realtime
        self.timeout = timeout
        self.reconnects = reconnects
        self.frames = self.dropped = self.damaged = self.reconnected = 0
        self._limit = limit
        self._times = times
        self._stop = threading.Event()
        self._container = self._open()
        try:
            stream = self._stream()
            self.live = self._is_live()
            self.expected = int(stream.frames or 0)
            self.frame_rate = self._rate(stream)
            length = self._container.duration
            self.duration = None if length is None else length / self._av.time_base
            self.frame_size = (int(stream.height), int(stream.width))
            if 0 in self.frame_size:
                raise SourceError(f"{self.source}: its video has no size; it is damaged")
        except BaseException:
            self._container.close()
            raise
        frame_bytes = self.frame_size[0] * self.frame_size[1]
        self._chunk = max(1, min(chunk, _CHUNK_BYTES // frame_bytes))
        ahead = max(2, min(chunk, _QUEUE_BYTES // frame_bytes))
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, name="fastalps-video", daemon=True)
        self._thread.start()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops decoding; frames not yet given are lost."""
        self._stop.set()
        # A thread that waits for the network ends with its timeout, or with the process.
        self._thread.join(1.0)

    def __iter__(self) -> Iterator[tuple[Tensor, list[float | None]]]:
        """Chunks: uint8 (n, H, W) frames in new memory, and their n times.

        A time is in seconds since the first frame, None where the video states none; of a live
        source by the clock at which the frame came.

        An error comes after the frames that were decoded before it.
        """
        end: BaseException | None = None
        ended = False
        while not ended:
            rows: list[Pixels] = []
            times: list[float | None] = []
            while len(rows) < self._chunk:
                if self._limit is not None and self.frames + len(rows) == self._limit:
                    ended = True
                    break
                # The first chunk is a full one: a background is learned from it.
                patient = not rows or not self.live or not self.frames
                item = self._next(patient)
                if item is None:
                    break
                if isinstance(item, tuple):
                    rows.append(item[0])
                    times.append(item[1])
                    continue
                end, ended = item, True
                break
            if rows:
                self.frames += len(rows)
                yield torch.from_numpy(np.stack(rows)), times
        if end is not None and not isinstance(end, _Ended):
            raise end

    def _next(self, patient: bool) -> Item | BaseException | None:
        """The next item; None when nothing is there and nobody waits."""
        while True:
            try:
                # Not for ever: Ctrl-C does not end an endless wait on every platform.
                return self._queue.get(timeout=0.5) if patient else self._queue.get_nowait()
            except queue.Empty:
                if not patient:
                    return None

    # On the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        end: BaseException = _Ended()
        try:
            self._decode_all()
        except BaseException as error:
            end = error
        finally:
            self._container.close()
        self._put(end)

    def _decode_all(self) -> None:
        """Decodes until the end, the stop, or the last attempt to connect again."""
        attempts = 0
        while not self._stop.is_set():
            reason = "the stream ended"
            begun = time.monotonic()
            items = self._decode(begun)
            if self._times is not None:
                items = self._times.items(DECODE, items)
            try:
                for item in items:
                    attempts = 0
                    if not self._put(item):
                        return
            except self._av.FFmpegError as error:
                reason = self._reason(error)
                if not self.live:
                    raise self._broken(reason) from error
            if not self.live:
                self._check_complete()
                return
            while not self._stop.is_set():
                if attempts == self.reconnects:
                    raise SourceError(
                        f"{self.source} is gone ({reason}), and {attempts} attempts to connect "
                        "again failed; the frames before are kept"
                    )
                wait = min(_RETRY_SECONDS * 2**attempts, _LONGEST_WAIT)
                attempts += 1
                logger.warning(
                    "%s: %s after %d frames; connecting again in %g s (attempt %d of %d)",
                    self.source,
                    reason,
                    self._decoded,
                    wait,
                    attempts,
                    self.reconnects,
                )
                if self._stop.wait(wait):
                    return
                self._container.close()
                try:
                    self._container = self._open()
                    self._stream()
                except UserError as error:
                    reason = str(error)
                    continue
                self.reconnected += 1
                logger.warning("%s: connected again", self.source)
                break

    _decoded = 0
    _last: float | None = None
    _start: float | None = None

    def _decode(self, begun: float) -> Iterator[Item]:
        """The frames of the present connection."""
        stream = self._stream()
        stream.thread_type = "AUTO"
        in_a_row = 0
        for packet in self._container.demux(stream):
            if self._stop.is_set():
                return
            try:
                decoded = packet.decode()
            except self._av.error.InvalidDataError as error:
                self.damaged += 1
                in_a_row += 1
                if self.damaged == 1:
                    logger.warning("%s: a damaged packet is skipped", self.source)
                if in_a_row > _DAMAGED_IN_A_ROW:
                    raise SourceError(
                        f"{self.source} is damaged: nothing can be decoded after "
                        f"{self._decoded} frames; the frames before are kept"
                    ) from error
                continue
            for frame in decoded:
                in_a_row = 0
                yield self._item(frame, begun)

    def _item(self, frame: Any, begun: float) -> Item:
        size = (int(frame.height), int(frame.width))
        if size != self.frame_size:
            raise SourceError(
                f"{self.source}: the size changes from {self.frame_size[0]}x{self.frame_size[1]} "
                f"to {size[0]}x{size[1]} (height x width) at frame {self._decoded + 1}; score the "
                "parts apart; the frames before are kept"
            )
        seconds: float | None = time.monotonic() if self.live else frame.time
        if seconds is None and self.frame_rate:
            seconds = self._decoded / self.frame_rate
        if self._start is None:
            self._start = seconds
        if seconds is not None and self._start is not None:
            seconds -= self._start
        if self.realtime and not self.live and seconds is not None:
            self._stop.wait(max(0.0, begun + seconds - time.monotonic()))
        self._decoded += 1
        self._last = seconds
        # swscale widens the luma to full range: gray formats have no other.
        return frame.to_ndarray(format="gray"), seconds

    def _broken(self, reason: str) -> SourceError:
        if self._decoded:
            text = f"broke off after {self._decoded} frames ({reason}); the frames before are kept"
        elif is_url(self._address):
            text = (
                f"cannot be read ({reason}); of an mp4 whose index is at its end the server must "
                "send parts on demand (range requests); else write it with -movflags faststart"
            )
        else:
            text = f"cannot be read ({reason}); it is damaged"
        return SourceError(f"{self.source} {text}")

    def _put(self, item: Item | BaseException) -> bool:
        """Hands an item to the caller; False when nobody wants it any more."""
        dropping = self.realtime and isinstance(item, tuple)
        while not self._stop.is_set():
            try:
                self._queue.put(item, not dropping, 0.2)
                return True
            except queue.Full:
                if dropping:
                    try:
                        oldest = self._queue.get_nowait()
                    except queue.Empty:
                        continue
                    self.dropped += isinstance(oldest, tuple)
        return False

    def _check_complete(self) -> None:
        """Raises SourceError when a file ended before its header says."""
        if self._stop.is_set():
            return
        if not self._decoded:
            raise SourceError(f"{self.source} has no frame that can be decoded; it is damaged")
        stream = self._stream()
        missing = self.expected - self._decoded
        if missing <= 0 or stream.duration is None or self._last is None:
            return
        # Cut clips hide frames on purpose: only those that miss at the end count.
        length = float(stream.duration * stream.time_base)
        rest = length - self._last - (1 / self.frame_rate if self.frame_rate else 0)
        if rest > 0.01 * length:
            raise SourceError(
                f"{self.source} broke off after {self._decoded} of {self.expected} frames; it is "
                "cut short or damaged; the frames before are kept"
            )

    # Opening ------------------------------------------------------------------------------------

    def _open(self) -> Any:
        address, options = self._address, {}
        form = None
        if address.lower().startswith("rtsp"):
            # Over UDP, lost packets tear the picture.
            options["rtsp_transport"] = "tcp"
        elif not is_url(address):
            _check_file(Path(address))
            if stat.S_ISCHR(os.stat(address).st_mode):
                form = "v4l2"
        try:
            return self._av.open(address, format=form, options=options, timeout=self.timeout)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            advice = (
                "check the address, and that the camera is on"
                if is_url(address)
                else "it is no video, or damaged"
            )
            raise SourceError(
                f"cannot open {self.source} ({self._reason(error)}); {advice}"
            ) from error

    def _stream(self) -> Any:
        streams = self._container.streams.video
        if not streams:
            raise SourceError(f"{self.source} holds no video; give a file or stream with pictures")
        return streams[0]

    def _rate(self, stream: Any) -> float | None:
        rate = stream.average_rate or stream.guessed_rate
        return float(rate) if rate and rate > 0 else None

    def _is_live(self) -> bool:
        if not is_url(self._address):
            return stat.S_ISCHR(os.stat(self._address).st_mode)
        # A server that says how long its answer is sends a file, whatever its format tells.
        return self._container.duration is None and self._container.size <= 0

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, self._av.error.ExitError):
            return f"no answer within {self.timeout:g} s"
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_file(path: Path) -> None:
    """Raises SourceError for what FFmpeg would explain worse."""
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise SourceError(f"{path} is empty; it holds no video")


def read_video(path: str | os.PathLike[str], limit: int | None = None) -> Tensor:
    """All frames of a video file as gray, uint8 (T, H, W); of the first `limit` frames.

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
