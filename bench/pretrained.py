"""Trains the models that come with the package, and measures the files that are shipped.

Weights are rounded to float16 before anything is measured or a threshold is set: measured are the
files. No test label chooses anything; docs/pretrained.md has the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import fastalps
from bench.command_line import Parser, guarded
from bench.data import DATA, HELP
from bench.quality.recipes import RECIPES, VIDEO
from fastalps import protocols
from fastalps.data import (
    Clip,
    load_images,
    load_ucsd,
    motion_frames,
    patch_task,
    still_background,
)
from fastalps.files import make_folder
from fastalps.models import ALPS
from fastalps.pretrained import PRETRAINED, pretrained_path
from fastalps.smoothing import SIZE

ROOT = Path(__file__).resolve().parents[1]
STORED = torch.float16
TARGET_FPR = 0.01
# Of video: three gray levels of change; patches that overlap by half, the mean of a frame's top
# three, by the rehearsal of table II (docs/quality.md).
GATE, PATCH, STRIDE, TOP_K = 3.0, 30, 15, 3


def _rounded(model: ALPS) -> ALPS:
    """The model as it comes back from a file."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(STORED))
    return model.eval()


def _shares(flagged: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "flagged of the anomalous": round(float(flagged[labels].float().mean()), 4),
        "flagged of the normal": round(float(flagged[~labels].float().mean()), 4),
    }


def _mnist(normal_class: int, root: Path, out: Path) -> dict[str, Any]:
    recipe = RECIPES["mnist"]
    data = load_images("mnist", root, normal_class=normal_class, protocol="paper", seed=0)
    torch.manual_seed(0)
    model = ALPS(28, 1, "fast", smoothing=SIZE)
    config = fastalps.TrainConfig(**recipe.training, protocol="paper", seed=0)
    fitted = fastalps.Trainer(config).fit(model, data)
    model = _rounded(fitted.model)
    scorer = fastalps.Scorer(model, fitted.score)
    model.calibration = scorer.calibrate(data.validation[~data.validation_labels], TARGET_FPR)
    model.quantization = fastalps.quantize(model, data.train)
    fastalps.save(model, out, dtype=STORED)
    scores = scorer.scores_images(data.test)._asdict()
    figures = {kind: protocols.figures(v, data.test_labels) for kind, v in scores.items()}
    flagged = scores[fitted.score] > model.calibration.threshold
    return {
        "epoch": fitted.best_epoch,
        "score": fitted.score,
        **figures,
        **_shares(flagged, data.test_labels),
    }


def _moving(clips: Sequence[Clip]) -> list[Clip]:
    return [dataclasses.replace(clip, frames=motion_frames(clip.frames)) for clip in clips]


def _ucsd(root: Path, out: Path) -> dict[str, Any]:
    train, test = (load_ucsd(root, "ped2", part) for part in ("train", "test"))
    shape = (train[0].frames.shape[1], train[0].frames.shape[2])
    gate = fastalps.MotionGate(GATE, still_background(shape))
    task, held_out = patch_task("ucsd-ped2", _moving(train), PATCH, gate)
    torch.manual_seed(0)
    model = ALPS(PATCH, 1, "fast")
    config = fastalps.TrainConfig(**VIDEO.training, protocol="strict", select="last", seed=0)
    model = _rounded(fastalps.Trainer(config).fit(model, task).model)
    scorer = fastalps.Scorer(
        model, "average", stride=STRIDE, gate=gate, frame_reduce="topk", top_k=TOP_K
    )
    found = scorer.calibrate(held_out, TARGET_FPR, level="frame")
    model.calibration = dataclasses.replace(found, settings={**found.settings, "frames": "motion"})
    model.quantization = fastalps.quantize(model, task.train)
    fastalps.save(model, out, dtype=STORED)
    moving = _moving(test)
    results = [scorer.scores_frames(clip.frames) for clip in moving]
    options: dict[str, Any] = {
        "patch_size": PATCH,
        "stride": STRIDE,
        "top_k": TOP_K,
        "dropped": "left out",
    }
    still = protocols.motion_baseline(test, PATCH, STRIDE)
    kept = [gate.kept(clip.frames, PATCH, STRIDE) for clip in moving]
    rows = {
        kind: protocols.evaluate_video([r[kind] for r in results], test, kept=kept, **options)
        for kind in ("normal", "perturbed", "average")
    }
    rows["no learning"] = protocols.evaluate_video(still, test, kept=kept, **options)
    labels = torch.cat([clip.labels for clip in test if clip.labels is not None])
    curve = torch.cat([r["average"].frames for r in results])
    return {
        **{
            kind: {
                "frames": row["frame"]["micro"]["topk"]["gated"],
                "moving patches": row["patch"]["gated"],
            }
            for kind, row in rows.items()
        },
        **_shares(curve > model.calibration.threshold, labels),
    }


MAKERS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "mnist-0": lambda root, out: _mnist(0, root, out),
    "ucsd-ped2-motion": _ucsd,
}


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    names = options.names or list(PRETRAINED)
    for name in names:
        pretrained_path(name)
    folder = make_folder(options.out)
    for name in names:
        path = folder / f"{name}.safetensors"
        figures = MAKERS[name](options.root, path)
        print(f"{name}: {path.stat().st_size:,} bytes; {fastalps.load(path).calibration}")
        print(json.dumps(figures, indent=1))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/pretrained.py",
        description=__doc__,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(PRETRAINED)} (default: all)"
    )
    parser.add_argument("--root", type=Path, default=DATA, help=HELP)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "fastalps" / "weights", help="gets the files"
    )
    parser.add_argument("--threads", type=int, default=1, help="of this process (default: 1)")
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
