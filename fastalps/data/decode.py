"""Image files to uint8 arrays, several at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fastalps.environment import usable_cores
from fastalps.errors import UserError
from fastalps.scalars import is_whole

Pixels = npt.NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")

# A closed list: Pillow has dozens of rarely used parsers that would also run on a renamed file.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GRAY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class SourceError(UserError):
    """A source image cannot be used. A type of its own, to be told from a failing cache."""


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels are decoded."""

    path: Path
    height: int
    width: int
    gray: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def __str__(self) -> str:
        return f"{self.path} is {self.height}x{self.width}"


def worker_count(workers: int | None) -> int:
    """Threads to decode with: as asked, or one for each CPU this process may use."""
    if workers is None:
        return usable_cores()
    if not is_whole(workers):
        raise UserError(f"workers must be a positive number of threads or None, got {workers!r}")
    return workers


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """`map(function, items)` on `workers` threads, in order, at most `ahead` results waiting.

    Pillow decodes without the interpreter's lock, so threads are enough; a single one, too, works
    while the caller does. An error stops the rest.
    """
    if len(items) == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastalps-decode")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_header(path: Path) -> Header:
    """Size and kind of an image file; raises SourceError when it is not one."""
    with _opened(path) as image:
        return Header(path, image.height, image.width, image.mode in _GRAY_MODES)


def read_pixels(path: Path, channels: int = 1, size: tuple[int, int] | None = None) -> Pixels:
    """Decodes an image file.

    Args:
        path: bmp, jpg, png, pgm, ppm, tif or webp; of several pages the first. Stored pixels are
            taken as they are: EXIF rotation is not applied, transparency is dropped, 16-bit gray
            becomes round(v / 257).
        channels: 1 = gray (ITU-R 601 luma of colours), 3 = RGB.
        size: (H, W) to resize to (bilinear, antialiased); None = as stored.

    Returns:
        uint8 (H, W) for one channel, (H, W, 3) for three.

    Raises:
        SourceError: the file is missing, damaged, truncated, too large or of 32-bit pixels.
    """
    mode = "L" if channels == 1 else "RGB"
    with _opened(path) as image:
        if mode == "L":
            # JPEG stores luma apart: asking for it alone skips the colour planes (2,010 frames
            # of UCSD Ped2 on one AVX2 core: 0.96 s instead of 1.77 s, the same pixels).
            image.draft("L", image.size)
        picture: Image.Image = image
        # Pillow scales a PGM of any other maximum to 65535, too.
        sixteen = image.mode == "I" and image.format in ("PNG", "PPM")
        if sixteen or image.mode.startswith("I;16"):
            wide = np.asarray(image).astype(np.uint32)
            picture = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise SourceError(f"{path} has 32-bit pixels; convert it to 8 or 16 bits a channel")
        if picture.mode != mode:
            picture = picture.convert(mode)
        if size is not None and (picture.height, picture.width) != size:
            picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(picture)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            # Pillow itself only warns up to twice its limit.
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError
            yield image
    except SourceError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SourceError(
            f"{path} has more pixels than the {Image.MAX_IMAGE_PIXELS} that Pillow deems safe; "
            "shrink it or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise SourceError(
            f"{path} is not an image, or damaged or truncated; replace or remove it"
        ) from error
    except MemoryError as error:
        # Of a damaged file, too, whose header tells a wrong size: which of the two is not known.
        raise SourceError(
            f"{path} takes more memory than there is, or is damaged; shrink or replace it"
        ) from error
    # Damaged files make Pillow's parsers raise almost anything (struct.error, SyntaxError, ...).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        raise SourceError(
            f"{path} is damaged or truncated ({reason}); replace or remove it"
        ) from error
