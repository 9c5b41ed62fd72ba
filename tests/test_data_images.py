"""Image sets: IDX files, digits, splits by protocol, folders, decoding of single images."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalps.data import download, load_images
from fastalps.data import images as image_sets
from fastalps.data.containers import OneClassData
from fastalps.data.idx import read_idx
from fastalps.errors import UserError
from tests.conftest import data_folder
from tests.images import IDX_FILES, bytes_of, idx, rows, write_idx_set

# IDX files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "MNIST/raw", "mnist", "raw"])
def test_idx_layouts(tmp_path: Path, rng: torch.Generator, zipped: bool, below: str) -> None:
    images, labels = write_idx_set(tmp_path / below, rng, zipped=zipped)
    data = load_images("mnist", tmp_path, normal_class="3")
    assert data.name == "mnist[3]"
    assert data.train.shape == (32, 1, 7, 5) and data.train.is_contiguous()
    assert data.validation_labels.tolist() == [False] * 8 + [True] * 8
    normal = {image.tobytes() for image in images[labels == 3]}
    assert rows(data.train) | rows(data.validation[~data.validation_labels]) == normal
    assert not rows(data.validation[data.validation_labels]) & normal
    assert len(data.test) == 30 and data.test_names[4].endswith("/00004")
    expected = [not name.startswith("3/") for name in data.test_names]
    assert data.test_labels.tolist() == expected


def test_protocols_share_training_and_differ_by_anomalies(
    tmp_path: Path, rng: torch.Generator
) -> None:
    write_idx_set(tmp_path, rng)
    paper = load_images("mnist", tmp_path, normal_class=1, seed=5)
    strict = load_images("mnist", tmp_path, normal_class=1, seed=5, protocol="strict")
    other = load_images("mnist", tmp_path, normal_class=1, seed=6)
    assert torch.equal(paper.train, strict.train)
    assert torch.equal(paper.validation[~paper.validation_labels], strict.validation)
    assert not strict.validation_labels.any()
    assert not torch.equal(paper.train, other.train)
    again = load_images("mnist", tmp_path, normal_class=1, seed=5)
    assert torch.equal(again.validation, paper.validation)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (struct.pack(">IIII", 0x801, 1, 1, 1), "magic number 0x00000803.*got 0x00000801"),
        (struct.pack(">II", 0x803, 2), "truncated within its IDX header"),
        (struct.pack(">IIII", 0x803, 2, 3, 3) + bytes(17), "2x3x3 = 18 bytes.*only 17"),
        (struct.pack(">IIII", 0x803, 2, 3, 3) + bytes(19), "has more"),
        (struct.pack(">IIII", 0x803, 2**31, 2**31, 9), "absurd"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_bad_idx(tmp_path: Path, content: bytes, message: str, zipped: bool) -> None:
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(UserError, match=message):
        read_idx(path, 3)


def test_damaged_gzip(tmp_path: Path, rng: torch.Generator) -> None:
    whole = gzip.compress(idx(bytes_of((20, 6, 6), rng)))
    path = tmp_path / "images.gz"
    for cut in (12, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"images\.gz is a truncated gzip"):
            read_idx(path, 3)
    flipped = bytearray(whole)
    flipped[-6] ^= 255  # in the checksum
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="damaged gzip"):
        read_idx(path, 3)


def test_missing_files_say_what_goes_where(tmp_path: Path, rng: torch.Generator) -> None:
    where = re.escape(str(tmp_path / "mnist" / f"{IDX_FILES[0]}.gz"))
    with pytest.raises(UserError, match=f"needs the file {where}.*download=True"):
        load_images("mnist", tmp_path, normal_class=0)
    write_idx_set(tmp_path, rng)
    (tmp_path / f"{IDX_FILES[3]}.gz").unlink()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / IDX_FILES[3]))):
        load_images("mnist", tmp_path, normal_class=0)


def test_labels_that_do_not_fit(tmp_path: Path, rng: torch.Generator) -> None:
    write_idx_set(tmp_path, rng, zipped=False, train=50)
    labels = tmp_path / IDX_FILES[1]
    labels.write_bytes(idx(bytes_of((49,), rng, 10)))
    with pytest.raises(UserError, match=r"has 50 images, but .* has 49 labels"):
        load_images("mnist", tmp_path, normal_class=0)
    labels.write_bytes(idx(np.full(50, 10, dtype=np.uint8)))
    with pytest.raises(UserError, match="has the label 10, above 9"):
        load_images("mnist", tmp_path, normal_class=0)
    labels.write_bytes(idx(np.full(50, 4, dtype=np.uint8)))
    with pytest.raises(UserError, match="no normal training images"):
        load_images("mnist", tmp_path, normal_class=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar"}, "dataset must be one of digits, mnist.*'cifar'"),
        ({"normal_class": 10}, "no class 10; choose one of 0, 1,"),
        ({"normal_class": -1}, "no class -1"),
        ({"normal_class": None}, "choose the normal class"),
        ({"dataset": "mnist"}, "needs root"),
        ({"protocol": "other"}, "protocol must be one of paper, strict"),
        ({"seed": -1}, "seed must be"),
        ({"dataset": "fashion-mnist", "root": ".", "normal_class": "hat"}, "8 \\(bag\\)"),
        ({"dataset": "folder", "root": ".", "normal_class": 1}, "does not apply"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_images(**{"dataset": "digits", "normal_class": 0, **arguments})
    assert "\n" not in str(caught.value)


# Downloads ---------------------------------------------------------------------------------------


def test_download_checks_and_falls_back(
    tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_idx_set(good, rng)
    bad.mkdir()
    (bad / f"{IDX_FILES[1]}.gz").write_bytes(b"no labels")

    files = []
    for name in IDX_FILES:
        content = (good / f"{name}.gz").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files.append(download.RemoteFile(f"{name}.gz", len(content), digest))
    mirrors = (bad.as_uri() + "/", good.as_uri() + "/")
    known = image_sets._IDX_DATASETS["mnist"]
    described = image_sets._IdxDataset(
        known.class_names, known.folders, tuple(files), mirrors, known.labels_sha256
    )
    monkeypatch.setitem(image_sets._IDX_DATASETS, "mnist", described)
    data = load_images("mnist", tmp_path / "data", normal_class=0, download=True)
    assert torch.equal(data.train, load_images("mnist", good, normal_class=0).train)
    assert len(list((tmp_path / "data" / "mnist").iterdir())) == 4

    wrong = download.RemoteFile(files[0].name, files[0].size, "0" * 64)
    with pytest.raises(UserError, match=r"cannot download train-images.*SHA-256.*put it in") as e:
        download.fetch(wrong, mirrors, tmp_path / "wrong")
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "wrong").iterdir())


# Digits and real data ----------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    total = 0
    for normal_class in range(10):
        data = load_images("digits", normal_class=normal_class)
        images = int((target == normal_class).sum())
        assert int((~data.test_labels).sum()) == images // 5
        held_out = int((~data.validation_labels).sum())
        assert held_out == (images - images // 5) // 5
        assert len(data.train) == images - images // 5 - held_out
        assert data.train.shape[1:] == (1, 8, 8) and int(data.train.max()) == 255
        total += int((~data.test_labels).sum())
        assert not rows(data.train) & rows(data.test)
    assert total == len(data.test)


def test_real_mnist() -> None:
    root = data_folder("mnist")
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    for c in (0, 5, 9):
        data = load_images("mnist", root, normal_class=c)
        assert len(data.train) == counts[c] - 150
        assert data.validation_labels.sum() == 150 and len(data.validation) == 300
        assert int((~data.test_labels).sum()) == test_counts[c] and len(data.test) == 10000
    with pytest.raises(UserError, match="holds mnist, not fashion-mnist"):
        load_images("fashion-mnist", root, normal_class=0)


def test_real_fashion_mnist() -> None:
    root = data_folder("fashion-mnist")
    data = load_images("fashion-mnist", root.parent, normal_class="Ankle boot")
    assert data.name == "fashion-mnist[9]" and data.train.shape == (5850, 1, 28, 28)
    assert int((~data.test_labels).sum()) == 1000
    index = load_images("fashion-mnist", root, normal_class=9)
    assert torch.equal(index.train, data.train)


@pytest.mark.parametrize(
    ("name", "files"),
    [("mnist", download.MNIST_FILES), ("fashion-mnist", download.FASHION_MNIST_FILES)],
)
def test_official_checksums(
    name: str, files: tuple[download.RemoteFile, ...], tmp_path: Path
) -> None:
    mirror = data_folder(name).as_uri() + "/"
    for file in files:
        download.fetch(file, (mirror,), tmp_path)


def test_one_class_data_checks_counts() -> None:
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="test_labels must be a bool tensor of shape"):
        OneClassData("x", images, images, labels, images, labels[:2], ("a", "b", "c"))
    with pytest.raises(ValueError, match="2 test_names for 3"):
        OneClassData("x", images, images, labels, images, labels, ("a", "b"))
    with pytest.raises(ValueError, match="train must be a uint8"):
        OneClassData("x", images.float(), images, labels, images, labels, ("a", "b", "c"))
