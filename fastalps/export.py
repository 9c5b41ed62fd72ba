"""Models as files that run without fastalps: ONNX, and programs of `torch.export`.

Two graphs, with fixed names and a dynamic number N of items:

======== ==================================== ============== ==============
graph    input                                output         made
======== ==================================== ============== ==============
images   ``images`` (N, C, H, W)              ``scores``     by default
                                              (N,) float32
frames   ``frames`` (N, H, W), or (N, C, H,   ``patch_scores`` with a
         W) of C channels; with a gate also   (N, P) float32 ``frame_size``
         ``background`` (H, W) uint8
======== ==================================== ============== ==============

Pixels are uint8 (0 to 255) or float32 (0 to 1). A score is what `fastalps.Scorer` gives in float32.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalps.errors import UserError
from fastalps.export_plan import TOLERANCE, Plan
from fastalps.files import atomic_path
from fastalps.inputs import by
from fastalps.models import ALPS

OPSET = 18
# Where a program of torch.export keeps the metadata.
METADATA_FILE = "fastalps.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        metadata: as in the file, every value a text.
        difference: the largest relative difference of its scores from the model's, on random
            pixels; None where there was nothing to run the file with.
    """

    metadata: dict[str, str]
    difference: float | None


def export_onnx(
    model: ALPS,
    path: str | os.PathLike[str],
    *,
    frame_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    edge: str | None = None,
    score: str | None = None,
    pixels: str = "uint8",
    gate: bool = False,
) -> Exported:
    """Writes a model as an ONNX file of standard operators only.

    The file gets its name only after onnxruntime, where it is installed, has given the model's own
    scores with it, to a relative 1e-5.

    Args:
        model: an `fastalps.ALPS`, on any device.
        path: of the file.
        frame_size: (height, width) of whole frames, or one int for both: makes the graph "frames";
            None: the graph "images".
        stride, edge: how frames are cut, see `fastalps.ops.patch_grid`; None = as for the model's
            calibration, else the patch size and "cover".
        score: "normal", "perturbed" or "average"; None = the calibrated kind, else "average".
        pixels: dtype of the input, "uint8" or "float32".
        gate: patches that hardly differ from the input ``background`` score 0, by the motion gate's
            threshold of the model's calibration; only for frames of uint8.

    Returns:
        `Exported`.

    Raises:
        UserError: onnx or onnxscript is not installed; the path cannot be written; a score that is
            drawn at random; scores that differ (nothing is written).
        ValueError, TypeError: an argument out of its range, or that does not fit the model.
    """
    onnx, _ = (_require(name) for name in ("onnx", "onnxscript"))
    plan = Plan(model, frame_size, stride, edge, score, pixels, gate)
    with _target(path) as temporary, _quiet():
        program = torch.onnx.export(
            plan.program(),
            dynamo=True,
            input_names=list(plan.example()),
            output_names=[plan.output],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
        _tidy(proto)
        for key, value in plan.metadata().items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.checker.check_model(proto, full_check=True)
        temporary.write_bytes(proto.SerializeToString())
        difference = _check_onnx(plan, temporary)
    return Exported(plan.metadata(), difference)


def export_program(
    model: ALPS,
    path: str | os.PathLike[str],
    *,
    frame_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    edge: str | None = None,
    score: str | None = None,
    pixels: str = "uint8",
    gate: bool = False,
) -> Exported:
    """Writes a model as a program of `torch.export` (.pt2), for processes that have torch only.

    ``torch.export.load(path).module()`` takes the inputs and gives the scores. The metadata is
    JSON in the archive's extra file "fastalps.json". The file gets its name only after it was
    loaded and has given the model's own scores, to a relative 1e-5.

    Arguments, result and errors as for `export_onnx`.
    """
    plan = Plan(model, frame_size, stride, edge, score, pixels, gate)
    with _target(path) as temporary, _quiet():
        text = json.dumps(plan.metadata(), indent=2)
        # By way of a buffer: the archive would keep the temporary name.
        content = io.BytesIO()
        torch.export.save(plan.program(), content, extra_files={METADATA_FILE: text})
        temporary.write_bytes(content.getvalue())
        network = torch.export.load(temporary).module()
        with torch.inference_mode():
            difference = plan.compare(lambda inputs: network(*inputs.values()))
    return Exported(plan.metadata(), difference)


def _check_onnx(plan: Plan, path: Path) -> float | None:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
        return torch.from_numpy(session.run([plan.output], arrays)[0])

    return plan.compare(run)


def _tidy(proto: Any) -> None:
    """Removes what the exporter notes about this machine's source files; names the batch."""
    graph = proto.graph
    # Shapes in between, which runtimes infer by themselves.
    del graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        del item.metadata_props[:]
        item.doc_string = ""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = "batch"


@contextlib.contextmanager
def _target(path: str | os.PathLike[str]) -> Iterator[Path]:
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    with atomic_path(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters log and warn about their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX export needs the package {name}, which is not installed; "
            "pip install fastalps[onnx]"
        ) from error


def describe(exported: Exported) -> list[str]:
    """Lines that tell a person what a file takes, gives and means."""
    facts = exported.metadata
    size, channels = json.loads(facts["image_size"]), int(facts["channels"])
    if "frame_size" in facts:
        frame = json.loads(facts["frame_size"])
        count = int(facts["patch_rows"]) * int(facts["patch_columns"])
        shape = ", ".join(map(str, [*([channels] if channels > 1 else []), *frame]))
        gate = ""
        if "gate_threshold" in facts:
            gate = f" and background uint8 ({frame[0]}, {frame[1]})"
        lines = [
            f"in: frames {facts['pixels']} (batch, {shape}){gate}; out: patch_scores float32 "
            f"(batch, {count}), patches of {by(size)}"
        ]
    else:
        shape = ", ".join(map(str, (channels, *size)))
        lines = [f"in: images {facts['pixels']} (batch, {shape}); out: scores float32 (batch,)"]
    lines.append(facts["pixels_mean"])
    lines.append(f"score: {facts['score']}; threshold: {facts.get('threshold', 'none')}")
    lines.append(facts["threshold_means"])
    if exported.difference is None:
        lines.append("not checked against the model: onnxruntime is not installed")
    else:
        lines.append(
            f"checked against the model on random pixels: within {exported.difference:.1e} of its "
            f"scores (allowed: {TOLERANCE:g})"
        )
    return lines
