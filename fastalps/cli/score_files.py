"""Scores on disk as they come: a file under its final name is complete."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fastalps.cli.run_folder import SCORES, cell
from fastalps.errors import UserError

LINES = "scores.jsonl"
OVERLAYS = "overlays"
TIMELINE = "timeline.png"
SUMMARY = "summary.json"


def partial(path: Path) -> Path:
    """The name of a file that is not complete: scores.partial.csv for scores.csv."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class ScoreFiles:
    """scores.csv and scores.jsonl, a row and a line a frame, each readable as soon as it is known.

    Until `finish` they are called scores.partial.csv and scores.partial.jsonl; whatever stops the
    program, these keep what was scored. They are made with the first row: without one there is no
    file.

    Args:
        folder: where they go.
        columns: names of a row's values; "flagged" is written as 0 or 1 in the CSV file.

    Raises:
        UserError: a file cannot be written.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._paths = (folder / SCORES, folder / LINES)
        self._columns = tuple(columns)
        self._files: list[IO[str]] = []

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Appends rows; they are in the files when this returns."""
        if not rows:
            return
        try:
            if not self._files:
                for path in self._paths:
                    # Names of files may hold bytes that are no UTF-8: they are escaped.
                    self._files.append(
                        partial(path).open(
                            "w", encoding="utf-8", errors="backslashreplace", newline=""
                        )
                    )
                csv.writer(self._files[0], lineterminator="\n").writerow(self._columns)
            table, lines = self._files
            csv.writer(table, lineterminator="\n").writerows(
                [cell(value) for value in row] for row in rows
            )
            for row in rows:
                named = dict(zip(self._columns, row, strict=True))
                lines.write(json.dumps(named, allow_nan=False) + "\n")
            for file in self._files:
                file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._paths[0]}: {error.strerror}; check the folder and its free "
                "space"
            ) from error

    def finish(self) -> None:
        """Gives the files their final names: all rows are there."""
        self.close()
        for path in self._paths:
            if partial(path).exists():
                os.replace(partial(path), path)

    def close(self) -> None:
        """Closes the files under the names that they have."""
        for file in self._files:
            file.close()
        self._files = []
