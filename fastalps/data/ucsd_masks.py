"""Pixel masks of UCSD clips: a folder of bitmaps, or bit-packed arrays in one .npz."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np

from fastalps.data.decode import Pixels, SourceError, ordered_map, read_pixels
from fastalps.data.listing import list_frames

PACKED_MASKS = "gt_masks_packbits.npz"


@dataclass(frozen=True)
class MaskSource:
    """Where a clip's masks are: the files read, and how to get (H, W) arrays of 0 and 1."""

    files: Sequence[Path]
    decode: Callable[[], Iterator[Pixels]]


def mask_source(
    base: Path, clip: Path, shape: tuple[int, int, int], workers: int
) -> MaskSource | None:
    """Finds the masks of a clip whose frames are `shape` = (T, H, W); None when it has none.

    Raises UserError when there are masks that do not fit the frames.
    """
    folder = clip.with_name(f"{clip.name}_gt")
    if folder.is_dir():
        files = _numbered(folder, shape[0])
        return MaskSource(files, partial(_decode_bitmaps, files, shape, workers))
    packed = base / PACKED_MASKS
    if packed.is_file() and _has_member(packed, clip.name):
        return MaskSource([packed], partial(_decode_packed, packed, clip.name, shape))
    return None


def _numbered(folder: Path, count: int) -> list[Path]:
    files = list_frames(folder)
    if len(files) != count:
        raise SourceError(f"{folder} has {len(files)} masks for {count} frames; complete them")
    # Both 001.bmp and frame001.bmp occur in the official archive.
    numbers = [re.search(r"([0-9]+)$", path.stem) for path in files]
    for i, (path, number) in enumerate(zip(files, numbers, strict=True), 1):
        if number is None or int(number[1]) != i:
            raise SourceError(f"{folder} has {path.name} where mask {i:03d} was expected")
    return files


def _decode_bitmaps(
    files: Sequence[Path], shape: tuple[int, int, int], workers: int
) -> Iterator[Pixels]:
    def decode(path: Path) -> Pixels:
        pixels = read_pixels(path)
        if pixels.shape != shape[1:]:
            raise SourceError(
                f"the mask {path} is {pixels.shape[0]}x{pixels.shape[1]}, "
                f"but its frame is {shape[1]}x{shape[2]} (height x width)"
            )
        return (pixels > 0).astype(np.uint8)

    return ordered_map(decode, files, workers, 4 * workers)


def _has_member(path: Path, clip: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{clip}.npy" in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise SourceError(f"{path} is not a readable .npz file ({error}); get it again") from error


def _decode_packed(path: Path, clip: str, shape: tuple[int, int, int]) -> Iterator[Pixels]:
    expected = (shape[0], shape[1], (shape[2] + 7) // 8)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{clip}.npy") as member:
            file = cast("IO[bytes]", member)
            _check_array(file, expected, f"{path}: {clip}")
            # Read frame by frame, only once the header is known to fit: an archive that unpacks to
            # more than the frames call for costs no memory.
            size = expected[1] * expected[2]
            for _ in range(expected[0]):
                data = file.read(size)
                if len(data) != size:
                    raise SourceError(f"{path}: {clip} is truncated; get it again")
                packed = np.frombuffer(data, dtype=np.uint8).reshape(expected[1:])
                yield np.unpackbits(packed, axis=1, count=shape[2])
            if file.read(1):
                raise SourceError(f"{path}: {clip} is longer than its header says; get it again")
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise SourceError(f"{path}: {clip} is damaged ({error}); get it again") from error


def _check_array(file: IO[bytes], expected: tuple[int, int, int], where: str) -> None:
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"format version {version}")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise SourceError(f"{where} is not a plain .npy array ({error}); get it again") from error
    if dtype != np.uint8 or fortran_order or shape != expected:
        raise SourceError(
            f"{where} must be uint8 {expected} for the frames of the clip, got {dtype} {shape}"
        )
