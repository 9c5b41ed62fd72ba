"""Cells of a table: one method trained on one class with one seed, tested by both protocols."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench.quality import baselines, pictures
from bench.quality.kinds import all_kinds, best_kind, measured
from bench.quality.recipes import BASELINES, QUICK, RECIPES, VARIANTS
from fastalps import metrics
from fastalps.cli import plots
from fastalps.cli.run_folder import write_metrics, write_scores
from fastalps.data import OneClassData, load_images
from fastalps.environment import result_record
from fastalps.files import make_folder
from fastalps.relative import energy
from fastalps.smoothing import SIZE
from fastalps.training import FitResult, fit_stacked
from fastalps.training.run import CHECKPOINT
from fastalps.training.validation import FIXED_KIND

PROTOCOLS = ("paper", "strict")
CLASSES = 10


@dataclass(frozen=True)
class Cell:
    """What is trained and tested."""

    dataset: str
    normal_class: int
    seed: int
    method: str = "alps"

    @property
    def name(self) -> str:
        suffix = "" if self.method == "alps" else f"-{self.method}"
        return f"{self.dataset}-{self.normal_class}-{self.seed}{suffix}"

    def path(self, results: Path, protocol: str) -> Path:
        """Where the result by `protocol` is kept."""
        suffix = "" if self.method == "alps" else f"-{self.method}"
        return results / f"{self.dataset}-{protocol}-{self.normal_class}-{self.seed}{suffix}.json"

    def done(self, results: Path) -> bool:
        return all(self.path(results, protocol).is_file() for protocol in PROTOCOLS)


def read(cell: Any, results: Path, protocol: str) -> dict[str, Any] | None:
    """A finished cell's record; None where it is missing."""
    path = cell.path(results, protocol)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def arguments(group: Sequence[Cell]) -> tuple[str, ...]:
    """What a process that runs these cells, of one data set, seed and method, is told."""
    classes = ",".join(str(cell.normal_class) for cell in group)
    return ("--dataset", group[0].dataset, "--cell", classes, str(group[0].seed), group[0].method)


def run(
    group: Sequence[Cell],
    root: Path,
    results: Path,
    scratch: Path,
    quick: bool = False,
    stacked: bool = False,
) -> None:
    """Trains and tests cells and writes their two records each; goes on where a stopped run was.

    Args:
        group: of one data set, seed and method.
        root: the folder of the data set.
        results: gets the records, and those only.
        scratch: gets checkpoint, scores.csv and pictures.
        quick: a few epochs, to prove that it works.
        stacked: train them together, on a CUDA device where there is one; their records say so,
            and their `seconds` are those of the whole stack.

    Test labels are read once, after everything is chosen: by `paper` the epoch and the kind of
    score with the highest AUROC on the validation images, by `strict` the last epoch and the
    average score, which no data chose. Both come from one training, on the same images.

    `reported` is of the paper's three kinds; `ours` may also be one with our additions
    (`kinds.py`), again chosen on the validation images by `paper` and fixed by the recipe for
    `strict`.
    """
    tasks = [
        load_images(c.dataset, root, normal_class=c.normal_class, protocol="paper", seed=c.seed)
        for c in group
    ]
    if group[0].method in BASELINES:
        for cell, data in zip(group, tasks, strict=True):
            _record(cell, data, _baseline(cell, data), results, quick)
        return
    folders = [make_folder(scratch / cell.name) for cell in group]
    config, trained = _train(group, tasks, folders, quick, stacked)
    for cell, data, folder, fitted in zip(group, tasks, folders, trained, strict=True):
        details = {
            "model": dataclasses.asdict(fitted.model.config),
            "flops_per_image": fitted.model.flops(),
            "training": dataclasses.asdict(config),
            # Of the epochs, whatever the number of runs that they took.
            "seconds": round(
                sum(len(data.train) / row["images_per_second"] for row in fitted.history), 1
            ),
            **({"stacked": len(group)} if stacked else {}),
        }
        _record(cell, data, _tested(cell, data, folder, fitted, details), results, quick)


# By protocol: the scores of the test images by kind, the kind that is reported, and what else to
# record.
Tested = dict[str, tuple[dict[str, Tensor], str, dict[str, Any]]]


def _record(cell: Cell, data: OneClassData, parts: Tested, results: Path, quick: bool) -> None:
    recipe = RECIPES[cell.dataset]
    make_folder(results)
    for protocol, (found, kind, details) in parts.items():
        areas = {
            k: metrics.auroc(v, data.test_labels)
            for k, v in all_kinds(found, data.test, recipe.exponent).items()
        }
        areas |= {"reported": areas[kind], "ours": areas[details["ours"]]}
        record = result_record(
            protocol,
            {"auroc": areas, "test_images": len(data.test)},
            seed=cell.seed,
            dataset=cell.dataset,
            normal_class=cell.normal_class,
            method=cell.method,
            score=kind,
            threads=torch.get_num_threads(),
            quick=quick,
            relative_exponent=recipe.exponent,
            smoothed_size=SIZE,
            **details,
        )
        # The table reads auroc.* at the top.
        record["auroc"] = record["metrics"]["auroc"]
        write_metrics(cell.path(results, protocol), record)


def _baseline(cell: Cell, data: OneClassData) -> Tested:
    begin = time.perf_counter()
    scores = baselines.scores(cell.method, data.train, data.test, cell.seed)
    # Reconstruction errors, unlike distances and path lengths, can have our additions.
    ours = RECIPES[cell.dataset].strict_score if "smoothed_normal" in scores else "normal"
    details = {"ours": ours, "seconds": round(time.perf_counter() - begin, 1)}
    return dict.fromkeys(PROTOCOLS, (scores, "normal", details))


def _train(
    group: Sequence[Cell],
    tasks: Sequence[OneClassData],
    folders: Sequence[Path],
    quick: bool,
    stacked: bool,
) -> tuple[fastalps.TrainConfig, list[FitResult]]:
    recipe, seed = RECIPES[group[0].dataset], group[0].seed
    training = {**recipe.training, **(QUICK if quick else {}), "seed": seed}
    if stacked and torch.cuda.is_available():
        training["device"] = "cuda"
    config = fastalps.TrainConfig(**training, protocol="paper")
    models = []
    for cell, data in zip(group, tasks, strict=True):
        torch.manual_seed(seed)
        models.append(
            fastalps.ALPS(
                tuple(data.train.shape[2:]),
                data.train.shape[1],
                **{**recipe.model, **VARIANTS[cell.method]},
            )
        )
    trainers = [fastalps.Trainer(config, folder, progress=False) for folder in folders]
    resume = [(folder / CHECKPOINT).is_file() for folder in folders]
    if stacked:
        return config, fit_stacked(trainers, models, tasks, resume)
    each = zip(trainers, models, tasks, resume, strict=True)
    return config, [trainer.fit(*what) for trainer, *what in each]


def _tested(
    cell: Cell, data: OneClassData, folder: Path, fitted: FitResult, details: dict[str, Any]
) -> Tested:
    recipe, model = RECIPES[cell.dataset], fitted.model
    picked, ours = measured(model, data.test), best_kind(model, data, recipe.exponent)
    examples = _examples(data)
    plots.reconstructions(folder / "reconstructions.png", model, *examples)
    pictures.keep_examples(folder / pictures.EXAMPLES, model, *examples)
    chosen: dict[str, Any] = {
        "chosen_epoch": fitted.best_epoch,
        "chosen_by": "validation AUROC of 150 + 150",
        "ours": ours,
    }
    parts = {"paper": (picked, fitted.score, {**details, **chosen})}
    model.load_state_dict(fitted.last_weights)
    last = measured(model, data.test)
    chosen = {
        "chosen_epoch": details["training"]["epochs"],
        "chosen_by": "fixed: the last epoch",
        "ours": recipe.strict_score,
    }
    parts["strict"] = (last, FIXED_KIND, {**details, **chosen})
    for protocol, (found, _, _) in parts.items():
        # With the energy, who reads it can compute the relative kinds.
        columns = ("image", "anomalous", *found, "energy")
        rows = zip(
            data.test_names,
            data.test_labels.tolist(),
            *(kind.tolist() for kind in found.values()),
            energy(data.test).tolist(),
            strict=True,
        )
        write_scores(folder / f"scores-{protocol}.csv", columns, rows)
    return parts


def _examples(data: OneClassData) -> tuple[Tensor, Tensor]:
    normal = (~data.test_labels).nonzero().flatten()[:8]
    anomalous = data.test_labels.nonzero().flatten()[:8]
    index = torch.cat([normal, anomalous])
    return data.test[index], data.test_labels[index]
