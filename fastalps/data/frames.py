"""Folders of frames and of images as tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalps.data.cache import decoded_frames
from fastalps.data.decode import (
    Header,
    Pixels,
    SourceError,
    ordered_map,
    read_header,
    read_pixels,
    worker_count,
)
from fastalps.data.listing import list_frames, list_images, require_folder
from fastalps.errors import UserError
from fastalps.memory import check_memory
from fastalps.scalars import is_whole
from fastalps.stage_times import DECODE, StageTimes

# Enough waiting results to keep every thread busy while the consumer stores one.
_AHEAD_PER_WORKER = 4


def read_frames(
    path: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """Reads the frames of one video from a folder, as gray.

    Args:
        path: a folder of image files; their natural order (frame2 before frame10) is the video's.
            Hidden files and files of other types are left out.
        cache: folder where decoded frames are kept, which makes the next read immediate; None =
            none is kept.
        workers: decoding threads; None = one for each CPU.

    Returns:
        uint8 (T, H, W) frames, gray levels 0 to 255 (a copy-on-write memory map when cached), and
        the T file names.

    Raises:
        UserError: no such folder, no frames in it, a damaged frame, frames of different sizes.
    """
    threads = worker_count(workers)
    folder = require_folder(path, "frames")
    paths = list_frames(folder)
    first = read_header(paths[0])
    frames = decoded_frames(
        cache,
        folder,
        "gray frames",
        paths,
        (len(paths), *first.size),
        lambda: decode_frames(paths, first, threads, _AHEAD_PER_WORKER * threads),
    )
    return frames, tuple(path.name for path in paths)


def iter_frames(
    path: str | os.PathLike[str],
    chunk: int = 256,
    workers: int | None = None,
    times: StageTimes | None = None,
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """`read_frames` in pieces: memory is bounded by about three chunks whatever the video's length.

    The next chunk is decoded while the caller works on this one.

    Args:
        path, workers: as for `read_frames`.
        chunk: frames a piece; the last piece may be shorter.
        times: gets what the threads worked; None = nothing is timed.

    Returns:
        an iterator of (uint8 (t, H, W) frames, their t file names). Every piece is new memory.

    Raises:
        UserError: as `read_frames`; about the folder at once, about a frame when it is reached.
    """
    if not is_whole(chunk):
        raise UserError(f"chunk must be a positive number of frames, got {chunk!r}")
    threads = worker_count(workers)
    paths = list_frames(require_folder(path, "frames"))
    first = read_header(paths[0])
    frames = decode_frames(paths, first, threads, max(chunk, threads), times)
    return _chunks(paths, first, frames, chunk)


def frame_sample(path: str | os.PathLike[str], samples: int, workers: int | None = None) -> Tensor:
    """At most `samples` frames of a folder at even distances, uint8 (n, H, W): all of a short clip.

    They are those that `fastalps.gate.clip_background` picks from the whole clip. Raises UserError
    as `read_frames`.
    """
    threads = worker_count(workers)
    paths = list_frames(require_folder(path, "frames"))
    if len(paths) > samples:
        paths = [paths[i * len(paths) // samples] for i in range(samples)]
    frames = decode_frames(paths, read_header(paths[0]), threads, _AHEAD_PER_WORKER * threads)
    return torch.from_numpy(np.stack(list(frames)))


def _chunks(
    paths: Sequence[Path], first: Header, frames: Iterator[Pixels], chunk: int
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    for start in range(0, len(paths), chunk):
        names = tuple(path.name for path in paths[start : start + chunk])
        piece = np.empty((len(names), *first.size), dtype=np.uint8)
        for row in piece:
            row[...] = next(frames)
        yield torch.from_numpy(piece), names


def decode_frames(
    paths: Sequence[Path],
    first: Header,
    workers: int,
    ahead: int,
    times: StageTimes | None = None,
) -> Iterator[Pixels]:
    """Decodes gray frames in order; raises SourceError for one whose size is not the first's."""

    def decode(path: Path) -> Pixels:
        pixels = read_pixels(path)
        if pixels.shape != first.size:
            raise SourceError(
                f"{path} is {pixels.shape[0]}x{pixels.shape[1]}, but {first} (height x width); "
                "the frames of one video must have one size"
            )
        return pixels

    timed = decode if times is None else times.calls(DECODE, decode)
    return ordered_map(timed, paths, workers, ahead)


def read_images(
    path: str | os.PathLike[str],
    *,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    workers: int | None = None,
    times: StageTimes | None = None,
) -> tuple[Tensor, tuple[str, ...]]:
    """Reads the images of a folder and its sub-folders, or one image file.

    Args:
        path: a folder or an image file.
        size: H = W, or (H, W), to resize to (bilinear, antialiased); None = as stored.
        channels: 1 = gray, 3 = RGB; None = 1 if every image is stored as gray, else 3.
        workers: decoding threads; None = one for each CPU.
        times: gets what the threads worked; None = nothing is timed.

    Returns:
        uint8 (N, C, H, W) images in natural order, and their N paths relative to `path`.

    Raises:
        UserError: nothing there, a damaged image, images of different sizes and no `size`.
    """
    root = Path(path)
    if root.is_file():
        return decode_images([root], size, channels, workers, times), (root.name,)
    paths = list_images(root, recursive=True)
    names = tuple(p.relative_to(root).as_posix() for p in paths)
    return decode_images(paths, size, channels, workers, times), names


def decode_images(
    paths: Sequence[Path],
    size: int | Sequence[int] | None,
    channels: int | None,
    workers: int | None,
    times: StageTimes | None = None,
    copies: int = 1,
) -> Tensor:
    """Decodes image files of one size, or resized to one, to uint8 (N, C, H, W).

    Raises UserError as `read_images`, and where the machine cannot hold `copies` of the result.
    """
    threads = worker_count(workers)
    ahead = _AHEAD_PER_WORKER * threads
    if channels not in (None, 1, 3):
        raise UserError(f"channels must be 1 (gray), 3 (RGB) or None, got {channels!r}")
    target = _image_size(size)
    if target is None or channels is None:
        headers = list(ordered_map(read_header, paths, threads, ahead))
        if channels is None:
            channels = 1 if all(header.gray for header in headers) else 3
        if target is None:
            for header in headers:
                if header.size != headers[0].size:
                    raise SourceError(
                        f"images differ in size: {headers[0]}, {header} (height x width); "
                        "set an image size to resize all to"
                    )
            target = headers[0].size
    shape = (len(paths), channels, *target)
    remedy = "use fewer, or a smaller image size"
    check_memory(f"decoded, the {len(paths)} images take", math.prod(shape), remedy, copies)
    images = np.empty(shape, dtype=np.uint8)

    def decode(path: Path) -> Pixels:
        return read_pixels(path, channels, target)

    timed = decode if times is None else times.calls(DECODE, decode)
    pixels = ordered_map(timed, paths, threads, ahead)
    for image, decoded in zip(images, pixels, strict=True):
        image[...] = decoded if channels == 1 else decoded.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _image_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = list(size) if isinstance(size, Sequence) else [size, size]
    if len(pair) != 2 or not all(is_whole(side) for side in pair):
        raise UserError(f"the image size must be a positive number or (H, W), got {size!r}")
    return int(pair[0]), int(pair[1])
