"""One optimisation step of each player, eager or captured whole in a CUDA graph.

The autoencoder minimises ``normal_weight * mean(normal) + perturbed_weight * mean(perturbed)``,
the distorter maximises ``mean(perturbed) - energy_penalty * mean(energy)``. Source: ALPS, section
III-C.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastalps import distributed, ops
from fastalps.models import ALPS
from fastalps.training.config import TrainConfig

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No gradients for the network's weights, and its batch norms leave their statistics alone."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in norms]
    parameters = [p for p in network.parameters() if p.requires_grad]
    counts = [layer.num_batches_tracked for layer in norms]
    for layer in norms:
        # Zero momentum keeps the running statistics; batch statistics still normalise.
        layer.momentum = 0.0
        layer.num_batches_tracked = None
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for layer, momentum, count in zip(norms, momenta, counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked = count
        for parameter in parameters:
            parameter.requires_grad_(True)


def zero_unmet_taps(model: ALPS) -> None:
    """Makes the gradients zero of taps that meet no pixel of the smallest maps, as they are.

    oneDNN (of torch 2.13) leaves them unwritten for maps of one pixel, in bf16 on processors with
    AVX-512 but without its bf16 instructions: weights became NaN.
    """
    large, small = model.config.map_sizes()[3:]
    rows, columns = (
        torch.tensor([any(0 <= 2 * s - 1 + tap < n for s in range(m)) for tap in range(3)])
        for n, m in zip(large, small, strict=True)
    )
    met = rows[:, None] & columns
    encoders = [model.encoder] + ([] if model.distorter is None else [model.distorter.encoder])
    layers: list[nn.Module] = [
        [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)][-1]
        for encoder in encoders
    ]
    layers.append(next(x for x in model.decoder.modules() if isinstance(x, nn.ConvTranspose2d)))
    for layer in layers:
        weight = layer.weight
        if not met.all() and isinstance(weight, Tensor) and weight.requires_grad and weight.is_leaf:
            weight.register_hook(lambda grad: torch.where(met, grad, 0))


class Steps:
    """Both players' optimisers and their steps on one batch.

    Args:
        model: on its device, in training mode.
        config: the options.
    """

    def __init__(self, model: ALPS, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.rates = {"autoencoder": config.learning_rate}
        if model.distorter is not None:
            self.rates["distorter"] = config.distorter_learning_rate or config.learning_rate
        self.optimizers = self._optimizers()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        compiled = torch.compile if config.compile else (lambda network: network)
        self.encode = compiled(model.encoder)
        self.decode = compiled(model.decoder)
        self.noise = torch.Generator(self.device)
        if self.device.type == "cpu" and config.amp == "bf16":
            zero_unmet_taps(model)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Each player's Adam."""
        model, config = self.model, self.config
        players = {"autoencoder": [*model.encoder.parameters(), *model.decoder.parameters()]}
        if model.distorter is not None:
            players["distorter"] = list(model.distorter.parameters())
        cuda = self.device.type == "cuda"
        # Fused: one kernel for all weights. Capturable: its step count lives on the device.
        options: dict[str, Any] = {"fused": True, "capturable": cuda}
        rates: dict[str, Any] = dict(self.rates)
        if cuda:
            # A captured step reads the rate from the device, where the schedule can change it.
            rates = {
                name: torch.tensor(rate, dtype=torch.float32, device=self.device)
                for name, rate in self.rates.items()
            }
        return {
            name: torch.optim.Adam(
                weights,
                lr=rates[name],
                betas=(config.beta1, config.beta2),
                **options,
            )
            for name, weights in players.items()
        }

    def schedule(self, epoch: int) -> None:
        """Sets the learning rates of an epoch, counted from 1."""
        factor = 1.0
        if self.config.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * (epoch - 1) / self.config.epochs))
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                rate = factor * self.rates[name]
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for the networks; the errors are float32 in any case."""
        if self.config.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.config.amp])

    def autoencoder(self, images: Tensor) -> Tensor:
        """One step of encoder and decoder; returns the (2,) mean errors, detached."""
        model, config = self.model, self.config
        model.zero_grad(set_to_none=True)
        with self.autocast():
            latent = self.encode(images)
            if model.config.perturbation == "none":
                logits = self.decode(latent)
            else:
                with torch.no_grad():
                    perturbation = self._perturbation(images)
                    perturbation = perturbation.to(latent.dtype)
                perturbed, _ = ops.perturb_latent(latent, perturbation, model.config.strength)
                logits = self.decode(torch.cat([latent, perturbed]))
        if model.config.perturbation == "none":
            error = self._mean(ops.sigmoid_mse(logits, images))
            errors = error.expand(2, *error.shape)
            loss = config.normal_weight * errors[0]
        else:
            errors = self._mean(ops.paired_sigmoid_mse(logits, images))
            loss = config.normal_weight * errors[0] + config.perturbed_weight * errors[1]
        self._descend(loss, "autoencoder")
        return errors.detach()

    def distorter(self, images: Tensor) -> Tensor:
        """One step of the distorter; returns (2,): perturbed error and energy, detached."""
        model, config = self.model, self.config
        model.zero_grad(set_to_none=True)
        with frozen(model.encoder), frozen(model.decoder):
            with self.autocast():
                with torch.no_grad():
                    latent = model.encoder(images)
                perturbation = model.distort(images).to(latent.dtype)
                perturbed, energy = ops.perturb_latent(latent, perturbation, model.config.strength)
                logits = model.decoder(perturbed)
            error = self._mean(ops.sigmoid_mse(logits, images))
            energy = self._mean(energy)
            self._descend(config.energy_penalty * energy - error, "distorter")
        return torch.stack([error, energy]).detach()

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the batch, (..., N) -> (...)."""
        return values.mean(-1)

    def _descend(self, loss: Tensor, player: str) -> None:
        optimizer = self.optimizers[player]
        # A disabled scaler passes everything through. Fused optimisers unscale in their kernel, so
        # nothing is read back.
        self.scaler.scale(loss).backward()
        distributed.average_gradients(optimizer.param_groups[0]["params"])
        self.scaler.step(optimizer)
        self.scaler.update()

    def _perturbation(self, images: Tensor) -> Tensor:
        model, share = self.model, distributed.share
        if model.config.perturbation != "noise" or distributed.world_size() == 1:
            return model.distort(images, self._generator())
        # The noise of the whole batch, of which this process takes its own rows.
        whole = images.new_empty(1).expand(len(images) * distributed.world_size(), 1)
        return model.distort(whole, self._generator())[share(len(whole))]

    def _generator(self) -> torch.Generator | None:
        # Under capture, noise comes from the default generator, which graphs know how to advance.
        return None if self.device.type == "cuda" else self.noise

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimisers' state by name: "<player>.<parameter's number>.<name>"."""
        found = {}
        for player, optimizer in self.optimizers.items():
            for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    found[f"{player}.{number}.{name}"] = value
        return found

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `optimizer_tensors` gave."""
        for key, value in tensors.items():
            player, number, name = key.split(".")
            optimizer = self.optimizers[player]
            parameter = optimizer.param_groups[0]["params"][int(number)]
            # The parameter's strides, too: fused optimisers walk both in memory order.
            home = torch.empty_like(parameter) if value.dim() else value.to(parameter.device)
            optimizer.state[parameter][name] = home.copy_(value)

    def seed(self, seed: int) -> None:
        """Seeds the noise: called at each epoch, so that a resumed run draws the same."""
        self.noise.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class CapturedStep:
    """A step as one CUDA graph: static batch in, static results out, one launch."""

    def __init__(
        self, step: Callable[[Tensor], Tensor], batch: Tensor, steps: Steps, warm_up: int = 3
    ) -> None:
        self.batch = batch.clone(memory_format=torch.preserve_format)
        state = _snapshot(steps)
        stream = torch.cuda.Stream(batch.device)
        stream.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(stream):
            for _ in range(warm_up):  # kernels are chosen and optimiser states made outside
                step(self.batch)
        torch.cuda.current_stream(batch.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        steps.model.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.result = step(self.batch)
        _restore(steps, state)

    def __call__(self, images: Tensor) -> Tensor:
        self.batch.copy_(images)
        self.graph.replay()
        return self.result.clone()


def _tensors(steps: Steps) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    return {**steps.model.state_dict(), **steps.optimizer_tensors()}


def _snapshot(steps: Steps) -> tuple[dict[str, Tensor], dict]:
    return (
        {name: value.detach().clone() for name, value in _tensors(steps).items()},
        steps.scaler.state_dict(),
    )


@torch.no_grad()
def _restore(steps: Steps, state: tuple[dict[str, Tensor], dict]) -> None:
    """Undoes the warm-up in place: the graph holds the addresses of these tensors."""
    tensors, scaler = state
    for name, value in _tensors(steps).items():
        if name in tensors:
            value.copy_(tensors[name])
        else:
            value.zero_()  # an optimiser state that the warm-up created
    if not scaler:  # A disabled one has neither state nor tensors.
        return
    scale, growth = steps.scaler._scale, steps.scaler._growth_tracker
    if scale is not None and growth is not None:
        scale.fill_(scaler["scale"])
        growth.fill_(scaler["_growth_tracker"])
