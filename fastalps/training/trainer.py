"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalps import distributed
from fastalps.data import OneClassData
from fastalps.environment import find_device, has_fast_bfloat16
from fastalps.errors import UserError
from fastalps.files import make_folder
from fastalps.inputs import PIXEL_DTYPES, by, check_pixels
from fastalps.models import ALPS
from fastalps.training.config import TrainConfig
from fastalps.training.run import CHECKPOINT, HISTORY, FitResult, Progress, Run
from fastalps.training.steps import CapturedStep, Steps
from fastalps.training.validation import Validator

logger = logging.getLogger("fastalps")

__all__ = ["CHECKPOINT", "HISTORY", "FitResult", "Players", "Trainer", "choose_device"]


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

        Its threshold and the record of its int8 weights, `calibration` and `quantization`, are of
        the old weights: both are None as soon as training begins.

        Args:
            model: moved to the device of the configuration.
            data: a one-class task, or just normal images: uint8 (0 to 255) or floating (0 to 1),
                (N, C, H, W); with just images the last epoch is kept.
            resume: go on from the checkpoint in `run_dir`, bit for bit on the same machine.

        Returns:
            `FitResult`; the model has the kept weights and is in eval mode.

        Raises:
            ValueError: no images, images that do not fit the model, a frozen model, options that
                do not fit device or data.
            TypeError: wrong kinds, weights that are not float32.
            UserError: `run_dir` holds a checkpoint and `resume` is False, a checkpoint that does
                not fit, a folder that cannot be written, training that diverged.
        """
        if resume and self.run_dir is None:
            raise ValueError("resume: needs the run_dir of the run to go on with, got none")
        images, validator = self.prepare(model, data, resume)
        distributed.broadcast(model)
        with deterministic(self.config.deterministic), distributed.synchronised(model):
            run = Run(self.config, self.run_dir, self.loggers, model, images, validator, resume)
            steps, state = len(run.batches), run.state
            players = Players(run.steps)
            with Progress(self.progress, self.config.epochs, steps, state.epoch) as progress:
                while not run.done:
                    row = self._epoch(state.epoch + 1, run, players, progress)
                    run.finish_epoch(row)
                    progress.tell(row, run.done)
            return run.result()

    def prepare(
        self, model: ALPS, data: OneClassData | Tensor, resume: bool = False
    ) -> tuple[Tensor, Validator]:
        """Checks what `fit` was given and brings the model to its device, in training mode.

        Returns:
            the training images, and what validates the model on the others.

        Raises what `fit` does, before anything is written.
        """
        config = self.config
        check_model(model, config)
        images = data.train if isinstance(data, OneClassData) else data
        check_images(images, model, config)
        device = choose_device(config)
        if self.run_dir is not None and not resume:
            check_unused(self.run_dir, device)
        task = data if isinstance(data, OneClassData) else None
        selection = config.selection()
        if task is None and config.select == "auto":
            selection = "last"
        validator = Validator(task, selection)
        model.to(device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(memory_format=layout)  # type: ignore[call-overload]
        model.train()
        return images, validator

    def _epoch(self, epoch: int, run: Run, players: Players, progress: Progress) -> dict[str, Any]:
        adversary = run.begin_epoch(epoch)
        errors, contest = torch.zeros(2, 2, dtype=torch.float32, device=run.steps.device)
        start = time.perf_counter()
        for batch in run.batches.epoch(self.config.seed, epoch):
            errors += players.autoencoder(batch)
            if adversary:
                contest += players.distorter(batch)
            if run.average is not None:
                run.average.update()
            progress.step()
        # The epoch's only wait for the device.
        sums = distributed.average(torch.cat([errors, contest])).tolist()
        return run.row(epoch, sums, time.perf_counter() - start)


class Players:
    """Both players' steps, captured in CUDA graphs at their first batch where that is asked for."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
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
    device = find_device(config.device)
    if device.type == "cuda":
        return device
    if config.amp == "fp16":
        raise ValueError("amp: fp16 needs a CUDA device; use bf16 or off on a CPU")
    if config.cuda_graphs == "on":
        raise ValueError("cuda_graphs: 'on' needs a CUDA device; use auto or off on a CPU")
    if config.amp == "bf16" and not has_fast_bfloat16(device):
        logger.warning("amp: this CPU has no bfloat16 instructions; bf16 is slower than off here")
    return device


def check_unused(run_dir: Path, device: torch.device) -> None:
    """Raises UserError, in all processes, when any of them finds a checkpoint in the folder."""
    found = torch.tensor(float((run_dir / CHECKPOINT).exists()), device=device)
    # No process goes on, and writes one, before all have looked.
    if distributed.average(found):
        raise UserError(
            f"{run_dir} already holds a run ({CHECKPOINT}); go on with it by resume=True, or give "
            "another run_dir"
        )


def check_model(model: ALPS, config: TrainConfig) -> None:
    """Raises TypeError for weights that are not float32, ValueError for a player whose weights are
    all frozen."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise TypeError(
                f"model: expected float32 weights, got {value.dtype} ({name}); call model.float(), "
                "and set amp for mixed precision"
            )
    players = {"autoencoder": [*model.encoder.parameters(), *model.decoder.parameters()]}
    if model.distorter is not None and config.distorter_every <= config.epochs:
        players["distorter"] = list(model.distorter.parameters())
    for player, weights in players.items():
        if not any(weight.requires_grad for weight in weights):
            raise ValueError(
                f"model: expected weights to train, got a frozen {player}; call "
                "model.requires_grad_(True)"
            )


def check_images(images: object, model: ALPS, config: TrainConfig) -> None:
    """Raises ValueError or TypeError for images that this model cannot be trained on so."""
    if not isinstance(images, Tensor):
        raise TypeError(f"data: expected OneClassData or a tensor, got {type(images).__name__}")
    if images.dtype not in PIXEL_DTYPES:
        raise TypeError(
            f"data: expected uint8 (0 to 255) or floating (0 to 1) images, got {images.dtype}; "
            "convert them"
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
    # Statistics of one value would make nothing but zeros of it.
    lone = config.batch_size == 1 and model.config.map_sizes()[-1] == (1, 1)
    if lone and model.config.batch_norm:
        raise ValueError(
            f"batch_size: expected at least 2, which batch norm needs for images as small as "
            f"{by(model.config.image_size)}, got 1; raise it, or set batch_norm to False"
        )
    check_pixels("training images", images)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
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
