"""The folder of a training run: which file is what, and how results are written into it."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastalps.errors import UserError
from fastalps.files import make_folder, write_json, write_text
from fastalps.pretrained import PREFIX, pretrained_path
from fastalps.training.trainer import CHECKPOINT

MODEL = "model.safetensors"
CONFIG = "config.yaml"
METRICS = "metrics.json"
SCORES = "scores.csv"
FIGURES = "figures"
LOCK = ".lock"
logger = logging.getLogger("fastalps")

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_unused(folder: Path) -> None:
    """Raises UserError when a run is there already: none is ever overwritten. One that failed
    before its first checkpoint has left nothing but its configuration."""
    for name in (MODEL, CHECKPOINT):
        if (folder / name).exists():
            raise UserError(
                f"{folder} already holds a run ({name}); add --resume to go on with it, "
                "or choose another --out"
            )


def check_resumable(folder: Path) -> None:
    """Raises UserError when there is nothing to resume."""
    if not (folder / CHECKPOINT).is_file():
        raise UserError(f"{folder} holds no run to resume ({CHECKPOINT}); leave --resume out")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps the folder, made if needed, for this process; a crash frees it, too.

    Without flock, as on Windows, nothing is kept.

    Raises:
        UserError: another process has it, or it cannot be written.
    """
    make_folder(folder)
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    handle = _lock(path)
    try:
        yield
    finally:
        # Before the lock goes: afterwards it might be another process's.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _lock(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; check the folder and its free space"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"{path.parent} is in use by another process; wait until it ends, or choose "
                "another --out"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: no locks on this file system (%s); start no second run in this folder",
                path.parent,
                error.strerror,
            )
            return handle
        # Its holder may have removed it after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)


def model_path(run: str | os.PathLike[str]) -> Path:
    """The model of a run, given by its folder, by the file itself or as `pretrained:NAME`;
    UserError without one."""
    if os.fspath(run).startswith(PREFIX):
        return pretrained_path(os.fspath(run).removeprefix(PREFIX))
    folder = Path(run)
    if not folder.exists():
        raise UserError(f"there is no run {folder}; make one with fastalps-train")
    path = folder / MODEL if folder.is_dir() else folder
    if not path.exists():
        raise UserError(
            f"{folder} holds no {MODEL}; give the folder of a finished fastalps-train run"
        )
    return path


def write_scores(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file; floats keep all their digits, so that figures can be recomputed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(value) for value in row] for row in rows)
    write_text(path, text.getvalue())


def write_metrics(path: Path, record: dict[str, Any]) -> None:
    """Writes JSON; a figure that could not be computed is null."""
    write_json(path, _without_nan(record))


def cell(value: Any) -> Any:
    """A value as CSV files have it: nothing, 0 or 1, and floats with all their digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return int(value)
    return repr(value) if isinstance(value, float) else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
