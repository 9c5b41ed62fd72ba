"""Models on disk: safetensors with the configuration in the header. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastalps.calibration import Calibration
from fastalps.errors import UserError
from fastalps.files import atomic_path
from fastalps.models import ALPS, PRESETS, ModelConfig

FORMAT = "fastalps-model"
VERSION = "1"
# Of weights in a file; in memory they are float32.
STORED = (torch.float32, torch.float16, torch.bfloat16)
# Larger values in a configuration are not models but ways to exhaust the memory of a reader.
LARGEST_WIDTH = 65536


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
