"""The training loop."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastalps import distributed
from fastalps.data import OneClassData
from fastalps.environment import has_fast_bfloat16
from fastalps.errors import UserError
from fastalps.files import make_folder, write_text
from fastalps.models import ALPS
from fastalps.training.batches import Batches, epoch_seed
from fastalps.training.config import TrainConfig
from fastalps.training.run_state import Average, RunState, load_run, save_run
from fastalps.training.steps import CapturedStep, Steps
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


class Trainer:
    """Trains an ALPS model, or with another perturbation its rivals: see `ModelConfig`.

    Per batch, the autoencoder takes one Adam step on
    ``normal_weight * mean(normal) + perturbed_weight * mean(perturbed)``; in every
    `distorter_every`-th epoch the distorter takes one after it, on
    ``energy_penalty * mean(energy) - mean(perturbed)``. Source: ALPS, section III.

    Args:
        config: the options.
        run_dir: a folder for history.csv and the checkpoint; None: nothing is written.
        progress: show a bar with the errors and the time left; lines where there is no terminal.
        loggers: called with each epoch's row of the history as soon as it is known, in the first
            process only; such as `fastalps.training.TensorBoardLogger`.

    Raises:
        UserError: `run_dir` cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        loggers: Sequence[Callable[[Mapping[str, Any]], None]] = (),
    ) -> None:
        self.config = config or TrainConfig()
        self.run_dir = None if run_dir is None else make_folder(run_dir)
        self.progress = progress and not distributed.rank()
        self.loggers = () if distributed.rank() else tuple(loggers)

    def fit(self, model: ALPS, data: OneClassData | Tensor, resume: bool = False) -> FitResult:
        """Trains `model` in place.

        Args:
            model: moved to the device of the configuration.
            data: a one-class task, or just normal images: uint8 (0 to 255) or floating (0 to 1),
                (N, C, H, W); with just images the last epoch is kept.
            resume: go on from the checkpoint in `run_dir`, bit for bit on the same machine.

        Returns:
            `FitResult`; the model has the kept weights and is in eval mode.

        Raises:
            ValueError: no images, images that do not fit the model, options that do not fit device
                or data.
            TypeError: wrong kinds.
            UserError: a checkpoint that does not fit, a folder that cannot be written, training
                that diverged.
        """
        if resume and self.run_dir is None:
            raise ValueError("resume: needs the run_dir of the run to go on with, got none")
        images = data.train if isinstance(data, OneClassData) else data
        _check_images(images, model)
        device = choose_device(self.config)
        task = data if isinstance(data, OneClassData) else None
        selection = self.config.selection()
        if task is None and self.config.select == "auto":
            selection = "last"
        validator = Validator(task, selection)
        model.to(device)
        distributed.broadcast(model)
        with _deterministic(self.config.deterministic), distributed.synchronised(model):
            return self._fit(model, images, validator, resume)

    def _fit(self, model: ALPS, images: Tensor, validator: Validator, resume: bool) -> FitResult:
        config = self.config
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(memory_format=layout)  # type: ignore[call-overload]
        model.train()
        batches = Batches(images, config.batch_size, next(model.parameters()).device, layout)
        if batches.size % distributed.world_size():
            raise ValueError(
                f"batch_size: {batches.size} images do not divide among "
                f"{distributed.world_size()} processes; use a multiple of that number"
            )
        steps = Steps(model, config)
        average = Average(model, config.average_decay) if config.average_decay else None
        state = RunState()
        data = batches.fingerprint() if self.run_dir is not None else ""
        if resume:
            state = load_run(self._path(CHECKPOINT), steps, average, config, data)
        players = Players(steps)
        report = 0.0
        with tqdm(
            total=config.epochs * len(batches),
            initial=state.epoch * len(batches),
            unit="step",
            disable=None if self.progress else True,
            dynamic_ncols=True,
        ) as bar:
            if self.run_dir is not None and not resume:
                self._save(state, steps, average, data)
            while state.epoch < config.epochs and not state.stopped:
                row = self._epoch(state.epoch + 1, players, batches, average, bar)
                state.epoch += 1
                self._validate(state, model, validator, average, row)
                for log in self.loggers:
                    log(state.history[-1])
                bar.set_postfix_str(_summary(row))
                last = state.stopped or state.epoch == config.epochs
                if self.progress and bar.disable and (last or time.monotonic() > report):
                    # No terminal to draw a bar on: a line now and then.
                    print(f"{_summary(row)} (of {config.epochs})", file=sys.stderr, flush=True)
                    report = time.monotonic() + REPORT_SECONDS
                if self.run_dir is not None and (last or not state.epoch % config.checkpoint_every):
                    self._save(state, steps, average, data)
        if average is not None:
            average.swap()
        last_weights = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state.best_weights)
        model.eval()
        best = state.best
        return FitResult(
            model, state.history, best.epoch, validator.selection, best.kind, last_weights
        )

    def _epoch(
        self, epoch: int, players: Players, batches: Batches, average: Average | None, bar: tqdm
    ) -> dict[str, Any]:
        config = self.config
        adversary = players.has_distorter and epoch % config.distorter_every == 0
        players.steps.seed(epoch_seed(config.seed, epoch))
        players.steps.schedule(epoch)
        errors = torch.zeros(2, device=players.steps.device)
        contest = torch.zeros(2, device=players.steps.device)
        start = time.perf_counter()
        for batch in batches.epoch(config.seed, epoch):
            errors += players.autoencoder(batch)
            if adversary:
                contest += players.distorter(batch)
            if average is not None:
                average.update()
            bar.update()
        # The epoch's only wait for the device.
        sums = distributed.average(torch.cat([errors, contest]))
        mean = (sums / len(batches)).tolist()
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, mean)):
            raise UserError(
                f"training diverged: the mean error of epoch {epoch} is {mean[0]:g} (normal) and "
                f"{mean[1]:g} (perturbed); lower learning_rate, bound the perturbation, or set amp "
                "to off"
            )
        row: dict[str, Any] = {"epoch": epoch, "normal_error": mean[0], "perturbed_error": mean[1]}
        if adversary:
            row |= {"distorter_error": mean[2], "energy": mean[3]}
        row["images_per_second"] = len(batches) * batches.size / seconds
        return row

    def _validate(
        self,
        state: RunState,
        model: ALPS,
        validator: Validator,
        average: Average | None,
        row: dict[str, Any],
    ) -> None:
        config = self.config
        if state.epoch % config.validate_every == 0 or state.epoch == config.epochs:
            if average is not None:
                average.swap()
            row |= validator.measure(model)
            if validator.update(state.best, state.epoch, row):
                weights = model.state_dict()
                state.best_weights = {name: value.clone() for name, value in weights.items()}
            if average is not None:
                average.swap()
            state.stopped = config.patience is not None and state.best.age >= config.patience
        state.history.append({name: row[name] for name in COLUMNS if name in row})

    def _path(self, name: str) -> Path:
        assert self.run_dir is not None
        return self.run_dir / name

    def _save(self, state: RunState, steps: Steps, average: Average | None, data: str) -> None:
        if distributed.rank():
            return
        save_run(self._path(CHECKPOINT), state, steps, average, self.config, data)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(state.history)
        write_text(self._path(HISTORY), text.getvalue())


class Players:
    """Both players' steps, captured in CUDA graphs at their first batch where that is asked for."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.has_distorter = "distorter" in steps.optimizers
        wish = steps.config.cuda_graphs
        # Messages between processes are not captured.
        alone = distributed.world_size() == 1
        self.capture = wish == "on" or (wish == "auto" and steps.device.type == "cuda" and alone)
        self._captured: dict[str, Callable[[Tensor], Tensor]] = {}

    def autoencoder(self, batch: Tensor) -> Tensor:
        return self._step("autoencoder", self.steps.autoencoder, batch)

    def distorter(self, batch: Tensor) -> Tensor:
        return self._step("distorter", self.steps.distorter, batch)

    def _step(self, name: str, step: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if not self.capture:
            return step(batch)
        if name not in self._captured:
            self._captured[name] = CapturedStep(step, batch, self.steps)
        return self._captured[name](batch)


def choose_device(config: TrainConfig) -> torch.device:
    """The device of a configuration, checked against its other options.

    Raises:
        ValueError: no such device here, or an option that it cannot do.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu or cuda[:n], got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda[:n], got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise ValueError(f"device: {name} is not here ({count} CUDA devices); use cpu or auto")
        return device
    if config.amp == "fp16":
        raise ValueError("amp: fp16 needs a CUDA device; use bf16 or off on a CPU")
    if config.cuda_graphs == "on":
        raise ValueError("cuda_graphs: 'on' needs a CUDA device; use auto or off on a CPU")
    if config.amp == "bf16" and not has_fast_bfloat16(device):
        logger.warning("amp: this CPU has no bfloat16 instructions; bf16 is slower than off here")
    return device


def _check_images(images: object, model: ALPS) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"data: expected OneClassData or a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(
            f"data: expected uint8 (0 to 255) or floating (0 to 1) images, got {images.dtype}"
        )
    shape = (model.config.channels, *model.config.image_size)
    if images.dim() != 4 or tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"data: the model takes images (N, {', '.join(map(str, shape))}), "
            f"got {tuple(images.shape)}; build the model for them, or resize them"
        )
    smallest = 2 if model.config.batch_norm else 1
    if len(images) < smallest:
        raise ValueError(
            f"data: expected at least {smallest} training images, got {len(images)}; "
            "there is nothing to learn from"
        )
    if images.is_floating_point() and not torch.isfinite(images).all():
        raise ValueError("data: training images have NaN or infinite pixels; clean them first")


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms that give the same bits every time."""
    if not wanted:
        yield
        return
    # cuBLAS reads this at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # It would fill every buffer that a kernel is about to write anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _summary(row: dict[str, Any]) -> str:
    parts = [f"epoch {row['epoch']}", f"normal {row['normal_error']:.5f}"]
    parts.append(f"perturbed {row['perturbed_error']:.5f}")
    aurocs = [value for name, value in row.items() if name.startswith("validation_auroc_")]
    if aurocs:
        parts.append(f"AUROC {100 * max(aurocs):.2f}%")
    return ", ".join(parts)
