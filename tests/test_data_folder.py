"""Folders of images: layouts, sizes, channels, bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalps.data import load_folder, load_images, read_images
from fastalps.errors import UserError
from tests.images import bytes_of, rows, save, save_many


def test_default_layout(tmp_path: Path, rng: torch.Generator) -> None:
    save_many(tmp_path / "good", 20, rng)
    save_many(tmp_path / "bad" / "deep", 10, rng)
    (tmp_path / "bad" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "good" / "._1.png").write_bytes(b"x")
    data = load_images("folder", tmp_path)
    # 20% of 20 normal images to test, 20% of the other 16 to validation; 20% of 10 anomalous.
    assert (len(data.train), len(data.validation), len(data.test)) == (13, 3 + 2, 4 + 8)
    assert data.validation_labels.sum() == 2 and data.test_labels.sum() == 8
    assert data.train.shape[1:] == (1, 8, 9)
    for name, label in zip(data.test_names, data.test_labels, strict=True):
        assert name.startswith("bad/deep/" if label else "good/")
    parts = [rows(data.train), rows(data.validation), rows(data.test)]
    assert len(set.union(*parts)) == 30

    strict = load_folder(tmp_path, protocol="strict")
    assert torch.equal(strict.train, data.train)
    assert strict.test_labels.sum() == 10 and not strict.validation_labels.any()


def test_train_test_layout(tmp_path: Path, rng: torch.Generator) -> None:
    save_many(tmp_path / "train" / "good", 10, rng)
    save_many(tmp_path / "test" / "good", 3, rng)
    save_many(tmp_path / "test" / "crack", 4, rng)
    save_many(tmp_path / "test" / "hole", 5, rng)
    save_many(tmp_path / "ground_truth" / "hole", 5, rng)
    data = load_folder(tmp_path, protocol="strict")
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 12)
    assert data.test_labels.sum() == 9
    assert sum(name.startswith("test/good/") for name in data.test_names) == 3


def test_named_folders(tmp_path: Path, rng: torch.Generator) -> None:
    save_many(tmp_path / "a", 6, rng)
    save_many(tmp_path / "b", 4, rng)
    save_many(tmp_path / "c", 3, rng)
    data = load_folder(tmp_path, normal_dir=["a", "b"], anomalous_dir=tmp_path / "c")
    assert len(data.train) + int((~data.validation_labels).sum()) == 8
    assert data.test_labels.sum() == 2
    only_normal = load_folder(tmp_path, normal_dir="a", protocol="strict")
    assert not only_normal.test_labels.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"none of the sub-folders normal, good.*there: a, b, empty.*normal_dir"),
        ({"normal_dir": "none"}, "normal_dir: the folder .*none does not exist"),
        ({"normal_dir": "a", "anomalous_dir": "empty"}, "no images .* in the folder .*empty"),
        ({"normal_dir": "a"}, "0 anomalous images.*anomalous_dir.*strict"),
        ({"normal_dir": ".", "anomalous_dir": "b"}, "both the normal and the anomalous"),
        (
            {"normal_dir": "b", "anomalous_dir": "a"},
            "1 normal images; training, validation and test need",
        ),
        ({"normal_dir": "a", "anomalous_dir": "b", "protocol": "x"}, "protocol must be"),
        ({"normal_dir": "a", "protocol": "strict", "image_size": 0}, "image size must be"),
        ({"normal_dir": "a", "protocol": "strict", "channels": 2}, "channels must be 1"),
        ({"normal_dir": "a", "protocol": "strict", "workers": 0}, "workers must be"),
    ],
)
def test_bad_folders(tmp_path: Path, rng: torch.Generator, arguments: dict, message: str) -> None:
    save_many(tmp_path / "a", 5, rng)
    save_many(tmp_path / "b", 1, rng)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        load_folder(tmp_path, **arguments)
    assert "\n" not in str(caught.value)


def test_ambiguous_or_missing_root(tmp_path: Path, rng: torch.Generator) -> None:
    save_many(tmp_path / "good", 5, rng)
    save_many(tmp_path / "normal", 5, rng)
    with pytest.raises(UserError, match="both look like the normal images"):
        load_folder(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_images(tmp_path / "nowhere")


def test_sizes_and_channels(tmp_path: Path, rng: torch.Generator) -> None:
    gray = bytes_of((6, 10), rng)
    color = bytes_of((6, 10, 3), rng)
    save(tmp_path / "image2.png", gray)
    save(tmp_path / "image10.png", color)
    images, names = read_images(tmp_path)
    assert names == ("image2.png", "image10.png") and images.shape == (2, 3, 6, 10)
    assert images.is_contiguous()
    np.testing.assert_array_equal(images[1].permute(1, 2, 0).numpy(), color)
    np.testing.assert_array_equal(images[0].numpy(), np.stack([gray] * 3))
    assert read_images(tmp_path, channels=1)[0].shape == (2, 1, 6, 10)
    one, name = read_images(tmp_path / "image2.png")
    assert name == ("image2.png",) and one.shape == (1, 1, 6, 10)

    save(tmp_path / "large.png", bytes_of((12, 20), rng))
    with pytest.raises(UserError, match=r"image2\.png is 6x10, .*large\.png is 12x20.*image size"):
        read_images(tmp_path, channels=1)
    assert read_images(tmp_path, size=(5, 4))[0].shape == (3, 3, 5, 4)
    assert read_images(tmp_path, size=7, channels=1, workers=3)[0].shape == (3, 1, 7, 7)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "jpg", "webp", "pgm"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    ramp = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8), (16, 48)).copy()
    save(tmp_path / f"x.{suffix.upper()}", ramp)
    images, _ = read_images(tmp_path, channels=1)
    difference = np.abs(images[0, 0].numpy().astype(int) - ramp)
    assert difference.max() <= (0 if suffix in ("png", "bmp", "tif", "pgm") else 4)


def test_pixel_kinds(tmp_path: Path, rng: torch.Generator) -> None:
    wide = torch.randint(2**16, (5, 6), generator=rng).numpy().astype(np.uint16)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.tif", wide)
    bits = bytes_of((5, 6), rng, 2).astype(bool)
    Image.fromarray(bits).save(tmp_path / "c.png")
    images, _ = read_images(tmp_path)
    expected = np.round(wide.astype(np.float64) / 257).astype(np.uint8)
    np.testing.assert_array_equal(images[0, 0].numpy(), expected)
    np.testing.assert_array_equal(images[1, 0].numpy(), expected)
    np.testing.assert_array_equal(images[2, 0].numpy(), bits * np.uint8(255))
    save(tmp_path / "d.tif", np.ones((5, 6), dtype=np.float32))
    with pytest.raises(UserError, match=r"d\.tif has 32-bit pixels"):
        read_images(tmp_path)


def test_too_little_memory_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    save(tmp_path / "a.png", np.zeros((8, 8), dtype=np.uint8))
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match=r"a\.png takes more memory than there is"):
        read_images(tmp_path, channels=3)


@pytest.mark.parametrize("maximum", [65535, 4095])
def test_16_bit_pgm(tmp_path: Path, rng: torch.Generator, maximum: int) -> None:
    wide = torch.randint(maximum + 1, (5, 6), generator=rng).numpy()
    pixels = wide.astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(f"P5 6 5 {maximum}\n".encode() + pixels)
    found = read_images(tmp_path)[0][0, 0].numpy()
    # Pillow rounds to 16 bits before that.
    assert np.abs(found - wide * (255 / maximum)).max() <= 0.51


def test_gray_of_a_color_jpeg_is_its_luma(tmp_path: Path, rng: torch.Generator) -> None:
    # Muted colours: none is clipped on its way to RGB, so luma and the gray of that RGB differ by
    # two roundings, each of at most one half.
    muted = 96 + bytes_of((4, 4, 3), rng) // 4
    color = muted.repeat(8, axis=0).repeat(8, axis=1)
    path = tmp_path / "x.jpg"
    Image.fromarray(color).save(path, quality=95)
    gray = read_images(path, channels=1)[0][0, 0].numpy().astype(int)
    whole = np.asarray(Image.open(path).convert("L")).astype(int)
    assert np.abs(gray - whole).max() <= 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "bmp"])
def test_truncated_image(tmp_path: Path, rng: torch.Generator, suffix: str) -> None:
    path = save(tmp_path / f"cut.{suffix}", bytes_of((40, 50), rng))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"cut\.{suffix}.*(damaged|truncated)") as caught:
            read_images(tmp_path, size=20, channels=1)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [300, 500])
def test_bomb_guard(
    tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    save(tmp_path / "huge.png", bytes_of((25, 30), rng))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"huge\.png has more pixels"):
        read_images(tmp_path)
