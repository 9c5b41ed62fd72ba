"""Videos of what moves before a still background, and runs that score them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import fastalps
from fastalps import Scorer
from fastalps.data import motion_frames, still_background
from fastalps.gate import MotionGate
from tests.images import save

HEIGHT, WIDTH, FRAMES, RATE = 40, 60, 24, 10
# Of the models.
PATCH = 10
# Frames (from 1) in which the intruder of a street is there.
INTRUSION = (9, 13)


def scene(count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A square that crosses a still background: uint8 (count, height, width)."""
    random = np.random.default_rng(3)
    background = random.integers(90, 110, (height // 4, width // 4), dtype=np.uint8)
    background = background.repeat(4, 0).repeat(4, 1)
    frames = np.repeat(background[None], count, 0)
    for t in range(count):
        x = 3 * t % (width - 12)
        frames[t, 12:24, x : x + 12] = 220
    return frames


def write(path: Path, frames: np.ndarray, codec: str = "ffv1", rate: int = RATE) -> Path:
    """Writes gray frames as a video; ffv1 loses nothing."""
    import av  # Not everywhere: the tests that need it are skipped then.

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = {"ffv1": "gray", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="gray")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def run_on(folder: Path, frames: np.ndarray, motion: bool = False) -> Path:
    """A run whose threshold was set on these frames; no training: its scores mean nothing."""
    torch.manual_seed(0)
    model = fastalps.ALPS(PATCH, 1, "fast", latent=4)
    pixels = torch.from_numpy(frames)
    background = None
    if motion:
        pixels = motion_frames(pixels)
        background = still_background((HEIGHT, WIDTH))
    scorer = Scorer(model, gate=MotionGate(2.0, background))
    calibration = scorer.calibrate(pixels, 0.2, level="frame")
    calibration.settings["frames"] = "motion" if motion else "gray"
    folder.mkdir(parents=True, exist_ok=True)
    fastalps.save(model, folder / "model.safetensors", calibration)
    return folder


def run_on_images(folder: Path) -> Path:
    """As `run_on`, on images of the size of a patch."""
    torch.manual_seed(1)
    model = fastalps.ALPS(PATCH, 1, "fast", latent=4)
    calibration = Scorer(model).calibrate(torch.rand(30, 1, PATCH, PATCH), 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    fastalps.save(model, folder / "model.safetensors", calibration)
    return folder


def write_street(root: Path, rng: torch.Generator, train: int = 4, test: int = 2) -> Path:
    """A street with small slow walkers, and large fast intruders.

    It is a data set in the layout of UCSD Ped2, masks included; returns its folder.
    """
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
