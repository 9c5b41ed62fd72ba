"""Tries options of model and training without touching the test set.

Trains on the normal class's training images but 500, and ranks those 500 among 4,500 training
images of the other classes: what options of bench/paper.py's recipes are chosen by. Prints AUROC in
% of the scores after every epoch, and after the last of smoothed and of relative errors, and of
each other class alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import fastalps
from bench.command_line import guarded
from bench.data import DATA
from bench.quality.kinds import scores_with
from fastalps import metrics
from fastalps.cli.options import ModelOptions, make_parser, parse, pick
from fastalps.data import OneClassData, load_images
from fastalps.errors import UserError
from fastalps.models import Scores
from fastalps.relative import energy, relative_errors
from fastalps.training.validation import score_all

HELD_OUT, ANOMALOUS = 500, 4500
# Fixes which images are held out, whatever the seed of the training.
DRAW = 1234
NAME = "bench/trial.py"


@dataclass(frozen=True)
class TrialOptions:
    """What is tried on.

    Attributes:
        dataset: mnist or fashion-mnist.
        normal_class: 0 to 9.
        root: folder of the data sets; FASTALPS_DATA or ../shared/data unless given.
        threads: of this process.
    """

    dataset: str = "mnist"
    normal_class: int = 8
    root: str = str(DATA)
    threads: int = 1


def trial_data(dataset: str, normal_class: int, root: str) -> tuple[OneClassData, Tensor]:
    """The task, made of training images only, and the classes of its validation images."""
    classes = [
        load_images(dataset, root, normal_class=c, protocol="strict").train for c in range(10)
    ]
    draw = np.random.RandomState(DRAW)
    normal = classes[normal_class]
    order = torch.from_numpy(draw.permutation(len(normal)))
    if len(normal) <= HELD_OUT:
        raise UserError(f"{dataset}[{normal_class}] has {len(normal)} images; too few to try on")
    names = torch.cat([torch.full((len(x),), c) for c, x in enumerate(classes)])
    others = torch.cat(classes)[names != normal_class]
    odd = torch.from_numpy(draw.permutation(len(others))[:ANOMALOUS])
    held_out = torch.cat([normal[order[:HELD_OUT]], others[odd]])
    labels = torch.arange(len(held_out)) >= HELD_OUT
    kinds = torch.cat([torch.full((HELD_OUT,), normal_class), names[names != normal_class][odd]])
    task = OneClassData(
        name=f"{dataset}[{normal_class}]",
        train=normal[order[HELD_OUT:]],
        validation=held_out,
        validation_labels=labels,
        test=held_out,
        test_labels=labels,
        test_names=tuple(str(i) for i in range(len(held_out))),
    )
    return task, kinds


def _percent(scores: Tensor, labels: Tensor) -> float:
    return round(100 * metrics.auroc(scores, labels), 2)


def _run(arguments: Sequence[str]) -> int:
    usage = f"python {NAME} [--dataset NAME] [--normal-class K] [options of model and training]"
    parser = make_parser(
        NAME, __doc__ or "", usage, TrialOptions, ModelOptions, fastalps.TrainConfig
    )
    options = parse(parser, arguments)
    trial, shape = pick(options, TrialOptions), pick(options, ModelOptions)
    config = pick(options, fastalps.TrainConfig)
    if trial.dataset not in ("mnist", "fashion-mnist") or not 0 <= trial.normal_class <= 9:
        raise UserError("expected --dataset mnist or fashion-mnist and --normal-class 0 to 9")
    torch.set_num_threads(trial.threads)
    data, classes = trial_data(trial.dataset, trial.normal_class, trial.root)
    torch.manual_seed(config.seed)
    model = fastalps.ALPS(28, 1, shape.preset, **shape.overrides())
    fitted = fastalps.Trainer(config, progress=False).fit(model, data)
    for row in fitted.history:
        if "validation_auroc_normal" in row:
            areas = {k: round(100 * row[f"validation_auroc_{k}"], 2) for k in Scores._fields}
            print(json.dumps({"epoch": row["epoch"], **areas}), flush=True)
    model.load_state_dict(fitted.last_weights)
    energies, labels = energy(data.validation), data.validation_labels
    for smoothing in (1, 3, 5, 7):
        scores = scores_with(model, data.validation, smoothing)
        for exponent in (0.0, 1 / 3, 1 / 2, 2 / 3, 1.0):
            areas = {
                kind: _percent(relative_errors(values, energies, exponent), labels)
                for kind, values in scores.items()
            }
            how = {"smoothing": smoothing, "relative, exponent": round(exponent, 2)}
            print(json.dumps({**how, **areas}))
    normal = score_all(model, data.validation).normal
    alone = {}
    for c in range(10):
        if c != trial.normal_class:
            chosen = ~labels | (classes == c)
            alone[str(c)] = _percent(normal[chosen], labels[chosen])
    print(json.dumps({"normal score, one class against": alone}))
    print(json.dumps({"MFLOP an image": round(model.flops() / 1e6, 1)}))
    print(json.dumps({"model": dataclasses.asdict(model.config)}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return guarded(lambda: _run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
