"""Video files, cameras and network streams as gray frames, decoded on a thread of their own."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastalps.data.decode import Pixels
from fastalps.data.video_decoder import TimedFrame, VideoDecoder
from fastalps.errors import UserError
from fastalps.stage_times import StageTimes

# Decoded frames that wait for the caller, and frames of one chunk: 30 frames of 1080 x 1920.
_QUEUE_BYTES = _CHUNK_BYTES = 1 << 26


class _Ended(Exception):
    """Stands behind the last frame of a video that is complete."""


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
        self.realtime = realtime
        self.frames = self.dropped = 0
        self._limit = limit
        self._stop = threading.Event()
        self._decoder = VideoDecoder(os.fspath(source), timeout, reconnects, self._stop, times)
        self.source = self._decoder.source
        self.live = self._decoder.live
        self.expected = self._decoder.expected
        self.frame_rate = self._decoder.frame_rate
        self.duration = self._decoder.duration
        self.frame_size = self._decoder.frame_size
        frame_bytes = self.frame_size[0] * self.frame_size[1]
        self._chunk = max(1, min(chunk, _CHUNK_BYTES // frame_bytes))
        ahead = max(2, min(chunk, _QUEUE_BYTES // frame_bytes))
        self._queue: queue.Queue[TimedFrame | BaseException] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, name="fastalps-video", daemon=True)
        self._thread.start()

    @property
    def damaged(self) -> int:
        return self._decoder.damaged

    @property
    def reconnected(self) -> int:
        return self._decoder.reconnected

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

    def _next(self, patient: bool) -> TimedFrame | BaseException | None:
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
        begun = time.monotonic()
        try:
            for frame, seconds in self._decoder.frames():
                if self.realtime and not self.live and seconds is not None:
                    self._stop.wait(max(0.0, begun + seconds - time.monotonic()))
                if not self._put((frame, seconds)):
                    break
        except BaseException as error:
            end = error
        finally:
            self._decoder.close()
        self._put(end)

    def _put(self, item: TimedFrame | BaseException) -> bool:
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
