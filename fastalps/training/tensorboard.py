"""The history of a training for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalps.errors import UserError


class TensorBoardLogger:
    """Writes each epoch's figures as TensorBoard's scalars; one of `Trainer`'s `loggers`.

    The tags are the columns of history.csv, but grouped: `validation_average` is
    "validation/average", `normal_error` "training/normal_error". Nothing is written before the
    first epoch. After a resumption, what an earlier process wrote about the same epochs is hidden.

    Args:
        folder: for the event files; show them with ``tensorboard --logdir FOLDER``.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard is not installed; pip install 'fastalps[tensorboard]'"
            ) from error
        self._folder = Path(folder)
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Takes a row of `FitResult.history`; it is on disk when this returns."""
        epoch = int(row["epoch"])
        try:
            if self._writer is None:
                self._writer = self._make(str(self._folder), purge_step=epoch)
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(_tag(name), value, epoch)
            self._writer.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Ends the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _tag(name: str) -> str:
    group, _, rest = name.partition("_")
    return f"validation/{rest}" if group == "validation" else f"training/{name}"
