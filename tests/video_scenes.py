"""A street for tests: a static background, small slow walkers, and large fast intruders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.images import save

HEIGHT, WIDTH, FRAMES = 40, 60, 24
# Frames (from 1) in which the intruder is there.
INTRUSION = (9, 13)


def write_street(root: Path, rng: torch.Generator, train: int = 4, test: int = 2) -> Path:
    """A data set in the layout of UCSD Ped2, masks included; returns its folder."""
    base = root / "UCSDped2"
    background = torch.randint(90, 110, (HEIGHT, WIDTH), generator=rng).numpy().astype(np.uint8)
    for i in range(train):
        _write_clip(base / "Train" / f"Train{i + 1:03d}", background, rng, intruder=False)
    masks = {}
    for i in range(test):
        name = f"Test{i + 1:03d}"
        mask = _write_clip(base / "Test" / name, background, rng, intruder=True)
        masks[name] = np.packbits(mask, axis=2)
    np.savez_compressed(base / "gt_masks_packbits.npz", **masks)
    line = "TestVideoFile{{end+1}}.gt_frame = [{}:{}];\n".format(*INTRUSION)
    (base / "Test" / "UCSDped2.m").write_text("TestVideoFile = {};\n" + line * test)
    return base


def _write_clip(
    folder: Path, background: np.ndarray, rng: torch.Generator, intruder: bool
) -> np.ndarray:
    starts = torch.randint(0, WIDTH - 10, (4,), generator=rng).tolist()
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), dtype=bool)
    for t in range(FRAMES):
        frame = background.copy()
        for row, start in enumerate(starts):
            x = (start + 2 * t) % (WIDTH - 4)
            frame[2 + 10 * row : 8 + 10 * row, x : x + 4] = 200
        if intruder and INTRUSION[0] <= t + 1 <= INTRUSION[1]:
            x = 5 + 8 * (t + 1 - INTRUSION[0])
            stripes = np.arange(18)[:, None] % 4 < 2
            frame[10:28, x : x + 18] = np.where(stripes, 0, 255)
            mask[t, 10:28, x : x + 18] = True
        save(folder / f"{t + 1:03d}.png", frame)
    return mask
