"""One's own images: a folder with normal and anomalous sub-folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastalps.data.containers import OneClassData
from fastalps.data.frames import decode_images
from fastalps.data.listing import list_images, require_folder, sub_folders
from fastalps.data.splits import (
    VALIDATION_PART,
    check_protocol,
    hold_out,
    random_state,
    validation_count,
)
from fastalps.errors import UserError

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

NORMAL_DEFAULTS = ("normal", "good", "train/normal", "train/good")
ANOMALOUS_DEFAULTS = ("abnormal", "anomalous", "bad")
NORMAL_TEST_DEFAULTS = ("test/normal", "test/good")
TEST_SHARE = 0.2


def load_folder(
    root: str | os.PathLike[str],
    *,
    normal_dir: Folders | None = None,
    anomalous_dir: Folders | None = None,
    normal_test_dir: Folders | None = None,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    protocol: str = "paper",
    seed: int = 0,
    workers: int | None = None,
) -> OneClassData:
    """A one-class task from image folders, laid out as for anomalib's `Folder`.

    Sub-folders are searched to any depth. Without `normal_test_dir` 20% of the normal images
    become test images. Then min(150, 20%) of the remaining normal images form validation. Under
    the protocol `paper` at most as many anomalous images, and at most 20% of them, join validation
    and leave the test set; under `strict` all anomalous images are test images. Training is the
    same for both protocols.

    Args:
        root: the folder that the others are relative to.
        normal_dir: one or several folders of normal images; None = the one of "normal", "good",
            "train/normal" and "train/good" that exists.
        anomalous_dir: as `normal_dir`; None = those of "abnormal", "anomalous", "bad" and the
            sub-folders of "test" (except "normal" and "good") that exist. There may be none under
            `strict`: the task can then be trained on, not evaluated.
        normal_test_dir: as `normal_dir`; None = "test/normal" or "test/good" if there.
        image_size: H = W, or (H, W), to resize to; None = as stored, then all must have one size.
        channels: 1 = gray, 3 = RGB; None = 1 if every image is stored as gray, else 3.
        protocol: "paper" or "strict".
        seed: of the draws, 0 to 2**32 - 1.
        workers: decoding threads; None = one for each CPU.

    Returns:
        OneClassData; test names are paths relative to `root`.

    Raises:
        UserError: a folder is missing, empty or both normal and anomalous; too few images; a
            damaged image; images of different sizes and no `image_size`; more than half of the
            machine's memory holds.
    """
    check_protocol(protocol)
    generator = random_state(seed)
    base = require_folder(root, "normal and anomalous sub-folders")
    normal = _images(_folders(base, normal_dir, "normal_dir", _find_normal))
    anomalous = _images(_folders(base, anomalous_dir, "anomalous_dir", _find_anomalous))
    test = _images(_folders(base, normal_test_dir, "normal_test_dir", _find_normal_test))
    _check_disjoint(("normal", normal), ("anomalous", anomalous))
    _check_disjoint(("normal test", test), ("anomalous", anomalous))
    _check_disjoint(("normal training", normal), ("normal test", test))
    if protocol == "paper" and len(anomalous) < 2:
        raise UserError(
            f"{base} has {len(anomalous)} anomalous images, the protocol paper validates and tests "
            "with some; name their folder (anomalous_dir) or choose the protocol strict"
        )

    paths = normal + test + anomalous
    # Below they are copied into the parts of the task.
    images = decode_images(paths, image_size, channels, workers, copies=2)
    train = np.arange(len(normal))
    normal_test = len(normal) + np.arange(len(test))
    anomalies = len(normal) + len(test) + np.arange(len(anomalous))
    if not test:
        train, normal_test = hold_out(train, round(len(train) * TEST_SHARE), generator)
    count = validation_count(len(train))
    train, validation = hold_out(train, count, generator)
    if not (len(train) and len(validation) and len(normal_test)):
        raise UserError(
            f"{base} has {len(normal)} normal images; training, validation and test need at least 3"
        )
    held_out = np.empty(0, dtype=np.int64)
    if protocol == "paper":
        share = max(1, len(anomalies) // VALIDATION_PART)
        anomalies, held_out = hold_out(anomalies, min(count, share), generator)

    chosen = np.concatenate([normal_test, anomalies])
    return OneClassData(
        name=f"folder[{base.resolve().name}]",
        train=images[torch.from_numpy(train)],
        validation=images[torch.from_numpy(np.concatenate([validation, held_out]))],
        validation_labels=torch.arange(len(validation) + len(held_out)) >= len(validation),
        test=images[torch.from_numpy(chosen)],
        test_labels=torch.arange(len(chosen)) >= len(normal_test),
        test_names=tuple(_relative(paths[i], base) for i in chosen),
    )


def _find_normal(base: Path) -> list[Path]:
    found = [base / name for name in NORMAL_DEFAULTS if (base / name).is_dir()]
    if not found:
        there = ", ".join(sub_folders(base)[:10]) or "none"
        raise UserError(
            f"{base} has none of the sub-folders {', '.join(NORMAL_DEFAULTS)} (there: {there}); "
            "name the folder of normal images (normal_dir)"
        )
    if len(found) > 1:
        raise UserError(
            f"{found[0]} and {found[1]} both look like the normal images; "
            "name the right one (normal_dir)"
        )
    return found


def _find_anomalous(base: Path) -> list[Path]:
    found = [base / name for name in ANOMALOUS_DEFAULTS if (base / name).is_dir()]
    if (base / "test").is_dir():
        names = [f"test/{name}" for name in sub_folders(base / "test")]
        found += [base / name for name in names if name not in NORMAL_TEST_DEFAULTS]
    return found


def _find_normal_test(base: Path) -> list[Path]:
    return [base / name for name in NORMAL_TEST_DEFAULTS if (base / name).is_dir()]


def _folders(
    base: Path, given: Folders | None, argument: str, find: Callable[[Path], list[Path]]
) -> list[Path]:
    if given is None:
        return find(base)
    names = [given] if isinstance(given, (str, os.PathLike)) else list(given)
    folders = [base / name for name in names]
    for folder in folders:
        if not folder.is_dir():
            there = ", ".join(sub_folders(base)[:10]) or "none"
            raise UserError(
                f"{argument}: the folder {folder} does not exist (sub-folders there: {there})"
            )
    return folders


def _images(folders: Sequence[Path]) -> list[Path]:
    return [path for folder in folders for path in list_images(folder, recursive=True)]


def _check_disjoint(one: tuple[str, list[Path]], other: tuple[str, list[Path]]) -> None:
    known = {path.resolve() for path in one[1]}
    for path in other[1]:
        if path.resolve() in known:
            raise UserError(
                f"{path} is in both the {one[0]} and the {other[0]} folders; keep them apart"
            )


def _relative(path: Path, base: Path) -> str:
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
