"""The IDX format of MNIST: big-endian magic 0x0000TTDD, DD sizes of 4 bytes, then the elements.

Source: the format's description on the MNIST page (TT = 08 for unsigned bytes, DD = dimensions).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from fastalps.data.decode import Pixels
from fastalps.errors import UserError

# The largest official file holds 47 MB; a header that asks for more than this is damaged.
_LIMIT = 1 << 30


def read_idx(path: Path, dimensions: int) -> Pixels:
    """Reads an IDX file of unsigned bytes, gzipped or not (told by content, not by name).

    Args:
        path: of the file.
        dimensions: expected number of them: 3 for images (N, H, W), 1 for labels (N,).

    Returns:
        read-only uint8 array of the shape that the file states.

    Raises:
        UserError: the file cannot be read, has another magic number, is shorter or longer than its
            header says, or its gzip stream is truncated or damaged.
    """
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _parse(raw, path, dimensions)
            with gzip.open(raw) as unzipped:
                return _parse(cast("IO[bytes]", unzipped), path, dimensions)
    except EOFError as error:
        raise UserError(f"{path} is a truncated gzip file; get it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); get it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(file: IO[bytes], path: Path, dimensions: int) -> Pixels:
    expected = 0x0800 + dimensions
    head = file.read(4 + 4 * dimensions)
    magic = int.from_bytes(head[:4], "big")
    if len(head) < 4 or magic != expected:
        came = f"0x{head[:4].hex()}" if head else "an empty file"
        raise UserError(
            f"{path} is not the IDX file expected: magic number 0x{expected:08x} "
            f"({dimensions} dimensions of bytes), got {came}"
        )
    if len(head) < 4 + 4 * dimensions:
        raise UserError(f"{path} is truncated within its IDX header; get it again")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    length = math.prod(shape)
    stated = "x".join(str(n) for n in shape)
    if length > _LIMIT:
        raise UserError(f"{path} states an absurd IDX size of {stated} bytes; get it again")
    # One byte more than stated, to notice what follows (and to let gzip verify its checksum).
    data = file.read(length + 1)
    if len(data) != length:
        came = f"only {len(data)}" if len(data) < length else "more"
        raise UserError(
            f"{path} states {stated} = {length} bytes after its IDX header but has {came}; "
            "get it again"
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
