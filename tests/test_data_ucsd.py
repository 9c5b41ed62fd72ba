"""UCSD Ped1 and Ped2: layout, labels, masks."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalps.data import Clip, load_ucsd
from fastalps.errors import UserError
from tests.conftest import data_folder
from tests.images import HEIGHT, WIDTH, bytes_of, save, write_frames

M_FILE = """TestVideoFile = {};
% a comment on gt_frame
TestVideoFile{end+1}.gt_frame = [3:5];
TestVideoFile{end+1}.gt_frame = [1:2, 4 : 4,6];
TestVideoFile{end+1}.gt_frame = [];
"""


def write_ucsd(root: Path, rng: torch.Generator, subset: str = "ped2") -> Path:
    base = root / f"UCSD{subset}"
    for i in (1, 2):
        write_frames(base / "Train" / f"Train{i:03d}", 5, rng)
    for i in (1, 2, 3):
        write_frames(base / "Test" / f"Test{i:03d}", 6, rng)
    (base / "Test" / f"UCSD{subset}.m").write_text(M_FILE)
    (base / "Test" / "Test001" / ".DS_Store").write_bytes(b"x")
    (base / "Test" / "Test001" / "._001.tif").write_bytes(b"x")
    return base


def write_masks(base: Path, rng: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Clip 1 as bitmaps named frameNNN, clips 1 and 2 packed; clip 3 has none."""
    first, second = bytes_of((2, 6, HEIGHT, WIDTH), rng, 2)
    for i, mask in enumerate(first, 1):
        save(base / "Test" / "Test001_gt" / f"frame{i:03d}.bmp", mask * np.uint8(255))
    packed = {"Test002": np.packbits(second, axis=2), "Test001": np.packbits(first * 0, axis=2)}
    np.savez_compressed(base / "gt_masks_packbits.npz", **packed)
    return first, second


@pytest.mark.parametrize("subset", ["ped1", "ped2"])
@pytest.mark.parametrize("cached", [True, False])
def test_layout(tmp_path: Path, rng: torch.Generator, subset: str, cached: bool) -> None:
    base = write_ucsd(tmp_path, rng, subset)
    first, second = write_masks(base, rng)
    cache = tmp_path / "cache" if cached else None
    for root in (tmp_path, base, tmp_path):
        train = load_ucsd(root, subset, "train", cache=cache)
        assert [clip.name for clip in train] == ["Train001", "Train002"]
        assert all(not clip.labels.any() and clip.masks is None for clip in train)
        test = load_ucsd(root, subset, "test", cache=cache, workers=2)
        assert [clip.name for clip in test] == ["Test001", "Test002", "Test003"]
        assert all(clip.frames.shape == (6, HEIGHT, WIDTH) for clip in test)
        assert test[0].labels.tolist() == [False, False, True, True, True, False]
        assert test[1].labels.tolist() == [True, True, False, True, False, True]
        assert not test[2].labels.any()
        np.testing.assert_array_equal(test[0].masks.numpy(), first.astype(bool))
        np.testing.assert_array_equal(test[1].masks.numpy(), second.astype(bool))
        assert test[0].masks.dtype == torch.bool and test[2].masks is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (M_FILE.replace("3:5", "3:7"), "Test001 name frames 3 to 7, but it has 6 frames"),
        (M_FILE.replace("3:5", "0:5"), "'0:5' of clip 1 .*not first:last"),
        (M_FILE.replace("3:5", "5:3"), "'5:3' of clip 1"),
        (M_FILE.replace("3:5", "1:2:5"), "'1:2:5'"),
        (M_FILE.replace("3:5", "delete('x')"), "delete"),
        (M_FILE.replace("[3:5]", "f(3)"), "is not a UCSD label file"),
        ("", "is not a UCSD label file"),
        (M_FILE + "TestVideoFile{end+1}.gt_frame = [1:2];", "labels 4 clips, but .* has 3"),
        (None, "cannot read the labels .*put the official file there"),
    ],
)
def test_bad_labels(tmp_path: Path, rng: torch.Generator, labels: str | None, message: str) -> None:
    path = write_ucsd(tmp_path, rng) / "Test" / "UCSDped2.m"
    if labels is None:
        path.unlink()
    else:
        path.write_text(labels)
    with pytest.raises(UserError, match=message) as caught:
        load_ucsd(tmp_path, "ped2", "test")
    assert "\n" not in str(caught.value)
    assert len(load_ucsd(tmp_path, "ped2", "train")) == 2


def test_bad_layout(tmp_path: Path, rng: torch.Generator) -> None:
    with pytest.raises(UserError, match="holds neither UCSDped2 nor"):
        load_ucsd(tmp_path, "ped2")
    base = write_ucsd(tmp_path, rng)
    with pytest.raises(UserError, match="is UCSDped2, not UCSDped1"):
        load_ucsd(base, "ped1")
    for arguments, message in ((("ped3",), "subset must be"), (("ped2", "all"), "split must be")):
        with pytest.raises(UserError, match=message):
            load_ucsd(base, *arguments)
    (base / "Test" / "Test002" / "003.tif").unlink()
    with pytest.raises(UserError, match=r"has 004\.tif where frame 003 was expected"):
        load_ucsd(base, "ped2", "test")
    save(base / "Test" / "Test002" / "003.tif", bytes_of((HEIGHT + 2, WIDTH), rng))
    with pytest.raises(UserError, match=r"Test002/003\.tif is 11x13, but .*001\.tif is 9x13"):
        load_ucsd(base, "ped2", "test")
    (base / "Train").rename(base / "Learn")
    with pytest.raises(UserError, match="Train does not exist"):
        load_ucsd(base, "ped2", "train")
    (base / "Train").mkdir()
    with pytest.raises(UserError, match="no clips"):
        load_ucsd(base, "ped2", "train")


def test_bad_bitmaps(tmp_path: Path, rng: torch.Generator) -> None:
    base = write_ucsd(tmp_path, rng)
    write_masks(base, rng)
    folder = base / "Test" / "Test001_gt"
    save(folder / "frame002.bmp", bytes_of((HEIGHT, WIDTH + 1), rng))
    with pytest.raises(UserError, match=r"mask .*frame002\.bmp is 9x14, but its frame is 9x13"):
        load_ucsd(base, "ped2", "test")
    (folder / "frame002.bmp").rename(folder / "frame009.bmp")
    with pytest.raises(UserError, match=r"frame003\.bmp where mask 002 was expected"):
        load_ucsd(base, "ped2", "test")
    (folder / "frame009.bmp").unlink()
    with pytest.raises(UserError, match="5 masks for 6 frames"):
        load_ucsd(base, "ped2", "test")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header_only(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (header_only((10**9, 10**9, 2)), "Test002 must be uint8"),
        (header_only((6, HEIGHT, 2)) + bytes(6 * HEIGHT * 2 - 1), "is truncated"),
        (header_only((6, HEIGHT, 2)) + bytes(10**7), "longer than its header says"),
        (npy(np.zeros((6, HEIGHT, 2), dtype=np.float32)), "must be uint8"),
        (npy(np.array([{"a": 1}], dtype=object)), "must be uint8"),
        (npy(np.zeros((5, HEIGHT, 2), dtype=np.uint8)), r"must be uint8 \(6, 9, 2\)"),
        (b"not an array", "not a plain .npy array"),
    ],
)
def test_bad_packed_masks(
    tmp_path: Path, rng: torch.Generator, member: bytes, message: str
) -> None:
    base = write_ucsd(tmp_path, rng)
    with zipfile.ZipFile(
        base / "gt_masks_packbits.npz", "w", compression=zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr("Test002.npy", member)
    with pytest.raises(UserError, match=message):
        load_ucsd(base, "ped2", "test", cache=tmp_path / "cache")


def test_damaged_archive(tmp_path: Path, rng: torch.Generator) -> None:
    base = write_ucsd(tmp_path, rng)
    write_masks(base, rng)
    path = base / "gt_masks_packbits.npz"
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        load_ucsd(base, "ped2", "test")
    whole[150] ^= 255
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"Test002 is (damaged|truncated)"):
        load_ucsd(base, "ped2", "test")


def test_clip_checks_its_parts(rng: torch.Generator) -> None:
    frames = torch.from_numpy(bytes_of((4, 5, 6), rng))
    with pytest.raises(ValueError, match=r"labels must be a bool tensor of shape \(4,\)"):
        Clip("x", frames, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="masks must be"):
        Clip("x", frames, None, torch.zeros(4, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="frames must be a uint8"):
        Clip("x", frames.float())


def test_real_ped2(tmp_path: Path) -> None:
    root = data_folder("UCSDped2")
    train = load_ucsd(root.parent, "ped2", "train")
    assert len(train) == 16 and sum(len(clip.frames) for clip in train) == 2550
    test = load_ucsd(root, "ped2", "test", cache=tmp_path)
    assert len(test) == 12 and sum(len(clip.frames) for clip in test) == 2010
    assert sum(int(clip.labels.sum()) for clip in test) == 1648
    wholly = [clip.name for clip in test if clip.labels.all()]
    assert wholly == ["Test008", "Test009", "Test010", "Test011"]
    for clip in test:
        assert clip.frames.shape[1:] == (240, 360)
        assert torch.equal(clip.masks.any(dim=2).any(dim=1), clip.labels)
    again = load_ucsd(root, "ped2", "test", cache=tmp_path)
    assert torch.equal(again[5].frames, test[5].frames)
