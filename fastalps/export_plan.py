"""What is exported and what its scores are compared with, whatever the format of the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastalps
from fastalps import ops
from fastalps.errors import UserError
from fastalps.export_networks import FrameGraph, ImageGraph
from fastalps.gate import MotionGate
from fastalps.inputs import by, pair
from fastalps.memory import check_memory
from fastalps.models import ALPS, check_kind

FORMAT = "fastalps-export"
VERSION = "1"
PIXELS = {"uint8": torch.uint8, "float32": torch.float32}
# How far a file's scores may be from the model's, relative to them.
TOLERANCE = 1e-5
# That a file is compared on at a time.
MOST_ITEMS = 3


class Plan:
    """One export: the arguments checked, the graph, and what the file is compared with.

    Arguments and errors as for `fastalps.export.export_onnx`.

    Attributes:
        graph: the network that the file holds.
        output: the name of its output.
    """

    def __init__(
        self,
        model: ALPS,
        frame_size: int | Sequence[int] | None,
        stride: int | Sequence[int] | None,
        edge: str | None,
        score: str | None,
        pixels: str,
        gate: bool,
    ) -> None:
        if not isinstance(model, ALPS):
            raise TypeError(f"model must be an ALPS, got {type(model).__name__}; fastalps.load one")
        calibration = model.calibration
        settings = {} if calibration is None else calibration.settings
        if score is None:
            score = "average" if calibration is None else calibration.score
        check_kind("score", score)
        if pixels not in PIXELS:
            raise ValueError(f"pixels must be one of {', '.join(PIXELS)}, got {pixels!r}")
        if model.config.perturbation == "noise" and score != "normal":
            raise UserError(
                f"the {score} score of a model with perturbation noise is drawn at random, which "
                "no file can repeat; export its normal score"
            )
        self.model = model
        self.score = score
        self.pixels = pixels
        self.frame_size = None if frame_size is None else pair(frame_size, "frame_size")
        self.output = "scores" if frame_size is None else "patch_scores"
        self.gate_threshold: float | None = None
        if self.frame_size is None:
            for name, value in (("stride", stride), ("edge", edge), ("gate", gate or None)):
                if value is not None:
                    raise ValueError(f"{name} is for whole frames, give their frame_size, too")
            self.graph = ImageGraph(model, score, PIXELS[pixels])
            return
        stored = settings.get("stride")
        self.patch = pair(model.config.image_size)
        self.stride = pair(stride if stride is not None else stored or self.patch)
        self.edge = edge or settings.get("edge", "cover")
        self._check_memory()
        self.grid = ops.patch_grid(self.frame_size, self.patch, self.stride, self.edge)
        if gate:
            self.gate_threshold = settings.get("gate_threshold")
            if self.gate_threshold is None:
                raise ValueError(
                    "gate needs a model that was calibrated with a motion gate, this one was not; "
                    "leave gate out"
                )
            if pixels != "uint8" or model.config.channels != 1:
                raise ValueError(
                    "gate works on uint8 frames of one channel, got "
                    f"{pixels} and {model.config.channels} channel(s)"
                )
        self.graph = FrameGraph(model, score, PIXELS[pixels], *self.grid, self.gate_threshold)

    def _check_memory(self) -> None:
        """Raises UserError for frames whose patches the comparison with the model cannot hold."""
        assert self.frame_size is not None
        sizes = zip(self.frame_size, self.patch, self.stride, strict=True)
        # At the least; of a stride that is none, `patch_grid` tells more.
        patches = math.prod(max(0, size - patch) // max(1, step) + 1 for size, patch, step in sizes)
        pixels = patches * math.prod(self.patch) * self.model.config.channels
        check_memory(
            f"the patches of {MOST_ITEMS} frames of {by(self.frame_size)} take",
            MOST_ITEMS * pixels * torch.float32.itemsize,
            "give a smaller frame_size or a larger stride",
        )

    def example(self, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of `count` items with random pixels, by name."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.model.config.channels
        if self.frame_size is None:
            height, width = self.model.config.image_size
            return {"images": self._random((count, channels, height, width), generator)}
        planes = (channels,) if channels > 1 else ()
        frames = self._random((count, *planes, *self.frame_size), generator)
        if self.gate_threshold is None:
            return {"frames": frames}
        # Half of the picture stands still.
        background = frames[0].clone()
        half = self.frame_size[1] // 2
        frames[:, :, :half] = background[:, :half]
        background[:, half:] = self._random(tuple(background[:, half:].shape), generator)
        return {"frames": frames, "background": background}

    def _random(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return values if self.pixels == "uint8" else values / 255

    def program(self) -> torch.export.ExportedProgram:
        """The graph, captured with a dynamic number of items."""
        example = self.example()
        batch = {0: torch.export.Dim("batch", min=1)}
        shapes = {name: {} if name == "background" else batch for name in example}
        with torch.no_grad():
            program = torch.export.export(
                self.graph, tuple(example.values()), dynamic_shapes=shapes
            )
        for node in program.graph.nodes:
            # Traces of the stack tell whoever gets the file about this machine's folders.
            node.meta.pop("stack_trace", None)
            node.meta.pop("nn_module_stack", None)
        return program

    @torch.no_grad()
    def expected(self, inputs: dict[str, Tensor]) -> Tensor:
        """The scores of the model itself, by the ops that scoring uses."""
        device = next(self.model.parameters()).device
        pixels = next(iter(inputs.values()))
        scale = 1 / 255 if self.pixels == "uint8" else 1.0
        if self.frame_size is None:
            images = pixels.to(torch.float32) * scale
        else:
            cut = (self.patch, self.stride)
            images = ops.tile_patches(pixels, *cut, edge=self.edge, scale=scale).flatten(0, 1)
        scores = getattr(self.model.score(images.to(device)), self.score).cpu()
        if self.frame_size is None:
            return scores
        scores = scores.reshape(len(pixels), -1)
        if self.gate_threshold is None:
            return scores
        gate = MotionGate(self.gate_threshold, inputs["background"])
        kept = gate.kept(pixels, self.patch, self.stride, self.edge)
        return scores.where(kept, 0.0)

    def compare(self, run: Callable[[dict[str, Tensor]], Tensor]) -> float:
        """The largest relative difference of what `run` gives; UserError above `TOLERANCE`."""
        worst = 0.0
        for count in (1, MOST_ITEMS):
            inputs = self.example(count, seed=count)
            expected, found = self.expected(inputs).double(), run(inputs).double()
            if expected.shape != found.shape or not torch.isfinite(found).all():
                worst = float("inf")
                break
            difference = (found - expected).abs() / expected.abs().clamp(min=1e-12)
            worst = max(worst, float(difference.max()))
        if worst > TOLERANCE:
            raise UserError(
                f"the file's scores differ from the model's by a relative {worst:.2g}, more than "
                f"{TOLERANCE:g}: nothing was written; try another version of torch"
            )
        return worst

    def metadata(self) -> dict[str, str]:
        """What whoever has only the file needs to know; lists as JSON."""
        config, calibration = self.model.config, self.model.calibration
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "fastalps": fastalps.__version__,
            "image_size": list(config.image_size),
            "channels": config.channels,
            "pixels": self.pixels,
            "pixels_mean": self._about_pixels(),
            "score": self.score,
        }
        if self.frame_size is not None:
            values |= {
                "frame_size": list(self.frame_size),
                "stride": list(self.stride),
                "edge": self.edge,
                "patch_rows": len(self.grid[0]),
                "patch_columns": len(self.grid[1]),
            }
        if self.gate_threshold is not None:
            values["gate_threshold"] = self.gate_threshold
        if calibration is not None and calibration.score == self.score:
            settings = calibration.settings
            values |= {"threshold": calibration.threshold, "level": calibration.level}
            for name in ("frame_reduce", "top_k"):
                if name in settings:
                    values[name] = settings[name]
            values["threshold_means"] = calibration.explain() + self._about_gate(
                settings.get("gate_threshold")
            )
        else:
            values["threshold_means"] = f"none: not calibrated for the {self.score} score"
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in values.items()
        }

    def _about_pixels(self) -> str:
        calibration = self.model.calibration
        levels = "gray levels" if self.model.config.channels == 1 else "levels"
        text = f"pixels are {levels} from 0 to " + ("255" if self.pixels == "uint8" else "1")
        if calibration is None or calibration.settings.get("frames") != "motion":
            return text
        return (
            f"{text}, of motion frames: 128 + frame - frame before in levels of 0 to 255, clamped"
        )

    def _about_gate(self, threshold: float | None) -> str:
        if threshold is None:
            return ""
        what = (
            f"; patches that differ from the background by a mean of at most {threshold:g} gray "
            "levels counted as 0, "
        )
        if self.gate_threshold is not None:
            return what + "as they do here"
        return what + "whereas here all are scored: leave those out before comparing"
