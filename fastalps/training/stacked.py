"""Several models of one shape trained together: as many independent trainings, stepped as one.

A step of these small networks is a hundred short kernels, far too little for a GPU; ten models one
after the other pay for every one of them ten times. Here the K models' layers become one network's:
convolutions of K groups, batch norms over K times the channels (which are K batch norms), dense
layers as batched matrix products. Row ``n * K + k`` of a batch is image n of model k, so everything
that is computed a sample at a time (perturbation, errors) is what it is for one model.

Each model stays whole: its weights and statistics are slices of the network's tensors along the
first dimension, so its own optimiser, average, validation and checkpoint work on it as if it were
trained alone, and its result is the same up to rounding. (On CUDA devices the noise of
``perturbation="noise"`` comes from one generator for all models: other numbers, as random.)

An epoch takes as many steps as the model with the most batches. A model that has had all of its own
idles: it is computed with the others, but neither its weights nor its statistics change.

Why so, and not otherwise: K streams, or a graph of K branches, launch K times the kernels, each
too short for its launch; `torch.func.vmap` computes grouped convolutions, too, but wants rules for
our ops and functional optimisers; one Adam over the whole network's weights would need one step
count for all, which models that idle do not have. ``bench/run.py training`` times the streams
beside this form, as a GPU's grouped convolutions are not equally good at all shapes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalps import distributed
from fastalps.data import OneClassData
from fastalps.errors import UserError
from fastalps.models import ALPS, alterations
from fastalps.training.batches import Batches
from fastalps.training.config import TrainConfig
from fastalps.training.grouped import stack, unstack
from fastalps.training.run import FitResult, Progress, Run
from fastalps.training.steps import Steps
from fastalps.training.trainer import Players, Trainer, deterministic


def fit_stacked(
    trainers: Sequence[Trainer],
    models: Sequence[ALPS],
    data: Sequence[OneClassData | Tensor],
    resume: Sequence[bool] | None = None,
) -> list[FitResult]:
    """What ``trainer.fit(model, data, resume)`` gives for each of them, trained together.

    As there, the models' `calibration` and `quantization` are None as soon as training begins.

    Args:
        trainers: one for each model; their options may differ in the seed only.
        models: of one configuration.
        data: for each model; of one dtype, of any number of images that fills a batch.
        resume: for each, whether to go on from its trainer's checkpoint; None: no. Checkpoints are
            those of `Trainer.fit`: a training may begin alone and go on stacked, or the other way
            round.

    Returns:
        `FitResult` for each. `images_per_second` in its history are the model's own images by the
        time that all models took.

    Raises:
        ValueError: as `Trainer.fit`; options, models or data that do not go together.
        TypeError: as `Trainer.fit`.
        UserError: as `Trainer.fit`; one model that diverges stops them all.
    """
    resume = [False] * len(models) if resume is None else resume
    config = _check(trainers, models, data, resume)
    prepared = [
        trainer.prepare(model, images, again)
        for trainer, model, images, again in zip(trainers, models, data, resume, strict=True)
    ]
    _check_images([images for images, _ in prepared], config.batch_size)
    with deterministic(config.deterministic):
        network = stack(models)
        try:
            runs = [
                Run(t.config, t.run_dir, t.loggers, model, images, validator, again)
                for t, model, (images, validator), again in zip(
                    trainers, models, prepared, resume, strict=True
                )
            ]
            _fit(network, runs, any(t.progress for t in trainers))
            return [run.result() for run in runs]
        finally:
            unstack(models)


def _fit(network: ALPS, runs: Sequence[Run], progress: bool) -> None:
    players = Players(StackedSteps(network, [run.steps for run in runs]))
    batches = StackedBatches([run.batches for run in runs])
    longest = max(len(run.batches) for run in runs)
    begun = min(run.state.epoch for run in runs)
    with Progress(progress, runs[0].config.epochs, longest, begun) as bar:
        while waiting := [run for run in runs if not run.done]:
            epoch = 1 + min(run.state.epoch for run in waiting)
            # After a stop between two checkpoints of one epoch some models are ahead.
            active = [not run.done and run.state.epoch < epoch for run in runs]
            rows = _epoch(epoch, runs, active, players, batches, bar)
            for run, row in rows:
                run.finish_epoch(row)
            names = ("epoch", "normal_error", "perturbed_error")
            mean = {name: sum(row[name] for _, row in rows) / len(rows) for name in names}
            bar.tell({**mean, "epoch": epoch}, all(run.done for run in runs))


def _epoch(
    epoch: int,
    runs: Sequence[Run],
    active: Sequence[bool],
    players: Players,
    batches: StackedBatches,
    bar: Progress,
) -> list[tuple[Run, dict[str, Any]]]:
    """Trains the active models for their epoch; returns them with their rows of the history."""
    steps = players.steps
    assert isinstance(steps, StackedSteps)
    # The options are the same, so the models agree on whether the distorter is trained.
    adversary = [run.begin_epoch(epoch) for run, now in zip(runs, active, strict=True) if now].pop()
    lengths = [len(run.batches) * now for run, now in zip(runs, active, strict=True)]
    sums = torch.zeros(4, len(runs), dtype=torch.float32, device=steps.device)
    statistics: dict[int, list[Tensor]] = {}
    start = time.perf_counter()
    for number, batch in enumerate(batches.epoch([r.config.seed for r in runs], epoch, lengths)):
        working = [number < length for length in lengths]
        if number in (0, *lengths):
            steps.rest([not works for works in working])
        for k, run in enumerate(runs):
            if not working[k] and k not in statistics:
                statistics[k] = [buffer.clone() for buffer in run.model.buffers()]
        sums[:2] += players.autoencoder(batch).where(steps.idle == 0, 0)
        if adversary:
            sums[2:] += players.distorter(batch).where(steps.idle == 0, 0)
        for run, works in zip(runs, working, strict=True):
            if works and run.average is not None:
                run.average.update()
        bar.step()
    # The epoch's only wait for the device.
    totals = sums.T.tolist()
    seconds = time.perf_counter() - start
    for k, kept in statistics.items():
        for buffer, value in zip(runs[k].model.buffers(), kept, strict=True):
            buffer.copy_(value)
    rows = []
    for k, run in enumerate(runs):
        if active[k]:
            try:
                rows.append((run, run.row(epoch, totals[k], seconds)))
            except UserError as error:
                raise UserError(f"model {k} of the stack: {error}") from error
    return rows


class StackedSteps(Steps):
    """Both players' steps of all models at once, each model's weights moved by its own optimiser.

    Both steps take (N * K, C, H, W), row ``n * K + k`` for model k, and return (2, K).

    Args:
        network: `stack` of the models, in training mode.
        each: the models' own steps.
    """

    def __init__(self, network: ALPS, each: Sequence[Steps]) -> None:
        self.each = list(each)
        super().__init__(network, each[0].config)
        # 1 where a model is not to move.
        self.idle = torch.zeros(len(each), dtype=torch.float32, device=self.device)
        for steps, idle in zip(each, self.idle, strict=True):
            for optimizer in steps.optimizers.values():
                # What a gradient scaler sets where gradients overflow: the fused kernel reads it
                # and leaves weights, moments and step count alone, in a captured step, too.
                optimizer.found_inf = idle  # type: ignore[attr-defined]
        parts = (steps.model.parameters() for steps in each)
        self.shares = list(zip(network.parameters(), *parts, strict=True))

    def rest(self, idle: Sequence[bool]) -> None:
        """Which models the next steps are to leave alone."""
        self.idle.copy_(torch.tensor(idle))

    def autoencoder(self, images: Tensor) -> Tensor:
        with _chosen_by_time(not self.config.deterministic):
            return super().autoencoder(images)

    def distorter(self, images: Tensor) -> Tensor:
        with _chosen_by_time(not self.config.deterministic):
            return super().distorter(images)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Those of all models: "<model's number>.<name>"."""
        return {
            f"{k}.{name}": value
            for k, steps in enumerate(self.each)
            for name, value in steps.optimizer_tensors().items()
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}

    def _mean(self, values: Tensor) -> Tensor:
        """(..., N * K) -> (..., K)."""
        return values.unflatten(-1, (-1, len(self.each))).mean(-2)

    def _descend(self, loss: Tensor, player: str) -> None:
        # No model's loss depends on another's weights.
        loss.sum().backward()
        for whole, *pieces in self.shares:
            if whole.grad is not None:
                for piece, gradient in zip(pieces, whole.grad.chunk(len(pieces)), strict=True):
                    piece.grad = gradient
        for steps in self.each:
            optimizer = steps.optimizers[player]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _perturbation(self, images: Tensor) -> Tensor:
        if self.model.config.perturbation != "noise" or self.device.type == "cuda":
            return self.model.distort(images)
        rows = images[:: len(self.each)]
        drawn = [steps.model.distort(rows, steps.noise) for steps in self.each]
        return torch.stack(drawn, 1).flatten(0, 1)


class StackedBatches:
    """The batches of several models, one of each side by side.

    Args:
        parts: of one batch size, on one device; they keep their images in common from then on.
    """

    def __init__(self, parts: Sequence[Batches]) -> None:
        self.parts = parts
        self.all = copy.copy(parts[0])
        self.all.images = torch.cat([part.images for part in parts])
        counts = [len(part.images) for part in parts]
        self.first = [sum(counts[:k]) for k in range(len(parts))]
        for part, images in zip(parts, self.all.images.split(counts), strict=True):
            part.images = images

    def epoch(self, seeds: Sequence[int], epoch: int, lengths: Sequence[int]) -> Iterator[Tensor]:
        """As many batches as the longest of `lengths`, (N * K, C, H, W), row n * K + k of model k.

        A model whose length is passed gets its last batch again; it is to idle.
        """
        numbers = torch.arange(max(lengths), device=self.all.images.device)
        rows = [
            part.order(seed, epoch)[numbers.clamp(max=max(0, length - 1))] + first
            for part, seed, length, first in zip(
                self.parts, seeds, lengths, self.first, strict=True
            )
        ]
        for chosen in torch.stack(rows, 2).flatten(1):
            yield self.all.take(chosen)


@contextlib.contextmanager
def _chosen_by_time(wanted: bool) -> Iterator[None]:
    """cuDNN tries its algorithms and keeps the fastest: its guesses are poor for many groups."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _check(
    trainers: Sequence[Trainer],
    models: Sequence[ALPS],
    data: Sequence[OneClassData | Tensor],
    resume: Sequence[bool],
) -> TrainConfig:
    """The common options of what can be trained together."""
    counts = {"trainers": len(trainers), "data": len(data), "resume": len(resume)}
    for name, count in counts.items():
        if count != len(models) or not count:
            raise ValueError(f"{name}: expected one for each of {len(models)} models, got {count}")
    config = trainers[0].config
    _same("trainers", [dataclasses.replace(t.config, seed=0) for t in trainers])
    _same("models", [model.config for model in models])
    if len({id(model) for model in models}) < len(models):
        raise ValueError("models: expected as many models as trainers, got one of them twice")
    for model in models:
        if altered := alterations(model):
            raise ValueError(f"models: {altered}, which a stack would not have; fit it alone")
    if config.amp == "fp16":
        raise ValueError("amp: fp16 scales the gradients of a stack as one; use bf16 or off")
    if distributed.world_size() > 1:
        raise ValueError("fit_stacked: trains in one process; start it without torchrun")
    for trainer, again in zip(trainers, resume, strict=True):
        if again and trainer.run_dir is None:
            raise ValueError("resume: needs the run_dir of the run to go on with, got none")
    return config


def _same(what: str, configs: Sequence[Any]) -> None:
    for k, config in enumerate(configs):
        for field in dataclasses.fields(config):
            first, mine = (getattr(c, field.name) for c in (configs[0], config))
            if first != mine:
                raise ValueError(
                    f"{what}: a stack has one {field.name}, got {first!r} (number 0) and {mine!r} "
                    f"(number {k}); train them alone"
                )


def _check_images(images: Sequence[Tensor], batch_size: int) -> None:
    dtypes = {part.dtype for part in images}
    if len(dtypes) > 1:
        raise ValueError(f"data: a stack has images of one dtype, got {sorted(map(str, dtypes))}")
    sizes = sorted({min(batch_size, len(part)) for part in images})
    if len(sizes) > 1:
        raise ValueError(
            f"batch_size: every model of a stack needs {sizes[-1]} images for a batch, one has "
            f"{sizes[0]}; use a batch_size of at most {sizes[0]}"
        )
