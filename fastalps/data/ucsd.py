"""The UCSD pedestrian data sets (Ped1, Ped2) in their official layout.

Source: V. Mahadevan, W. Li, V. Bhalodia, N. Vasconcelos, Anomaly Detection in Crowded Scenes, CVPR
2010. Below the folder UCSDped1 or UCSDped2: `Train/TrainNNN` and `Test/TestNNN` hold the frames
001, 002, ... of a clip, `Test/UCSDpedK.m` the ranges of anomalous frames, `Test/TestNNN_gt` the
masks of anomalous pixels, for some clips only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastalps.data.cache import decoded_frames
from fastalps.data.containers import Clip
from fastalps.data.decode import worker_count
from fastalps.data.frames import read_frames
from fastalps.data.listing import require_folder, sub_folders
from fastalps.data.ucsd_masks import mask_source
from fastalps.errors import UserError

SUBSETS = ("ped1", "ped2")
SPLITS = ("train", "test")

_M_FILE_LIMIT = 1 << 20
_ENTRY = re.compile(r"TestVideoFile\s*\{\s*end\s*\+\s*1\s*\}\s*\.\s*gt_frame\s*=\s*\[([^\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,9})(?::([0-9]{1,9}))?")


def load_ucsd(
    root: str | os.PathLike[str],
    subset: str,
    split: str = "train",
    *,
    cache: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> list[Clip]:
    """Reads the clips of UCSD Ped1 or Ped2.

    Args:
        root: the folder UCSDped1 or UCSDped2, or the one that holds it.
        subset: "ped1" or "ped2".
        split: "train" (normal frames only) or "test".
        cache: folder where decoded frames and masks are kept, which makes the next read immediate;
            None = none is kept.
        workers: decoding threads; None = one for each CPU.

    Returns:
        the clips in their order: frames uint8 (T, H, W); labels bool (T,), all False in training;
        masks bool (T, H, W) for the test clips that have them, else None. Frames may be tif, jpg,
        png or bmp; masks `TestNNN_gt/*.bmp` or the member TestNNN of `gt_masks_packbits.npz`.

    Raises:
        UserError: a folder or label file is missing or malformed; labels or masks that do not fit
            the frames; a frame that is damaged, missing in the numbering or of another size.
    """
    if subset not in SUBSETS:
        raise UserError(f"subset must be one of {', '.join(SUBSETS)}, got {subset!r}")
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    threads = worker_count(workers)
    base = _base_folder(Path(root), subset)
    prefix = split.capitalize()
    parent = require_folder(base / prefix, f"clips ({prefix}001, {prefix}002, ...)")
    names = [name for name in sub_folders(parent) if re.fullmatch(rf"{prefix}[0-9]+", name)]
    if not names:
        raise UserError(f"no clips ({prefix}001, {prefix}002, ...) in the folder {parent}")
    ranges: Sequence[Sequence[tuple[int, int]]] = [()] * len(names)
    if split == "test":
        m_file = parent / f"UCSD{subset}.m"
        ranges = read_ranges(m_file)
        if len(ranges) != len(names):
            raise UserError(
                f"{m_file} labels {len(ranges)} clips, but {parent} has {len(names)}; "
                "complete the clips or the labels"
            )
    clips = []
    for name, clip_ranges in zip(names, ranges, strict=True):
        frames, files = read_frames(parent / name, cache=cache, workers=threads)
        _check_numbering(parent / name, files)
        labels = frame_labels(clip_ranges, len(frames), name)
        masks = (
            _read_masks(base, parent / name, frames, cache, threads) if split == "test" else None
        )
        clips.append(Clip(name, frames, labels, masks))
    return clips


def read_ranges(path: Path) -> list[list[tuple[int, int]]]:
    """The ranges (first, last) of anomalous frames, counted from 1, of each test clip.

    Reads `TestVideoFile{end+1}.gt_frame = [1:48, 152:180];`, one a clip. The file is matched, never
    run. Raises UserError when it is missing or has any other statement about gt_frame.
    """
    try:
        with open(path, encoding="latin-1") as file:
            text = file.read(_M_FILE_LIMIT)
    except OSError as error:
        raise UserError(
            f"cannot read the labels {path}: {error.strerror}; put the official file there"
        ) from error
    text = re.sub(r"%.*", "", text)
    entries = _ENTRY.findall(text)
    if not entries or len(entries) != text.count("gt_frame"):
        raise UserError(
            f"{path} is not a UCSD label file: expected one "
            "TestVideoFile{end+1}.gt_frame = [first:last, ...]; for each clip"
        )
    return [_parse_ranges(entry, f"clip {i} of {path}") for i, entry in enumerate(entries, 1)]


def frame_labels(ranges: Sequence[tuple[int, int]], frames: int, clip: str) -> Tensor:
    """bool (frames,), True within the ranges; raises UserError where one leaves the clip."""
    labels = torch.zeros(frames, dtype=torch.bool)
    for first, last in ranges:
        if last > frames:
            raise UserError(
                f"the labels of {clip} name frames {first} to {last}, but it has {frames} frames"
            )
        labels[first - 1 : last] = True
    return labels


def _parse_ranges(text: str, where: str) -> list[tuple[int, int]]:
    ranges = []
    for token in re.sub(r"\s*:\s*", ":", text).replace(",", " ").replace(";", " ").split():
        match = _RANGE.fullmatch(token)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"the label range {token!r} of {where} is not first:last, from 1 up")
        ranges.append((first, last))
    return ranges


def _base_folder(root: Path, subset: str) -> Path:
    name = f"UCSD{subset}"
    require_folder(root, name)
    for folder in (root / name, root / "UCSD_Anomaly_Dataset.v1p2" / name):
        if folder.is_dir():
            return folder
    other = next(f"UCSD{s}" for s in SUBSETS if s != subset)
    if root.resolve().name.lower() == other.lower() or (root / "Test" / f"{other}.m").exists():
        raise UserError(f"{root} is {other}, not {name}; give the folder {name}")
    if (root / "Train").is_dir() or (root / "Test").is_dir():
        return root
    raise UserError(f"{root} holds neither {name} nor its folders Train and Test")


def _check_numbering(folder: Path, files: Sequence[str]) -> None:
    # Labels count frames by number: one that is missing would shift all that follow.
    for expected, name in enumerate(files, 1):
        stem = Path(name).stem
        if not stem.isdecimal() or int(stem) != expected:
            raise UserError(
                f"{folder} has {name} where frame {expected:03d} was expected; "
                "its frames must be numbered 001, 002, ... without a gap"
            )


def _read_masks(
    base: Path,
    clip: Path,
    frames: Tensor,
    cache: str | os.PathLike[str] | None,
    workers: int,
) -> Tensor | None:
    shape = (frames.shape[0], frames.shape[1], frames.shape[2])
    source = mask_source(base, clip, shape, workers)
    if source is None:
        return None
    masks = decoded_frames(cache, clip, "masks", source.files, shape, source.decode)
    return masks.view(torch.bool)
