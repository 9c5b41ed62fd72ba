"""One optimisation step of each player, against the loop that a user of PyTorch would write."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench.harness import Candidate, Case, Settings, Work, relative_error
from fastalps.environment import has_fast_bfloat16
from fastalps.models import PRESETS
from fastalps.testing import SCORE_ERROR
from fastalps.training.steps import Steps
from fastalps.training.trainer import Players

REGION = "a float32 batch on the device to updated weights; batches are not drawn or copied"


class PlainLoop:
    """The same two steps in plain PyTorch: errors from stored reconstructions, Adam as it comes."""

    def __init__(self, model: fastalps.ALPS, amp: bool) -> None:
        config = fastalps.TrainConfig()
        self.model, self.amp, self.config = model, amp, config
        autoencoder = [*model.encoder.parameters(), *model.decoder.parameters()]
        rate = config.learning_rate
        self.optimizers = {
            "autoencoder": torch.optim.Adam(autoencoder, lr=rate),
            "distorter": torch.optim.Adam(model.distorter.parameters(), lr=rate),
        }

    def _autocast(self, images: Tensor) -> contextlib.AbstractContextManager:
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(images.device.type, dtype=torch.bfloat16)

    def autoencoder(self, images: Tensor) -> Tensor:
        """Returns the (2,) mean errors."""
        model, config = self.model, self.config
        self.optimizers["autoencoder"].zero_grad()
        with self._autocast(images):
            latent = model.encoder(images)
            with torch.no_grad():
                perturbation = model.distorter(images)
            perturbed = latent + model.config.strength * perturbation
            logits = model.decoder(torch.cat([latent, perturbed]))
        both = logits.to(images.dtype).sigmoid().unflatten(0, (2, len(images)))
        normal, after = (both - images).square().flatten(1).mean(1)
        (config.normal_weight * normal + config.perturbed_weight * after).backward()
        self.optimizers["autoencoder"].step()
        return torch.stack([normal, after]).detach()

    def distorter(self, images: Tensor) -> Tensor:
        """Returns (2,): perturbed error and energy."""
        model = self.model
        self.optimizers["distorter"].zero_grad()
        model.encoder.requires_grad_(False)
        model.decoder.requires_grad_(False)
        with self._autocast(images):
            latent = model.encoder(images)
            scaled = model.config.strength * model.distorter(images)
            logits = model.decoder(latent + scaled)
        error = (logits.to(images.dtype).sigmoid() - images).square().mean()
        energy = scaled.to(images.dtype).square().mean()
        (-error).backward()
        self.optimizers["distorter"].step()
        model.encoder.requires_grad_(True)
        model.decoder.requires_grad_(True)
        return torch.stack([error, energy]).detach()


def _images(settings: Settings, count: int) -> Tensor:
    rng = settings.generator()
    # Smooth, like digits: blobs of noise, not single pixels of it.
    coarse = torch.rand(count, 1, 9, 9, generator=rng)
    return torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic").clamp(0, 1)


def _prepare(preset: str, player: str) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        torch.manual_seed(settings.seed)
        batch = settings.pick(8, 128, 128)
        images = _images(settings, batch)
        start = fastalps.ALPS(28, preset=preset).train()
        # The first step's errors, before any weight has changed.
        exact = getattr(PlainLoop(copy.deepcopy(start).double(), False), player)(images.double())
        device = settings.device
        images = images.to(device)
        no_bf16 = "" if has_fast_bfloat16(device) else f"this {device} has no bf16 arithmetic"
        candidates = []
        for amp in (False, True):
            dtype = torch.bfloat16 if amp else torch.float32
            for name in ("fastalps", "plain loop"):
                ours = name == "fastalps"
                run = None
                if not (amp and no_bf16):
                    run = _step(copy.deepcopy(start).to(device), player, amp, ours)
                candidates.append(
                    Candidate(
                        f"{name} {'bf16' if amp else 'fp32'}",
                        run,
                        SCORE_ERROR[dtype],
                        no_bf16 if amp else "",
                        str(dtype).removeprefix("torch."),
                        ours,
                    )
                )
        return Work(
            candidates,
            lambda _, result: relative_error(result.cpu(), exact, floor=1e-30),
            [(images,)],
            {"images": batch},
            REGION,
            {"network": preset, "image_size": 28, "data": "smooth random images", "step": player},
        )

    return prepare


def _step(model: fastalps.ALPS, player: str, amp: bool, ours: bool) -> Callable[[Tensor], Any]:
    if not ours:
        return getattr(PlainLoop(model, amp), player)
    config = fastalps.TrainConfig(amp="bf16" if amp else "off")
    model = model.to(memory_format=torch.channels_last)
    step = getattr(Players(Steps(model, config)), player)
    return lambda images: step(images.contiguous(memory_format=torch.channels_last))


def cases(settings: Settings) -> list[Case]:
    """Both players; every preset in the full run."""
    presets = tuple(PRESETS) if settings.effort == "full" else ("fast",)
    return [
        Case(
            f"training/{preset}/{player}",
            f'one step of the {player}, preset "{preset}", batches of 128 images of 28x28',
            _prepare(preset, player),
        )
        for preset in presets
        for player in ("autoencoder", "distorter")
    ]
