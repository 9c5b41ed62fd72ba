"""Frames under the heatmaps of their scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fastalps.files import atomic_path

# Frames are small: drawn larger, their text can be read.
SMALLEST_SIDE = 480
FLAGGED, QUIET = (197, 48, 48), (90, 90, 90)


@dataclass(frozen=True)
class Frame:
    """A scored frame.

    Attributes:
        name: of its file.
        pixels: uint8 (H, W).
        heatmap: float32 (H, W), the patches' scores.
        score: of the frame.
        threshold: above which it is flagged.
    """

    name: str
    pixels: Tensor
    heatmap: Tensor
    score: float
    threshold: float


def draw_overlay(folder: Path, frame: Frame) -> None:
    """Writes the frame with its heatmap as `<name>.png` into `folder`.

    The heatmap is clear at 0 and full at twice the threshold, so that colours compare across
    frames; a red border says that the frame is flagged.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    gray = frame.pixels.cpu().numpy().astype(np.float32)[..., None]
    scale = 2 * frame.threshold if frame.threshold > 0 else float(frame.heatmap.max()) or 1.0
    heat = np.clip(frame.heatmap.numpy() / scale, 0, 1)
    colours = colormaps["inferno"](heat)[..., :3].astype(np.float32) * 255
    weight = 0.65 * heat[..., None]
    blended = ((1 - weight) * gray + weight * colours).round().astype(np.uint8)
    height, width = heat.shape
    zoom = max(1, -(-SMALLEST_SIDE // min(height, width)))
    picture = Image.fromarray(blended).resize(
        (width * zoom, height * zoom), Image.Resampling.NEAREST
    )
    canvas = Image.new("RGB", (picture.width, picture.height + 22), (20, 20, 20))
    canvas.paste(picture, (0, 22))
    flagged = frame.score > frame.threshold
    text = f"{frame.name}   score {frame.score:.5f}   threshold {frame.threshold:.5f}"
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 5), text + ("   FLAGGED" if flagged else ""), fill=(255, 255, 255))
    draw.rectangle(
        (0, 22, canvas.width - 1, canvas.height - 1),
        outline=FLAGGED if flagged else QUIET,
        width=4,
    )
    with atomic_path(folder / f"{Path(frame.name).stem}.png") as temporary:
        canvas.save(temporary)
