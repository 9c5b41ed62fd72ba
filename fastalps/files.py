"""Writing files so that a reader never sees half of one, and what is left of a closed pipe."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastalps.errors import UserError


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Creates the folder `path` (and its parents) if needed and returns it.

    Raises UserError when it cannot be created or is not writable.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the folder {folder}: {error.strerror}; choose another"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} is not writable; choose another or change its mode")
    return folder


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` on success, removes it otherwise.

    The temporary name keeps the suffix, since writers choose the format by it. Raises UserError
    when the disk is full, read-only or the folder does not exist, and for a name that is taken by
    anything but a file: a device would be replaced.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {target}: it is no ordinary file; give another name")
    try:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix
        )
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror}; check the folder and its free space"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; results are ordinary files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; check the folder and its free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        # Names of files may hold bytes that are no UTF-8: they are escaped.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def discard_output() -> None:
    """After a BrokenPipeError: the reader of a pipe has seen enough, and nothing must be flushed to
    it at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
