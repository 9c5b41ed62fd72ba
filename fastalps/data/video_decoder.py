"""A video's frames one by one, whatever happens to the connection."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastalps.data.decode import Pixels, SourceError
from fastalps.data.video_source import announced_bytes, check_file, is_device, is_url, shown
from fastalps.errors import UserError
from fastalps.stage_times import DECODE, StageTimes

# Damaged packets one after the other; with more, nothing is to be expected any more.
_DAMAGED_IN_A_ROW = 200
# Seconds before the first attempt to connect again; each further one waits twice as long.
_RETRY_SECONDS = 1.0
_LONGEST_WAIT = 30.0

logger = logging.getLogger("fastalps")

# A gray frame, uint8 (H, W), and its seconds since the first one; None where the video states none.
TimedFrame = tuple[Pixels, float | None]


def import_av() -> Any:
    """PyAV; UserError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "video needs PyAV, which is not installed; pip install 'fastalps[video]'"
        ) from error
    return av


class VideoDecoder:
    """The gray frames of a file, a device or an address; see `fastalps.data.video.VideoReader`.

    Args:
        address: of the video.
        timeout: seconds to wait for a connection and for each piece of data.
        reconnects: attempts in a row to connect to a live source again.
        stop: ends decoding and waiting when it is set.
        times: gets what decoding took, with its waits for data.

    Attributes:
        source, live, frame_size, frame_rate, duration, expected, damaged, reconnected: as of
            `VideoReader`.
    """

    def __init__(
        self,
        address: str,
        timeout: float,
        reconnects: int,
        stop: threading.Event,
        times: StageTimes | None,
    ) -> None:
        self._av = import_av()
        self._address = address
        self._timeout = timeout
        self._reconnects = reconnects
        self._stop = stop
        self._times = times
        self.source = shown(address)
        self.damaged = self.reconnected = 0
        self._decoded = 0
        self._first_time: float | None = None
        self._last_time: float | None = None
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
            self.close()
            raise

    def close(self) -> None:
        """Leaves the source."""
        self._container.close()

    # Frames -------------------------------------------------------------------------------------

    def frames(self) -> Iterator[TimedFrame]:
        """Every frame until the end, the stop, or the last attempt to connect again.

        Raises SourceError for a source that breaks off or dies.
        """
        attempts: int | None = 0
        while attempts is not None and not self._stop.is_set():
            reason = "the stream ended"
            frames = self._connection()
            if self._times is not None:
                frames = self._times.items(DECODE, frames)
            try:
                for frame in frames:
                    attempts = 0
                    yield frame
            except self._av.FFmpegError as error:
                reason = self._reason(error)
                if not self.live:
                    raise self._broken(reason) from error
            if not self.live:
                self._check_complete()
                return
            attempts = self._connect_again(reason, attempts)

    def _connection(self) -> Iterator[TimedFrame]:
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
                yield self._timed(frame)

    def _timed(self, frame: Any) -> TimedFrame:
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
        if self._first_time is None:
            self._first_time = seconds
        if seconds is not None and self._first_time is not None:
            seconds -= self._first_time
        self._decoded += 1
        self._last_time = seconds
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

    def _check_complete(self) -> None:
        """Raises SourceError when a file ended before its header says."""
        if self._stop.is_set():
            return
        if not self._decoded:
            raise SourceError(f"{self.source} has no frame that can be decoded; it is damaged")
        announced = None if is_url(self._address) else announced_bytes(Path(self._address))
        if announced is not None and Path(self._address).stat().st_size < announced:
            raise self._cut_short("")
        stream = self._stream()
        missing = self.expected - self._decoded
        if missing <= 0 or stream.duration is None or self._last_time is None:
            return
        # Cut clips hide frames on purpose: only those that miss at the end count.
        length = float(stream.duration * stream.time_base)
        rest = length - self._last_time - (1 / self.frame_rate if self.frame_rate else 0)
        if rest > 0.01 * length:
            raise self._cut_short(f" of {self.expected}")

    def _cut_short(self, of: str) -> SourceError:
        return SourceError(
            f"{self.source} broke off after {self._decoded}{of} frames; it is cut short or "
            "damaged; the frames before are kept"
        )

    def _connect_again(self, reason: str, attempts: int) -> int | None:
        """Connects to a live source that was lost; attempts so far, or None when told to stop."""
        while not self._stop.is_set():
            if attempts == self._reconnects:
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
                self._reconnects,
            )
            if self._stop.wait(wait):
                return None
            self.close()
            try:
                self._container = self._open()
                self._stream()
            except UserError as error:
                reason = str(error)
                continue
            self.reconnected += 1
            logger.warning("%s: connected again", self.source)
            return attempts
        return None

    # Opening ------------------------------------------------------------------------------------

    def _open(self) -> Any:
        address, options = self._address, {}
        form = None
        if address.lower().startswith("rtsp"):
            # Over UDP, lost packets tear the picture.
            options["rtsp_transport"] = "tcp"
        elif not is_url(address):
            check_file(Path(address))
            if is_device(address):
                form = "v4l2"
        try:
            return self._av.open(address, format=form, options=options, timeout=self._timeout)
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
            return is_device(self._address)
        # A server that says how long its answer is sends a file, whatever its format tells.
        return self._container.duration is None and self._container.size <= 0

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, self._av.error.ExitError):
            return f"no answer within {self._timeout:g} s"
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
