"""Random images, in memory and in files of every layout that is read."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Of the frames that are written: not a multiple of 8, so that packed masks have bits to spare.
HEIGHT, WIDTH = 9, 13


def pixels_of(
    shape: tuple[int, ...], rng: torch.Generator | int, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Levels from 0 to 255, or from 0 to 1 where `dtype` is floating; `rng` may be a seed."""
    generator = torch.Generator().manual_seed(rng) if isinstance(rng, int) else rng
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return torch.rand(shape, generator=generator).to(dtype)


def bytes_of(shape: tuple[int, ...], rng: torch.Generator, below: int = 256) -> np.ndarray:
    return torch.randint(below, shape, generator=rng).to(torch.uint8).numpy()


def rows(images: Tensor) -> set[bytes]:
    """The images, to be compared whatever their order."""
    return {image.numpy().tobytes() for image in images}


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_many(folder: Path, count: int, rng: torch.Generator, shape=(8, 9)) -> None:
    for i in range(count):
        save(folder / f"{i}.png", bytes_of(shape, rng))


def write_frames(
    folder: Path, count: int, rng: torch.Generator, pattern: str = "{:03d}.tif"
) -> np.ndarray:
    frames = bytes_of((count, HEIGHT, WIDTH), rng)
    for i, frame in enumerate(frames, 1):
        save(folder / pattern.format(i), frame)
    return frames


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return struct.pack(">I", 0x800 + array.ndim) + sizes + array.tobytes()


def write_idx_set(
    folder: Path,
    rng: torch.Generator,
    *,
    zipped: bool = True,
    train: int = 400,
    test: int = 30,
    size: tuple[int, int] = (7, 5),
) -> tuple[np.ndarray, np.ndarray]:
    """A set in the layout of MNIST; returns its training images and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix, pack = (".gz", gzip.compress) if zipped else ("", bytes)
    images = bytes_of((train, *size), rng)
    labels = (np.arange(train) % 10).astype(np.uint8)
    contents = (images, labels, bytes_of((test, *size), rng), bytes_of((test,), rng, 10))
    for name, content in zip(IDX_FILES, contents, strict=True):
        (folder / (name + suffix)).write_bytes(pack(idx(content)))
    return images, labels
