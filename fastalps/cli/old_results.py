"""What an earlier `fastalps-score` left in the folder of results: told from all else, replaced."""

from __future__ import annotations

import os
from pathlib import Path

from fastalps.cli.annotate import ANNOTATED
from fastalps.cli.overlays import is_overlay
from fastalps.cli.report import REPORT
from fastalps.cli.run_folder import SCORES
from fastalps.cli.score_files import LINES, OVERLAYS, SUMMARY, TIMELINE, partial
from fastalps.errors import UserError

NAMES = (SCORES, LINES, TIMELINE, SUMMARY, REPORT, ANNOTATED)


def check_apart(source: str, folder: str | os.PathLike[str], searched: bool) -> None:
    """Raises UserError where results in `folder` would be taken for the input, or replace it.

    Args:
        source: the input; what is no path that exists is apart.
        folder: of the results.
        searched: the input's sub-folders, too, are searched for images.
    """
    given, out = Path(source), Path(folder).resolve()
    if not given.exists():
        return
    around = (out, *out.parents) if searched else (out,)
    if given.is_dir() and any(place.exists() and place.samefile(given) for place in around):
        raise UserError(
            f"--out must lie outside of the input, got {folder} for {source}: the next run would "
            "take its pictures for images to score; give another folder"
        )
    inside = given.resolve()
    if inside in _files(out) or out / OVERLAYS in (inside, *inside.parents):
        raise UserError(
            f"the input {source} is among the results in {folder}, which are replaced; give "
            "another --out"
        )


def remove_results(folder: Path) -> None:
    """Removes the files of an earlier run, complete or not, and nothing else: results of two inputs
    are not to be mixed.

    Raises UserError for one that cannot be removed.
    """
    pictures = folder / OVERLAYS
    overlays = [path for path in pictures.glob("*.png") if is_overlay(path)]
    for path in (*_files(folder), *overlays):
        try:
            if path.is_file():
                path.unlink()
        except OSError as error:
            raise UserError(
                f"cannot remove {path} of an earlier run: {error.strerror}; give another --out"
            ) from error
    if overlays and not any(pictures.iterdir()):
        pictures.rmdir()


def _files(folder: Path) -> list[Path]:
    whole = [folder / name for name in NAMES]
    return whole + [partial(path) for path in whole]
