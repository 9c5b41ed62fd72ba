"""One model's training from epoch to epoch: everything but the steps on its batches."""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastalps import distributed
from fastalps.errors import UserError
from fastalps.files import write_text
from fastalps.models import ALPS
from fastalps.training.batches import Batches, epoch_seed
from fastalps.training.config import TrainConfig
from fastalps.training.run_state import Average, RunState, load_run, save_run
from fastalps.training.steps import Steps
from fastalps.training.validation import Validator

logger = logging.getLogger("fastalps")

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.csv"
# Between two lines of progress where there is no terminal.
REPORT_SECONDS = 10.0
COLUMNS = (
    "epoch",
    "normal_error",
    "perturbed_error",
    "distorter_error",
    "energy",
    "validation_normal",
    "validation_perturbed",
    "validation_average",
    "validation_auroc_normal",
    "validation_auroc_perturbed",
    "validation_auroc_average",
    "images_per_second",
)


@dataclass(frozen=True)
class FitResult:
    """What `Trainer.fit` gives.

    Attributes:
        model: the model given, with the kept weights, in eval mode.
        history: a row for each epoch: `epoch` from 1; mean squared errors of the training images
            `normal_error`, `perturbed_error`; in epochs that train the distorter, its
            `distorter_error` (which it raises) and the perturbation's `energy`; after a
            validation, `validation_*`: the mean scores of the normal validation images, and each
            score's AUROC where there are anomalous ones; `images_per_second` of the epoch's steps.
        best_epoch: the epoch whose weights were kept.
        selection: what picked it: "auroc", "loss" or "last".
        score: the kind of score to use: picked with the epoch by "auroc", else "average".
        last_weights: those of the last epoch (averaged, where `average_decay` is set), for who does
            not want an epoch picked.
    """

    model: ALPS
    history: list[dict[str, Any]]
    best_epoch: int
    selection: str
    score: str
    last_weights: dict[str, Tensor]


class Run:
    """A model, its data and optimisers, and where its training stands.

    Args:
        config: the options.
        run_dir: for history.csv and the checkpoint; None: nothing is written.
        loggers: called with each epoch's row of the history.
        model: on its device, in its memory format and in training mode.
        images: to train on.
        validator: what picks the epoch.
        resume: go on from the checkpoint.

    Raises:
        ValueError: batches that do not divide among processes.
        UserError: a checkpoint that does not fit, a folder that cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path | None,
        loggers: Sequence[Callable[[Mapping[str, Any]], None]],
        model: ALPS,
        images: Tensor,
        validator: Validator,
        resume: bool,
    ) -> None:
        self.config, self.run_dir, self.loggers = config, run_dir, loggers
        self.model, self.validator = model, validator
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.batches = Batches(images, config.batch_size, next(model.parameters()).device, layout)
        if self.batches.size % distributed.world_size():
            raise ValueError(
                f"batch_size: {self.batches.size} images do not divide among "
                f"{distributed.world_size()} processes; use a multiple of that number"
            )
        self.steps = Steps(model, config)
        self.average = Average(model, config.average_decay) if config.average_decay else None
        self.data = self.batches.fingerprint() if run_dir is not None else ""
        self.state = RunState()
        if resume:
            path = self._path(CHECKPOINT)
            self.state = load_run(path, self.steps, self.average, config, self.data)
        # They are of the weights that training replaces.
        model.calibration = model.quantization = None
        if resume:
            # It may be missing, or an epoch behind: it is written after the checkpoint.
            self._write_history()
            if self.done and not distributed.rank():
                logger.warning("%s: %s", run_dir, self._why_done())
        elif run_dir is not None:
            self._save()

    @property
    def done(self) -> bool:
        return self.stopped or self.state.epoch >= self.config.epochs

    @property
    def stopped(self) -> bool:
        """Whether patience is at its end: by the options of now, which may differ from those that
        the run began with."""
        patience = self.config.patience
        return patience is not None and self.state.best.age >= patience

    def begin_epoch(self, epoch: int) -> bool:
        """Sets the seed and the learning rates of an epoch; whether it trains the distorter."""
        self.steps.seed(epoch_seed(self.config.seed, epoch))
        self.steps.schedule(epoch)
        return self.model.distorter is not None and epoch % self.config.distorter_every == 0

    def row(self, epoch: int, sums: Sequence[float], seconds: float) -> dict[str, Any]:
        """The history's row of an epoch.

        Args:
            sums: over the epoch's batches: normal and perturbed error; error and energy of the
                distorter's steps.
            seconds: that the steps took.

        Raises:
            UserError: the sums are not finite.
        """
        mean = [value / len(self.batches) for value in sums]
        if not all(map(math.isfinite, mean)):
            raise UserError(
                f"training diverged: the mean error of epoch {epoch} is {mean[0]:g} (normal) and "
                f"{mean[1]:g} (perturbed); lower learning_rate, bound the perturbation, or set amp "
                "to off"
            )
        row: dict[str, Any] = {"epoch": epoch, "normal_error": mean[0], "perturbed_error": mean[1]}
        if self.model.distorter is not None and epoch % self.config.distorter_every == 0:
            row |= {"distorter_error": mean[2], "energy": mean[3]}
        row["images_per_second"] = len(self.batches) * self.batches.size / seconds
        return row

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Validates, logs and saves after the epoch of this row."""
        self.state.epoch += 1
        self._validate(row)
        for log in self.loggers:
            log(self.state.history[-1])
        due = self.done or not self.state.epoch % self.config.checkpoint_every
        if self.run_dir is not None and due:
            self._save()

    def result(self) -> FitResult:
        """The trained model, with the kept weights."""
        model, best = self.model, self.state.best
        if self.average is not None:
            self.average.swap()
        last_weights = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.state.best_weights)
        model.eval()
        return FitResult(
            model,
            self.state.history,
            best.epoch,
            self.validator.selection,
            best.kind,
            last_weights,
        )

    def _validate(self, row: dict[str, Any]) -> None:
        config, state, model, average = self.config, self.state, self.model, self.average
        if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
            if average is not None:
                average.swap()
            row |= self.validator.measure(model)
            if self.validator.update(state.best, state.epoch, row):
                weights = model.state_dict()
                state.best_weights = {name: value.clone() for name, value in weights.items()}
            if average is not None:
                average.swap()
        state.history.append({name: row[name] for name in COLUMNS if name in row})

    def _why_done(self) -> str:
        epoch, best, config = self.state.epoch, self.state.best, self.config
        if epoch >= config.epochs:
            return f"nothing is left to train: {epoch} epochs are done; raise epochs to go on"
        return (
            f"nothing is left to train: epoch {best.epoch} of {epoch} is the best, with patience "
            f"{config.patience}; raise patience to go on"
        )

    def _path(self, name: str) -> Path:
        assert self.run_dir is not None
        return self.run_dir / name

    def _save(self) -> None:
        if distributed.rank():
            return
        path = self._path(CHECKPOINT)
        save_run(path, self.state, self.steps, self.average, self.config, self.data)
        self._write_history()

    def _write_history(self) -> None:
        if distributed.rank():
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.state.history)
        write_text(self._path(HISTORY), text.getvalue())


class Progress:
    """A bar of steps with the errors and the time left; lines where there is no terminal.

    Args:
        shown: whether anything is.
        epochs, steps: of the whole training, and of each epoch.
        done: epochs that are behind.
    """

    def __init__(self, shown: bool, epochs: int, steps: int, done: int) -> None:
        self.shown, self.epochs = shown, epochs
        self.bar = tqdm(
            total=epochs * steps,
            initial=done * steps,
            unit="step",
            disable=None if shown else True,
            dynamic_ncols=True,
        )
        self.report = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self) -> None:
        self.bar.update()

    def tell(self, row: Mapping[str, Any], last: bool) -> None:
        """What an epoch came to."""
        self.bar.set_postfix_str(_summary(row))
        if self.shown and self.bar.disable and (last or time.monotonic() > self.report):
            # No terminal to draw a bar on: a line now and then.
            print(f"{_summary(row)} (of {self.epochs})", file=sys.stderr, flush=True)
            self.report = time.monotonic() + REPORT_SECONDS


def _summary(row: Mapping[str, Any]) -> str:
    parts = [f"epoch {row['epoch']}", f"normal {row['normal_error']:.5f}"]
    parts.append(f"perturbed {row['perturbed_error']:.5f}")
    aurocs = [value for name, value in row.items() if name.startswith("validation_auroc_")]
    if aurocs:
        parts.append(f"AUROC {100 * max(aurocs):.2f}%")
    return ", ".join(parts)
