"""Options of the commands: dataclasses, typed once, that become flags, YAML and help texts."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from fastalps.calibration import FRAMES
from fastalps.checkpoint import LARGEST_WIDTH
from fastalps.errors import UserError
from fastalps.frame_scores import check_frame_reduce

VIDEO_DATASETS = ("ucsd-ped1", "ucsd-ped2", "video")
IMAGE_DATASETS = ("digits", "mnist", "fashion-mnist", "folder")
DATASETS = (*IMAGE_DATASETS, *VIDEO_DATASETS)

Options = TypeVar("Options")

# What the parser says of a value that fits none of two types, one of them null.
_OPTIONAL = re.compile(r"Does not validate .*?<class '(?!NoneType)(\w+)'>.*Given value: (.*)")


@dataclass(frozen=True)
class DataOptions:
    """The data.

    Attributes:
        dataset: digits (embedded), mnist, fashion-mnist, folder (your own images, in sub-folders
            normal and, to test on, anomalous), ucsd-ped1, ucsd-ped2 or video (your own normal
            videos of one camera).
        root: the folder that holds the data set; not needed for digits.
        normal_class: number or name of the class that is normal (digits, mnist, fashion-mnist).
        download: fetch missing files of mnist and fashion-mnist.
        image_size: resize the images of a folder to this many pixels in height and width; null =
            as stored.
        frames: what patches of video show: gray (the pixels) or motion (their change since the
            frame before; the motion gate then compares with no change, not with a background).
        cache: folder where decoded frames are kept, which makes the next read immediate; null =
            nowhere.
    """

    dataset: str = "digits"
    root: str | None = None
    normal_class: str | None = None
    download: bool = False
    image_size: int | None = None
    frames: str = "gray"
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise UserError(f"dataset must be one of {', '.join(DATASETS)}; got {self.dataset!r}")
        if self.frames not in FRAMES:
            raise UserError(f"frames must be one of {', '.join(FRAMES)}; got {self.frames!r}")


@dataclass(frozen=True)
class ModelOptions:
    """The model.

    Attributes:
        preset: paper, fast (about half of its widths) or network-b (paper with a latent of 256, for
            benchmarks).
        latent: size of the latent vector; null = the preset's.
        encoder: widths of the first three convolutions, such as [32,64,128]; null = the preset's.
        distorter: the same of the distorter; null = as the encoder.
        decoder: six widths, from the smallest map to the last hidden layer; null = the preset's.
        perturbation: adversarial (ALPS), noise (random) or none (a plain autoencoder).
        bound: on the perturbation: none, tanh or norm.
        strength: factor on the perturbation.
        batch_norm: batch normalisation after every hidden layer.
        smoothing: side in pixels of the neighbourhood over which a residual is averaged before it
            is squared for a score; odd, 1 = none, as in the paper. 3 ranks better where images
            have texture.
    """

    preset: str = "paper"
    latent: int | None = None
    encoder: list[int] | None = None
    distorter: list[int] | None = None
    decoder: list[int] | None = None
    perturbation: str = "adversarial"
    bound: str = "none"
    strength: float = 1.0
    batch_norm: bool = True
    smoothing: int = 1

    def __post_init__(self) -> None:
        for name in ("latent", "encoder", "distorter", "decoder"):
            value = getattr(self, name)
            widest = max(value, default=0) if isinstance(value, list) else value or 0
            if widest > LARGEST_WIDTH:
                raise UserError(f"{name} must be at most {LARGEST_WIDTH}, got {widest}")

    def overrides(self) -> dict[str, Any]:
        """Keyword arguments of `fastalps.ALPS` besides image size, channels and preset."""
        fields = dataclasses.asdict(self)
        del fields["preset"]
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class EvaluationOptions:
    """Threshold, and video.

    Attributes:
        target_fpr: share of held-out normal images (or frames of video) that the threshold may
            flag.
        patch_size: pixels in height and width of the patches that frames are cut into.
        gate_threshold: gray levels; a patch is looked at when its mean absolute difference from
            the clip's background is greater.
        frame_reduce: how a frame's score comes from its patches: max, mean or topk.
        top_k: patches that topk averages.
    """

    target_fpr: float = 0.01
    patch_size: int = 30
    gate_threshold: float = 3.0
    frame_reduce: str = "max"
    top_k: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.target_fpr < 1:
            raise UserError(f"target_fpr must be between 0 and 1, got {self.target_fpr}")
        # Nothing else needs them before the model is trained.
        check_frame_reduce(self.frame_reduce, self.top_k)


@dataclass(frozen=True)
class ScoreOptions:
    """Scoring.

    Attributes:
        precision: fp32, bf16, int8 (CPUs) or auto: on CPUs the fastest that is known to keep the
            ranking of normal images, on GPUs bf16 unless it is known not to.
        device: cpu, cuda, cuda:1, ... or auto.
        threshold: flag what scores above this, in place of the run's own threshold.
        overlays: frames to draw with their heatmaps, those with the highest scores; -1 = all.
        chunk: frames read and scored at a time.
        batch_size: patches or images a network call; null = chosen by size and device.
        workers: threads that decode a folder's frames or images, while others are scored; null =
            one for each CPU.
        limit: frames to score at most; null = all. A camera has no end: give one, or Ctrl-C.
        timeout: seconds to wait for an answer of a network stream.
        reconnects: attempts in a row to connect to a camera or a live stream again.
    """

    precision: str = "auto"
    device: str = "auto"
    threshold: float | None = None
    overlays: int = 10
    chunk: int = 128
    batch_size: int | None = None
    workers: int | None = None
    limit: int | None = None
    timeout: float = 10.0
    reconnects: int = 5

    def __post_init__(self) -> None:
        if self.overlays < -1:
            raise UserError(f"overlays must be a number of frames, or -1 for all: {self.overlays}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"threshold must be a finite number, got {self.threshold}")
        for name, value in (("chunk", self.chunk), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be a number of frames from 1 up, got {value}")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if self.reconnects < 0:
            raise UserError(f"reconnects must be 0 or more, got {self.reconnects}")


def make_parser(name: str, description: str, usage: str, *groups: type) -> Any:
    """An argument parser with a flag for each field of the option classes `groups`.

    Flags are spelt with hyphens (`--normal-class`); the keys of its YAML with underscores. Errors
    are `UserError`s: one line, no usage dump.
    """
    # The texts of the help come from docstrings, by way of a module that is slow to import.
    from jsonargparse import ArgumentParser

    from fastalps.cli.help_texts import HelpFormatter

    parser = ArgumentParser(
        prog=name,
        description=description,
        usage=usage,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of options, named as here with _ for -; options behind it win",
    )
    for group in groups:
        parser.add_class_arguments(group, as_group=True)
    for action in parser._actions:
        flags = list(action.option_strings)
        action.option_strings = [_hyphened(flag) for flag in flags]
        for flag in flags:
            parser._option_string_actions[_hyphened(flag)] = parser._option_string_actions.pop(flag)
    return parser


def parse(parser: Any, arguments: Sequence[str]) -> Any:
    """The namespace of `arguments`; raises UserError for anything the parser refuses."""
    from jsonargparse import ArgumentError

    try:
        hyphened = [_hyphened(argument) for argument in arguments]
        # The one flag whose value may be left out.
        return parser.parse_args([each + "=" * (each == "--print-config") for each in hyphened])
    except ArgumentError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = re.sub(r"Parser key \"(\w+)\"", r"\1", " ".join(lines)) or "wrong arguments"
        text = _OPTIONAL.sub(r"Expected a <class '\1'> or null. Got value: \2", text)
        raise UserError(f"{text}; see {parser.prog} --help") from error
    except UnicodeDecodeError as error:
        files = " or ".join(_config_files(arguments))
        raise UserError(
            f"config: expected YAML in UTF-8, but {files} holds other bytes ({error.reason}); save "
            "it as UTF-8"
        ) from error


def _config_files(arguments: Sequence[str]) -> list[str]:
    files = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    return files + [value for flag, value in pairwise(arguments) if flag == "--config"]


def _hyphened(argument: str) -> str:
    flag, separator, value = argument.partition("=")
    return flag.replace("_", "-") + separator + value if flag.startswith("--") else argument


def pick(namespace: Any, kind: type[Options]) -> Options:
    """The fields of one option class out of a flat namespace."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: namespace[name] for name in names})


def absolute(path: str | None) -> str | None:
    """A path that still holds when the run goes on from another folder."""
    return None if path is None else os.path.abspath(os.path.expanduser(path))
