"""How a model is trained: every option, typed once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fastalps.scalars import is_whole, plain

CHOICES = {
    "amp": ("off", "bf16", "fp16"),
    "cuda_graphs": ("auto", "on", "off"),
    "protocol": ("paper", "strict"),
    "schedule": ("constant", "cosine"),
    "select": ("auto", "auroc", "loss", "last"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; images that fill no batch sit out the epoch.
        learning_rate: of Adam, for the autoencoder.
        distorter_learning_rate: for the distorter; the autoencoder's where None.
        schedule: of both learning rates: constant, or cosine: from epoch to epoch down to nearly 0,
            ``0.5 * (1 + cos(pi * (epoch - 1) / epochs))`` times the rate, which ends a short
            training at weights that no longer jump.
        beta1: Adam's decay of the gradient's mean.
        beta2: Adam's decay of the gradient's square.
        distorter_every: the distorter is trained in every n-th epoch only (epochs n, 2n, ...).
        normal_weight: weight of the normal reconstruction error in the autoencoder's loss.
        perturbed_weight: weight of the perturbed one; the paper wants the normal one larger.
        energy_penalty: weight of the perturbation's energy in the distorter's loss; 0: it is free
            to grow.
        amp: automatic mixed precision: off, bf16, or fp16 (CUDA only).
        cuda_graphs: whole steps as CUDA graphs: auto (where the device is CUDA), on, off.
        compile: torch.compile the encoder and decoder in the autoencoder's step.
        channels_last: memory format of images and weights.
        protocol: paper (validation with anomalies picks epoch and score kind) or strict (no anomaly
            is seen before test).
        select: what picks the epoch: auroc, loss (the normal validation images' average error),
            last, or auto (auroc for paper, loss for strict).
        patience: stop after this many validations without improvement; None: never.
        validate_every: epochs between validations.
        average_decay: decay per step of the exponential moving average of the weights that is
            validated and kept; 0: the weights themselves.
        seed: of shuffling and noise; the commands draw the first weights with it, too.
        deterministic: only deterministic algorithms.
        device: cpu, cuda, cuda:1, ... or auto.
        checkpoint_every: epochs between checkpoints, from which a run resumes.
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    distorter_learning_rate: float | None = None
    schedule: str = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    distorter_every: int = 5
    normal_weight: float = 1.0
    perturbed_weight: float = 0.5
    energy_penalty: float = 0.0
    amp: str = "off"
    cuda_graphs: str = "auto"
    compile: bool = False
    channels_last: bool = True
    protocol: str = "paper"
    select: str = "auto"
    patience: int | None = None
    validate_every: int = 1
    average_decay: float = 0.0
    seed: int = 0
    deterministic: bool = False
    device: str = "auto"
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
        for name in ("epochs", "batch_size", "distorter_every", "validate_every"):
            self._at_least(name, 1)
        self._at_least("checkpoint_every", 1)
        self._at_least("seed", 0)
        if self.patience is not None:
            self._at_least("patience", 1)
        for name in ("learning_rate", "distorter_learning_rate", "normal_weight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("perturbed_weight", "energy_penalty"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        for name in ("beta1", "beta2", "average_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected in [0, 1), got {value}")
        if self.select == "auroc" and self.protocol == "strict":
            raise ValueError(
                "select: 'auroc' needs anomalies, which the strict protocol forbids before test; "
                "use 'loss' or 'last'"
            )

    def _at_least(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if not is_whole(value, smallest):
            raise ValueError(f"{name}: expected an integer of at least {smallest}, got {value!r}")

    def selection(self) -> str:
        """What picks the epoch: "auroc", "loss" or "last"."""
        if self.select != "auto":
            return self.select
        return "auroc" if self.protocol == "paper" else "loss"
