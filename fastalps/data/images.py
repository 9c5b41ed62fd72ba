"""Labelled image sets as one-class tasks: digits, MNIST, Fashion-MNIST, or one's own folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastalps.data.containers import OneClassData
from fastalps.data.decode import Pixels
from fastalps.data.download import (
    FASHION_MNIST_FILES,
    FASHION_MNIST_MIRRORS,
    MNIST_FILES,
    MNIST_MIRRORS,
    RemoteFile,
    fetch,
)
from fastalps.data.folder import load_folder
from fastalps.data.idx import read_idx
from fastalps.data.splits import LabelledImages, check_protocol, one_class, random_state
from fastalps.errors import UserError

IMAGE_DATASETS = ("digits", "mnist", "fashion-mnist", "folder")

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "t-shirt-top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


@dataclass(frozen=True)
class _IdxDataset:
    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    mirrors: tuple[str, ...]
    # Of the unpacked t10k labels: the two sets share file names and cannot be told apart by them.
    labels_sha256: str


_IDX_DATASETS = {
    "mnist": _IdxDataset(
        class_names=DIGIT_NAMES,
        folders=("mnist", "MNIST/raw", "MNIST"),
        files=MNIST_FILES,
        mirrors=MNIST_MIRRORS,
        labels_sha256="ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    ),
    "fashion-mnist": _IdxDataset(
        class_names=FASHION_NAMES,
        folders=(
            "fashion-mnist",
            "fashion_mnist",
            "FashionMNIST/raw",
            "FashionMNIST",
            "data/fashion",
        ),
        files=FASHION_MNIST_FILES,
        mirrors=FASHION_MNIST_MIRRORS,
        labels_sha256="3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    ),
}


def load_images(
    dataset: str,
    root: str | os.PathLike[str] | None = None,
    *,
    normal_class: int | str | None = None,
    protocol: str = "paper",
    seed: int = 0,
    download: bool = False,
) -> OneClassData:
    """Loads a one-class task: one class is normal, all others are anomalous.

    Validation holds min(150, 20% of the class) normal training images and, under the protocol
    `paper`, as many anomalous training images; `strict` has the same normal ones only. Training is
    the rest of the normal class, the same for both protocols of a seed; test is the full test set.

    Args:
        dataset: "digits" (1,797 images of 8x8, embedded; every fifth image of each class, counted
            from the fifth, is a test image; gray = round(v * 255 / 16) of the stored 0 to 16),
            "mnist" or "fashion-mnist" (60,000 + 10,000 images of 28x28), or "folder" (see
            `load_folder`, which has more options).
        root: the folder of the data; not for digits. The IDX files, gzipped or not, are looked for
            in it, in its sub-folder `raw` and in sub-folders named after the data set.
        normal_class: index or name ("bag") of the normal class; not for folder.
        protocol: "paper" or "strict".
        seed: of the draws for validation, 0 to 2**32 - 1.
        download: fetch IDX files that are missing; their SHA-256 is checked.

    Raises:
        UserError: unknown data set, class or protocol; missing, damaged or foreign files; a class
            without training images.
    """
    check_protocol(protocol)
    random_state(seed)
    if dataset not in IMAGE_DATASETS:
        raise UserError(f"dataset must be one of {', '.join(IMAGE_DATASETS)}, got {dataset!r}")
    if dataset != "digits" and root is None:
        raise UserError(f"the data set {dataset} needs root, the folder that holds it")
    if dataset == "folder":
        if normal_class is not None:
            raise UserError(
                "normal_class does not apply to the data set folder, whose sub-folders say what is "
                "normal; leave it out"
            )
        return load_folder(Path(root or "."), protocol=protocol, seed=seed)
    names = DIGIT_NAMES if dataset == "digits" else _IDX_DATASETS[dataset].class_names
    index = _class_index(dataset, names, normal_class)
    if dataset == "digits":
        images = _read_digits()
    else:
        images = _read_idx_dataset(dataset, Path(root or "."), download)
    return one_class(f"{dataset}[{index}]", images, index, names, protocol, seed)


def _class_index(dataset: str, names: Sequence[str], wanted: int | str | None) -> int:
    valid = ", ".join(name if name == str(i) else f"{i} ({name})" for i, name in enumerate(names))
    if wanted is None:
        raise UserError(f"choose the normal class (normal_class) of {dataset}: one of {valid}")
    text = _plain(str(wanted))
    for i, name in enumerate(names):
        if text in (str(i), _plain(name)):
            return i
    raise UserError(f"{dataset} has no class {wanted!r}; choose one of {valid}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.strip().lower())


def _read_digits() -> LabelledImages:
    from sklearn.datasets import load_digits  # half a second that only this data set costs

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    classes = bunch.target
    is_test = np.zeros(len(classes), dtype=bool)
    for c in range(len(DIGIT_NAMES)):
        is_test[np.flatnonzero(classes == c)[4::5]] = True
    return LabelledImages(images[~is_test], classes[~is_test], images[is_test], classes[is_test])


def _read_idx_dataset(dataset: str, root: Path, download: bool) -> LabelledImages:
    known = _IDX_DATASETS[dataset]
    if root.is_file():
        raise UserError(f"{root} is a file; root must be the folder that holds {dataset}")
    folder = _idx_folder(dataset, root)
    paths = []
    for file in known.files:
        path = _existing(folder, file.name)
        if path is None and download:
            fetch(file, known.mirrors, folder)
            path = folder / file.name
        if path is None:
            raise UserError(
                f"{dataset} needs the file {folder / file.name} (gzipped or not); put it there or "
                f"allow the download (download=True), from {known.mirrors[0]}"
            )
        paths.append(path)
    train = _read_part(dataset, paths[0], paths[1])
    test = _read_part(dataset, paths[2], paths[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UserError(
            f"{paths[0]} has images of {train[0].shape[1:]}, {paths[2]} of {test[0].shape[1:]}; "
            "they must have one size"
        )
    digest = hashlib.sha256(test[1].tobytes()).hexdigest()
    for other, description in _IDX_DATASETS.items():
        if other != dataset and digest == description.labels_sha256:
            raise UserError(f"{folder} holds {other}, not {dataset}; give the folder of {dataset}")
    return LabelledImages(*train, *test)


def _read_part(dataset: str, images_path: Path, labels_path: Path) -> tuple[Pixels, Pixels]:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels"
        )
    if not images.size:
        raise UserError(f"{images_path} has no images")
    classes = len(_IDX_DATASETS[dataset].class_names)
    if labels.max() >= classes:
        raise UserError(f"{labels_path} has the label {labels.max()}, above {classes - 1}")
    return images, labels


def _idx_folder(dataset: str, root: Path) -> Path:
    """The folder that holds the files, or where they belong."""
    known = _IDX_DATASETS[dataset]
    for folder in (*(root / name for name in known.folders), root, root / "raw"):
        if any(_existing(folder, file.name) for file in known.files):
            return folder
    return root if _plain(root.name) == dataset else root / dataset


def _existing(folder: Path, name: str) -> Path | None:
    bare = name.removesuffix(".gz")
    # Some mirrors unpack to train-images.idx3-ubyte.
    for variant in (
        name,
        bare,
        re.sub(r"-(idx\d)", r".\1", bare),
        re.sub(r"-(idx\d)", r".\1", name),
    ):
        if (folder / variant).is_file():
            return folder / variant
    return None
