"""Models on disk: safetensors with the configuration in the header. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastalps.errors import UserError
from fastalps.files import atomic_path
from fastalps.frame_scores import check_frame_reduce
from fastalps.models import ALPS, PRESETS, ModelConfig
from fastalps.smoothing import check_size

FORMAT = "fastalps-model"
VERSION = "1"
UNITS = {"image": "images", "patch": "patches", "frame": "frames"}
LEVELS = tuple(UNITS)
SCORE_MEANING = (
    "a score is a mean squared error of pixels in [0, 1]: 0 is a perfect reconstruction, higher is "
    "more anomalous"
)
SCORE_KINDS = ("normal", "perturbed", "average")
EDGES = ("cover", "drop", "error")
FRAMES = ("gray", "motion")
# Of weights in a file; in memory they are float32.
STORED = (torch.float32, torch.float16, torch.bfloat16)
# Larger values in a configuration are not models but ways to exhaust the memory of a reader.
LARGEST_WIDTH = 65536


@dataclass(frozen=True)
class Calibration:
    """A threshold set on held-out normal data; what scores above it is flagged.

    Attributes:
        threshold: mean squared error of images in [0, 1].
        score: the kind it is for: "normal", "perturbed" or "average".
        level: what was scored: "image", "patch" or "frame".
        target_false_positive_rate: the share of normal samples that may be flagged.
        samples: how many normal samples it was set on.
        settings: how they were scored. Always "precision" (str) and "smoothing" (int). Of patches
            and frames also "patch_size" and "stride" ([height, width]), "edge" (str) and
            "gate_threshold" (float, None: no gate); of frames "frame_reduce" (str) and "top_k"
            (int); in runs on video "frames" ("gray" or "motion").
        quantiles: of their scores: pairs (probability, score), both rising; `fastalps.drift`
            compares streams with them. Empty in files of before they were kept.
        correlation: how many successive ones tell as much as one independent one, at least 1.
    """

    threshold: float
    score: str
    level: str
    target_false_positive_rate: float
    samples: int
    settings: dict[str, Any] = field(default_factory=dict)
    quantiles: tuple[tuple[float, float], ...] = ()
    correlation: float = 1.0

    def __post_init__(self) -> None:
        # JSON has lists only.
        pairs = tuple((float(p), float(score)) for p, score in self.quantiles)
        object.__setattr__(self, "quantiles", pairs)
        if self.score not in SCORE_KINDS:
            raise ValueError(f"score: expected one of {', '.join(SCORE_KINDS)}; got {self.score!r}")
        if self.level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(LEVELS)}; got {self.level!r}")
        if not _is_finite(self.threshold):
            raise ValueError(f"threshold: expected a finite number, got {self.threshold}")
        if not 0 < self.target_false_positive_rate < 1:
            raise ValueError(
                "target_false_positive_rate: expected between 0 and 1, "
                f"got {self.target_false_positive_rate}"
            )
        for column, (low, high) in enumerate(((0.0, 1.0), (-math.inf, math.inf))):
            values = [pair[column] for pair in pairs]
            if values != sorted(values) or not all(low < value < high for value in values):
                raise ValueError(
                    "quantiles: expected pairs of a probability between 0 and 1 and a finite "
                    f"score, both rising; got {pairs}"
                )
        if not (_is_finite(self.correlation) and self.correlation >= 1):
            raise ValueError(f"correlation: expected at least 1, got {self.correlation}")
        if not _is_whole(self.samples, 0, 2**63):
            raise ValueError(f"samples: expected a number of them, got {self.samples!r}")
        _check_settings(self.settings)

    @property
    def score_meaning(self) -> str:
        """What a score is, without the threshold."""
        smoothing = self.settings.get("smoothing", 1)
        if smoothing == 1:
            return SCORE_MEANING
        pixels = f"pixels in [0, 1], differences averaged over {smoothing} x {smoothing} of them"
        return SCORE_MEANING.replace("pixels in [0, 1]", pixels)

    def explain(self) -> str:
        """What a score is and what the threshold means, in one sentence without a full stop."""
        rate = 100 * self.target_false_positive_rate
        text = (
            f"{self.score_meaning}; above {self.threshold:.6g} it is flagged, which at most "
            f"{rate:g}% of {self.samples} held-out normal {UNITS[self.level]} are"
        )
        median = dict(self.quantiles).get(0.5)
        return text if median is None else f"{text} (half of them score at most {median:.4g})"


def _check_settings(settings: Any) -> None:
    """Raises ValueError for a setting that scoring cannot take; unknown ones may be anything."""
    if not isinstance(settings, dict):
        raise ValueError(f"settings: expected names with values, got {type(settings).__name__}")
    check_frame_reduce(settings.get("frame_reduce", "max"), settings.get("top_k", 3))
    check_size("smoothing", settings.get("smoothing", 1))
    for name, choices in (("edge", EDGES), ("frames", FRAMES)):
        if name in settings and settings[name] not in choices:
            raise ValueError(
                f"{name}: expected one of {', '.join(choices)}; got {settings[name]!r}"
            )
    for name in ("patch_size", "stride"):
        size = settings.get(name)
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        if size is not None and not (
            len(sides) == 2 and all(_is_whole(side, 1, LARGEST_WIDTH) for side in sides)
        ):
            raise ValueError(
                f"{name}: expected one or two sides of 1 to {LARGEST_WIDTH} pixels, got {size!r}"
            )
    gate = settings.get("gate_threshold")
    if gate is not None and not (_is_finite(gate) and gate >= 0):
        raise ValueError(f"gate_threshold: expected gray levels from 0 up or None, got {gate!r}")
    if not isinstance(settings.get("precision", ""), str):
        raise ValueError(f"precision: expected its name, got {settings['precision']!r}")


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _is_whole(value: Any, smallest: int, largest: int) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and smallest <= value <= largest


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes tensors (moved to the CPU) and text to one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(
    path: str | os.PathLike[str], expected_format: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what `save_tensors` wrote; UserError when the file is not such a one."""
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != expected_format:
                raise UserError(
                    f"{path}: expected a {expected_format} file, got a safetensors file of another "
                    f"kind; give the model.safetensors of a fastalps run"
                )
            if metadata.get("version") != VERSION:
                raise UserError(
                    f"{path}: expected version {VERSION} of the format, got "
                    f"{metadata.get('version')!r}; read it with the fastalps that wrote it"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; train a model first (fastalps-train)") from error
    except (SafetensorError, OSError) as error:
        text = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable safetensors file ({text})") from error


def save(
    model: ALPS,
    path: str | os.PathLike[str],
    calibration: Calibration | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model: weights, configuration, calibration, quantization; atomically.

    Args:
        model: what to save.
        path: of the file, `model.safetensors` by convention.
        calibration: to store with it; the model's own where None.
        dtype: of the stored weights: float32, or float16 or bfloat16 for half the bytes. `load`
            makes float32 of them again; scores move by about the relative rounding of a weight,
            5e-4 of float16 and 4e-3 of bfloat16.

    Raises:
        UserError: the file cannot be written.
        ValueError: another dtype, or weights too large for it.
    """
    if dtype not in STORED:
        raise ValueError(f"dtype must be one of {', '.join(map(str, STORED))}, got {dtype}")
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    if dtype == torch.float16:
        for name, tensor in model.state_dict().items():
            if bool((weights[name].isinf() & tensor.isfinite()).any()):
                raise ValueError(f"{name} holds values too large for float16; take bfloat16")
    calibration = calibration or model.calibration
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(dataclasses.asdict(model.config)),
    }
    if calibration is not None:
        metadata["calibration"] = json.dumps(dataclasses.asdict(calibration))
    if model.quantization is not None:
        metadata["quantization"] = json.dumps(dataclasses.asdict(model.quantization))
    save_tensors(path, weights, metadata)


def _header(text: str) -> Any:
    """JSON out of a file's header; ValueError for what no header of ours holds."""
    try:
        return json.loads(text, parse_int=_parse_whole)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _parse_whole(digits: str) -> int:
    value = int(digits)
    if abs(value) >= 2**63:
        raise ValueError(f"a number of {len(digits)} digits")
    return value


def parse_config(path: str | os.PathLike[str], text: str | None) -> ModelConfig:
    """The configuration in a file's header; UserError when it is none of ours."""
    try:
        fields = _header(text or "")
        for name in ("image_size", "encoder", "distorter", "decoder"):
            fields[name] = tuple(fields[name])
        config = ModelConfig(**fields)
        numbers = (*config.image_size, *config.encoder, *config.distorter, *config.decoder)
        if config.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {config.preset!r}")
        if max(*numbers, config.latent, config.channels) > LARGEST_WIDTH:
            raise ValueError(f"a size above {LARGEST_WIDTH}")
        return config
    except (ValueError, TypeError, KeyError) as error:
        text = str(error).splitlines()[0]
        raise UserError(f"{path}: its model configuration is not valid ({text})") from error


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> ALPS:
    """Reads a model that `save` wrote, wherever it was trained.

    Args:
        path: of the file.
        device: where to put it.

    Returns:
        The model, in eval mode, its `calibration` and `quantization` set where the file has them.

    Raises:
        UserError: no such file, another kind of file, one that was cut short or altered, or weights
            that are not finite.
    """
    tensors, metadata = read_tensors(path, FORMAT)
    config = parse_config(path, metadata.get("config"))
    with torch.device("meta"):
        # Without memory first: a forged configuration must not allocate what the file lacks.
        model = ALPS.from_config(config).float()
    tensors = {
        name: tensor.float() if tensor.dtype in STORED else tensor
        for name, tensor in tensors.items()
    }
    check_state(path, model.state_dict(), tensors)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} is not finite; train the model again")
    model.load_state_dict(tensors, assign=True)
    if "calibration" in metadata:
        try:
            model.calibration = Calibration(**_header(metadata["calibration"]))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: its calibration is not valid ({error})") from error
    if "quantization" in metadata:
        from fastalps.quantization import Quantization

        try:
            model.quantization = Quantization(**_header(metadata["quantization"]))
            model.quantization.check(model)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: its quantization is not valid ({error})") from error
    return model.requires_grad_().eval().to(device)


def check_state(
    path: str | os.PathLike[str], expected: dict[str, Tensor], found: dict[str, Tensor]
) -> None:
    """UserError unless `found` has exactly the tensors of `expected`, by name, shape and dtype."""
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            state = "lacks" if name not in found else "has an unknown"
            raise UserError(f"{path}: the file {state} tensor {name}; it does not fit this model")
        mine, theirs = expected[name], found[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise UserError(
                f"{path}: tensor {name} should be {mine.dtype} {tuple(mine.shape)}, "
                f"is {theirs.dtype} {tuple(theirs.shape)}"
            )
