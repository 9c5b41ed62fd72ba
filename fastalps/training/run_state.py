"""What a run needs to go on bit for bit: one safetensors file, written after an epoch."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastalps import distributed
from fastalps.checkpoint import VERSION, check_state, read_tensors, save_tensors
from fastalps.errors import UserError
from fastalps.training.config import TrainConfig
from fastalps.training.steps import Steps
from fastalps.training.validation import Best

FORMAT = "fastalps-run"
# Options that may differ when a run goes on: how long, and how often it is saved.
FREE_OPTIONS = ("epochs", "checkpoint_every", "patience")


@dataclass
class RunState:
    """Where a run stands after `epoch` epochs."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    best_weights: dict[str, Tensor] = field(default_factory=dict)


class Average:
    """The exponential moving average of a model's weights and batch-norm statistics.

    ``average = decay * average + (1 - decay) * value`` after each step, with ``decay`` growing
    from 0.1 as (1 + step) / (10 + step), so that the random start is forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.step = decay, 0
        # Integer statistics (batch counts) have no average; the last one is kept.
        self.values = [v for v in model.state_dict().values() if v.is_floating_point()]
        self.averages = [value.detach().clone() for value in self.values]

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averages and the model's own values; call it again to undo."""
        for average, value in zip(self.averages, self.values, strict=True):
            held = value.clone()
            value.copy_(average)
            average.copy_(held)


def save_run(
    path: str | os.PathLike[str],
    state: RunState,
    steps: Steps,
    average: Average | None,
    config: TrainConfig,
    data: str,
) -> None:
    """Writes the checkpoint atomically. `data` tells which images are trained on."""
    tensors = {f"model.{name}": value for name, value in steps.model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.best_weights.items()}
    tensors |= {f"optimizer.{name}": value for name, value in steps.optimizer_tensors().items()}
    if average is not None:
        tensors |= {f"average.{i}": value for i, value in enumerate(average.averages)}
    progress = {
        "epoch": state.epoch,
        "history": state.history,
        "best": dataclasses.asdict(state.best),
        "scaler": steps.scaler.state_dict(),
        "average_step": 0 if average is None else average.step,
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "progress": json.dumps(progress),
        "config": json.dumps(dataclasses.asdict(config)),
        "model": json.dumps(dataclasses.asdict(steps.model.config)),
        "data": data,
    }
    save_tensors(path, tensors, metadata)


def load_run(
    path: str | os.PathLike[str],
    steps: Steps,
    average: Average | None,
    config: TrainConfig,
    data: str,
) -> RunState:
    """Reads a checkpoint into the model and its optimisers, in place.

    Raises:
        UserError: no such file, or it belongs to another configuration, model or data set.
    """
    tensors, metadata = read_tensors(path, FORMAT)
    try:
        progress = json.loads(metadata["progress"])
        best = Best(**progress["best"])
        best.quality = (float(best.quality[0]), float(best.quality[1]))
        state = RunState(progress["epoch"], progress["history"], best)
        _check_same(path, json.loads(metadata["config"]), dataclasses.asdict(config))
        _check_same(path, json.loads(metadata["model"]), _plain(steps.model.config))
        found_data = metadata["data"]
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a checkpoint of this version ({error!r})") from error
    if found_data != data:
        raise UserError(
            f"{path}: the run trained on other images ({found_data}; now {data}); "
            "resume with the same data and seed, or start a new run"
        )
    state.best_weights = _part(tensors, "best")
    weights = steps.model.state_dict()
    check_state(path, weights, _part(tensors, "model"))
    if state.best_weights:
        check_state(path, weights, state.best_weights)
    steps.model.load_state_dict(_part(tensors, "model"))
    steps.load_optimizer_tensors(_part(tensors, "optimizer"))
    steps.scaler.load_state_dict(progress["scaler"])
    if average is not None:
        for i, mine in enumerate(average.averages):
            mine.copy_(tensors[f"average.{i}"])
        average.step = progress["average_step"]
    return state


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {n.removeprefix(start): value for n, value in tensors.items() if n.startswith(start)}


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _check_same(path: str | os.PathLike[str], theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    # A schedule that ends with the run has another course when the run is longer.
    free = set(FREE_OPTIONS) - ({"epochs"} if mine.get("schedule") == "cosine" else set())
    if distributed.world_size() > 1:
        free.add("device")  # each process has its own
    for name in sorted({*theirs, *mine} - free):
        if theirs.get(name) != mine.get(name):
            raise UserError(
                f"{path}: the run has {name} = {theirs.get(name)!r}, now {mine.get(name)!r}; "
                "resume with the same options, or start a new run"
            )
