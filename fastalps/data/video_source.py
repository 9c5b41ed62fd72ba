"""Where videos come from: files, devices and addresses, and how they may be shown."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from fastalps.data.decode import SourceError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")


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


def is_device(source: str | os.PathLike[str]) -> bool:
    """Whether a path is a device such as /dev/video0."""
    return stat.S_ISCHR(os.stat(source).st_mode)


def check_file(path: Path) -> None:
    """Raises SourceError for what FFmpeg would explain worse."""
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise SourceError(f"{path} is empty; it holds no video")


def announced_bytes(path: Path) -> int | None:
    """How long a Matroska or WebM file is by its own header; None for others, and where it does
    not say: a recorder that could not go back leaves it open.

    Source: RFC 8794 (EBML), section 6: elements are an identifier, a size and that many bytes.
    """
    if not path.is_file():  # Opened again, a pipe would wait for another writer.
        return None
    with path.open("rb") as file:
        head = file.read(4096)
    at = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # The header, the segment.
        if head[at : at + 4] != identifier or len(head) < at + 12:
            return None
        length = 9 - head[at + 4].bit_length()
        size = int.from_bytes(head[at + 4 : at + 4 + length], "big") - (1 << 7 * length)
        start = at + 4 + length
        at = start + size
    return None if size == (1 << 7 * length) - 1 else at
