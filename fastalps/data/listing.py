"""Which files of a folder are images, and in which order."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastalps.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_SUFFIX_TEXT = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key that orders digit runs by value: frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], name


def require_folder(path: str | os.PathLike[str], holding: str) -> Path:
    """Returns `path` as a Path if it is a folder; else raises UserError that says what it holds."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file, expected a folder of {holding}")
    raise UserError(f"the folder {folder} does not exist; give the folder of {holding}")


def sub_folders(folder: Path) -> list[str]:
    """Names of the visible sub-folders, in natural order."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not _is_stray(e.name) and e.is_dir()]
    return sorted(names, key=natural_key)


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder in natural order; at least one.

    Hidden files (.DS_Store, ._001.tif), __MACOSX folders and files of other types are left out.
    Raises UserError for a folder that is missing, unreadable or without an image.
    """
    require_folder(folder, "images")
    paths: list[Path] = []
    unreadable: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if recursive and not _is_stray(name)]
        paths.extend(Path(parent, name) for name in names if _is_image(name))
    if unreadable:
        error = unreadable[0]
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")
    if not paths:
        below = [] if recursive else sub_folders(folder)
        hint = f"; give one of its sub-folders, such as {below[0]}" if below else ""
        raise UserError(f"no images ({_SUFFIX_TEXT}) in the folder {folder}{hint}")
    return sorted(paths, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def list_frames(folder: Path) -> list[Path]:
    """`list_images` for the frames of one video: the same frame in two formats is an error."""
    paths = list_images(folder)
    seen: dict[str, Path] = {}
    for path in paths:
        twin = seen.setdefault(path.stem, path)
        if twin is not path:
            raise UserError(
                f"{folder} has the frame {path.stem} twice, as {twin.name} and {path.name}; "
                "keep one of the two formats"
            )
    return paths


def _is_image(name: str) -> bool:
    return not _is_stray(name) and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_stray(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
