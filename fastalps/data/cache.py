"""Decoded frames kept on disk, so that a video is decoded once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalps.data.decode import Pixels, SourceError
from fastalps.errors import UserError
from fastalps.files import atomic_path, make_folder, write_text

FORMAT_VERSION = 1

logger = logging.getLogger("fastalps")
_warned: set[str] = set()


def decoded_frames(
    cache: str | os.PathLike[str] | None,
    folder: Path,
    kind: str,
    sources: Sequence[Path],
    shape: tuple[int, int, int],
    decode: Callable[[], Iterator[Pixels]],
) -> Tensor:
    """The frames that `decode` yields as one tensor, from the cache where it holds them.

    An entry is an .npy array and a .json manifest of what it was made from. The array's name holds
    the manifest's digest, so processes that write at once can only replace an array by its equal,
    and a reader never pairs a manifest with another array.

    Args:
        cache: folder of the cache, made if needed; None = decode into memory.
        folder: the frames' folder; its path tells entries apart.
        kind: what is decoded and how; part of the entry's identity.
        sources: the files decoded; the entry is rebuilt when a name, size or time changes.
        shape: (T, H, W) of the result.
        decode: makes an iterator of T uint8 (H, W) arrays.

    Returns:
        uint8 (T, H, W): a copy-on-write memory map of the entry (writing to the tensor does not
        reach the file), or memory where there is no cache or it cannot be written; the latter is
        logged once a folder.
    """
    if cache is not None:
        entry = _Entry(Path(cache), folder, kind, sources, shape)
        mapped = entry.read()
        if mapped is None and entry.write(decode):
            mapped = entry.read()
        if mapped is not None:
            return torch.from_numpy(mapped)
    frames = np.empty(shape, dtype=np.uint8)
    for i, frame in enumerate(decode()):
        frames[i] = frame
    return torch.from_numpy(frames)


class _Entry:
    def __init__(
        self,
        cache: Path,
        folder: Path,
        kind: str,
        sources: Sequence[Path],
        shape: tuple[int, int, int],
    ) -> None:
        self.shape = shape
        self.manifest: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "kind": kind,
            "shape": list(shape),
            "sources": [_fingerprint(path) for path in sources],
        }
        identity = f"{kind}\0{folder.resolve()}"
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", folder.name)[:60] or "frames"
        self.cache = cache
        self.name = f"{readable}-{_digest(identity)}"
        self.manifest["array"] = f"{self.name}-{_digest(json.dumps(self.manifest))}.npy"
        self.array_path = cache / self.manifest["array"]
        self.manifest_path = cache / f"{self.name}.json"

    def read(self) -> Pixels | None:
        """The mapped array, or None when the entry is absent, stale or damaged."""
        try:
            if json.loads(self.manifest_path.read_text(encoding="utf-8")) != self.manifest:
                return None
            # Copy-on-write: torch has no read-only tensors, and a write must not reach the file.
            array = np.load(self.array_path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        valid = isinstance(array, np.memmap) and array.shape == self.shape
        return array if valid and array.dtype == np.uint8 and array.flags.c_contiguous else None

    def write(self, decode: Callable[[], Iterator[Pixels]]) -> bool:
        """Decodes into the cache; False (and a warning) when that cannot be written to."""
        try:
            make_folder(self.cache)
            with atomic_path(self.array_path) as temporary, open(temporary, "wb") as file:
                # Plain writes: on a full disk a write into a memory map kills the process.
                header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for frame in decode():
                    file.write(np.ascontiguousarray(frame).data)
            write_text(self.manifest_path, json.dumps(self.manifest))
        except SourceError:
            raise
        except UserError as error:
            if str(self.cache) not in _warned:
                _warned.add(str(self.cache))
                logger.warning("going on without the cache of decoded frames: %s", error)
            return False
        for stale in self.cache.glob(f"{self.name}-*.npy"):
            if stale != self.array_path:
                _remove(stale)
        return True


def _fingerprint(path: Path) -> list[str | int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    return [path.name, status.st_size, status.st_mtime_ns]


def _digest(text: str) -> str:
    # surrogateescape: file names need not be valid UTF-8.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        # Another process removed it, or (on Windows) still maps it: it costs space, nothing else.
        logger.debug("cannot remove the stale cache file %s: %s", path, error)
