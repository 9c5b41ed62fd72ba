"""Frames under the heatmaps of their scores."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastalps.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

# Frames are small: drawn larger, their text can be read.
SMALLEST_SIDE = 480
HEADER = 22
# In the files, to tell them from other pictures.
_MARK = ("Software", "fastalps-score")
FLAGGED, QUIET = (197, 48, 48), (90, 90, 90)


@dataclass(frozen=True)
class Frame:
    """A scored frame.

    Attributes:
        name: of its file, or its number.
        pixels: uint8 (H, W).
        heatmap: float32 (H, W), the patches' scores.
        score: of the frame.
        threshold: above which it is flagged.
        time: seconds since the first frame; None = unknown.
    """

    name: str
    pixels: Tensor
    heatmap: Tensor
    score: float
    threshold: float
    time: float | None = None

    @property
    def flagged(self) -> bool:
        return self.score > self.threshold


class WorstFrames:
    """The frames with the highest scores.

    Args:
        count: frames kept.
        spacing: of so many successive frames at most one is kept, so that one event does not fill
            all places.
    """

    def __init__(self, count: int, spacing: int = 1) -> None:
        self._count, self._spacing = count, spacing
        self._kept: list[tuple[float, int, Frame]] = []
        self._block = -1
        self._best: tuple[float, int, Frame] | None = None

    def offer(self, number: int, score: float, make: Callable[[], Frame]) -> None:
        """Offers frame `number`, counted from 0; `make` is called only if it is to be kept."""
        if number // self._spacing != self._block:
            self._close_block()
            self._block = number // self._spacing
        full = len(self._kept) == self._count
        if not self._count or (full and score <= self._kept[0][0]):
            return
        if self._best is None or score > self._best[0]:
            # Of equal scores the later number would win in the heap: the first frame shall.
            self._best = (score, -number, make())

    def _close_block(self) -> None:
        if self._best is not None:
            heapq.heappush(self._kept, self._best)
            if len(self._kept) > self._count:
                heapq.heappop(self._kept)
            self._best = None

    def frames(self) -> list[Frame]:
        """Those kept, the highest score first."""
        self._close_block()
        return [frame for _, _, frame in sorted(self._kept, key=lambda item: item[:2])[::-1]]


def overlay(frame: Frame) -> Image.Image:
    """The frame with its heatmap and a red border where it is flagged, an RGB picture.

    The heatmap is clear at 0 and full at twice the threshold, so that colours compare across
    frames. Small frames are enlarged by a whole factor.
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
    ImageDraw.Draw(picture).rectangle(
        (0, 0, picture.width - 1, picture.height - 1),
        outline=FLAGGED if frame.flagged else QUIET,
        width=4,
    )
    return picture


def titled_overlay(frame: Frame) -> Image.Image:
    """`overlay` below a line with name, score, threshold and whether it is flagged."""
    from PIL import Image, ImageDraw

    picture = overlay(frame)
    canvas = Image.new("RGB", (picture.width, picture.height + HEADER), (20, 20, 20))
    canvas.paste(picture, (0, HEADER))
    text = f"{frame.name}   score {frame.score:.5f}   threshold {frame.threshold:.5f}"
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 5), text + ("   FLAGGED" if frame.flagged else ""), fill=(255, 255, 255))
    return canvas


def draw_overlay(folder: Path, frame: Frame) -> None:
    """Writes `titled_overlay` as `<name>.png` into `folder`."""
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text(*_MARK)
    with atomic_path(folder / f"{Path(frame.name).stem}.png") as temporary:
        titled_overlay(frame).save(temporary, pnginfo=mark)


def is_overlay(path: Path) -> bool:
    """Whether `draw_overlay` wrote this file."""
    from PIL import Image

    key, value = _MARK
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get(key) == value
    # Whatever Pillow says of it, it is another's.
    except Exception:
        return False
