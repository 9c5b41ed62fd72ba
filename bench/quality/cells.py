"""One cell of a table: one method trained on one class with one seed, tested by both protocols."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench.quality import baselines, pictures
from bench.quality.recipes import BASELINES, PERTURBATION, QUICK, RECIPES
from fastalps import metrics
from fastalps.cli import figures
from fastalps.cli.run_folder import write_metrics, write_scores
from fastalps.data import OneClassData, load_images
from fastalps.environment import result_record
from fastalps.files import make_folder
from fastalps.models import ALPS, Scores
from fastalps.relative import energy, relative_errors
from fastalps.training import FitResult
from fastalps.training.trainer import CHECKPOINT
from fastalps.training.validation import FIXED_KIND, score_all

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

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a process that runs this cell alone is told."""
        what = (str(self.normal_class), str(self.seed), self.method)
        return ("--dataset", self.dataset, "--cell", *what)

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


def run(cell: Cell, root: Path, results: Path, scratch: Path, quick: bool = False) -> None:
    """Trains and tests a cell and writes its two records; goes on where a stopped run was.

    Args:
        root: the folder of the data set.
        results: gets the records, and those only.
        scratch: gets checkpoint, scores.csv and pictures.
        quick: a few epochs, to prove that it works.

    Test labels are read once, after everything is chosen: by `paper` the epoch and the kind of
    score with the highest AUROC on the validation images, by `strict` the last epoch and the
    average score, which no data chose. Both come from one training, on the same images.

    `reported` is of the paper's three kinds; `ours` may also be one of the relative kinds
    (`fastalps.relative`), again chosen on the validation images by `paper` and fixed by the recipe
    for `strict`.
    """
    data = load_images(
        cell.dataset, root, normal_class=cell.normal_class, protocol="paper", seed=cell.seed
    )
    begin = time.perf_counter()
    if cell.method in BASELINES:
        scores = baselines.scores(cell.method, data.train, data.test, cell.seed)
        everything = Scores(scores, scores, scores)
        # Reconstruction errors, unlike distances and path lengths, can be relative.
        ours = _relative(FIXED_KIND) if cell.method == "pca" else FIXED_KIND
        parts = {protocol: (everything, FIXED_KIND, {"ours": ours}) for protocol in PROTOCOLS}
    else:
        parts = _train(cell, data, make_folder(scratch / cell.name), quick)
    seconds = time.perf_counter() - begin
    make_folder(results)
    for protocol, (found, kind, details) in parts.items():
        areas = {
            k: metrics.auroc(v, data.test_labels)
            for k, v in _all_kinds(found, energy(data.test)).items()
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
            seconds=round(seconds, 1),
            threads=torch.get_num_threads(),
            quick=quick,
            **details,
        )
        # The table reads auroc.* at the top.
        record["auroc"] = record["metrics"]["auroc"]
        write_metrics(cell.path(results, protocol), record)


def _relative(kind: str) -> str:
    return f"relative_{kind}"


def _all_kinds(scores: Scores, energies: Tensor) -> dict[str, Tensor]:
    """The three kinds of score and the same relative to the images' contrast."""
    plain = {kind: values.cpu() for kind, values in scores._asdict().items()}
    return plain | {_relative(k): relative_errors(v, energies) for k, v in plain.items()}


def _best_kind(model: ALPS, data: OneClassData) -> str:
    """The kind of score, the relative ones included, that ranks the validation images best."""
    kinds = _all_kinds(score_all(model, data.validation), energy(data.validation))
    areas = {k: metrics.auroc(v, data.validation_labels) for k, v in kinds.items()}
    return max(areas, key=lambda kind: areas[kind])


def _train(
    cell: Cell, data: OneClassData, folder: Path, quick: bool
) -> dict[str, tuple[Scores, str, dict[str, Any]]]:
    recipe = RECIPES[cell.dataset]
    training = {**recipe.training, **(QUICK if quick else {}), "seed": cell.seed}
    config = fastalps.TrainConfig(**training, protocol="paper")
    torch.manual_seed(cell.seed)
    model = fastalps.ALPS(
        tuple(data.train.shape[2:]),
        data.train.shape[1],
        perturbation=PERTURBATION[cell.method],
        **recipe.model,
    )
    resume = (folder / CHECKPOINT).is_file()
    fitted = fastalps.Trainer(config, folder, progress=False).fit(model, data, resume)
    details = {
        "model": dataclasses.asdict(model.config),
        "flops_per_image": model.flops(),
        "training": dataclasses.asdict(config),
    }
    picked, ours = score_all(model, data.test), _best_kind(model, data)
    examples = _examples(data)
    figures.reconstructions(folder / "reconstructions.png", model, *examples)
    pictures.keep_examples(folder / pictures.EXAMPLES, model, *examples)
    chosen: dict[str, Any] = {
        "chosen_epoch": fitted.best_epoch,
        "chosen_by": "validation AUROC of 150 + 150",
        "ours": ours,
    }
    parts = {"paper": (picked, fitted.score, {**details, **chosen})}
    last = _last(fitted, data.test)
    chosen = {
        "chosen_epoch": config.epochs,
        "chosen_by": "fixed: the last epoch",
        "ours": recipe.strict_score,
    }
    parts["strict"] = (last, FIXED_KIND, {**details, **chosen})
    for protocol, (found, _, _) in parts.items():
        # With the energy, who reads it can compute the relative kinds.
        columns = ("image", "anomalous", *Scores._fields, "energy")
        rows = zip(
            data.test_names,
            data.test_labels.tolist(),
            *(kind.tolist() for kind in found),
            energy(data.test).tolist(),
            strict=True,
        )
        write_scores(folder / f"scores-{protocol}.csv", columns, rows)
    return parts


def _last(fitted: FitResult, images: Tensor) -> Scores:
    fitted.model.load_state_dict(fitted.last_weights)
    return score_all(fitted.model, images)


def _examples(data: OneClassData) -> tuple[Tensor, Tensor]:
    normal = (~data.test_labels).nonzero().flatten()[:8]
    anomalous = data.test_labels.nonzero().flatten()[:8]
    index = torch.cat([normal, anomalous])
    return data.test[index], data.test_labels[index]
