"""One optimisation step of each player, against the loop that a user of PyTorch would write.

Of one model, and of several independent ones: stacked, or each by itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench.harness import Candidate, Case, Settings, Work, relative_error
from fastalps.environment import has_fast_bfloat16
from fastalps.models import PRESETS
from fastalps.testing import SCORE_ERROR
from fastalps.training.grouped import stack
from fastalps.training.stacked import StackedSteps
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
    model = model.to(memory_format=torch.channels_last)
    step = getattr(Players(Steps(model, _config(amp))), player)
    return lambda images: step(images.contiguous(memory_format=torch.channels_last))


def _config(amp: bool) -> fastalps.TrainConfig:
    return fastalps.TrainConfig(amp="bf16" if amp else "off")


# A step of several models: (N * K, C, H, W) with row n * K + k of model k, and the same images as
# K batches of (N, C, H, W); gives (2, K).
Together = Callable[[Tensor, Sequence[Tensor]], Tensor]


def _stacked(
    models: Sequence[fastalps.ALPS], player: str, amp: bool, layout: torch.memory_format
) -> Together:
    for model in models:
        model.to(memory_format=layout)  # type: ignore[call-overload]
    network = stack(models)
    steps = StackedSteps(network, [Steps(model, _config(amp)) for model in models])
    step = getattr(Players(steps), player)
    return lambda rows, _: step(rows.contiguous(memory_format=layout))


def _one_by_one(steps: Sequence[Callable[[Tensor], Any]]) -> Together:
    return lambda _, batches: torch.stack([s(b) for s, b in zip(steps, batches, strict=True)], 1)


def _on_streams(steps: Sequence[Callable[[Tensor], Any]]) -> Together:
    """Each model's steps on a CUDA stream of its own."""
    streams = [torch.cuda.Stream() for _ in steps]

    def run(_: Tensor, batches: Sequence[Tensor]) -> Tensor:
        here, results = torch.cuda.current_stream(), []
        for step, batch, stream in zip(steps, batches, streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(step(batch))
        for stream in streams:
            here.wait_stream(stream)
        return torch.stack(results, 1)

    return run


def _batch(settings: Settings) -> int:
    """Images a step for each of several models. A quick run on a GPU has them all, too: ten models
    of 128 images are what its goal is stated for."""
    return settings.pick(8, 128 if settings.device == "cuda" else 32, 128)


def _prepare_several(preset: str, player: str) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        torch.manual_seed(settings.seed)
        count = settings.pick(2, 10, 10)
        batch = _batch(settings)
        images = _images(settings, batch * count)
        models = [fastalps.ALPS(28, preset=preset).train() for _ in range(count)]
        plain = [PlainLoop(copy.deepcopy(model).double(), False) for model in models]
        batches = [images[k::count] for k in range(count)]
        # The first step's errors, before any weight has changed.
        exact = _one_by_one([getattr(loop, player) for loop in plain])(
            images, [part.double() for part in batches]
        )
        device = settings.device
        no_bf16 = "" if has_fast_bfloat16(device) else f"this {device} has no bf16 arithmetic"
        no_cuda = "" if device == "cuda" else "streams are CUDA's"

        def fresh() -> list[fastalps.ALPS]:
            return [copy.deepcopy(model).to(device) for model in models]

        def each(amp: bool, ours: bool) -> list[Callable[[Tensor], Any]]:
            return [_step(model, player, amp, ours) for model in fresh()]

        def ways(amp: bool) -> dict[str, Callable[[], Together]]:
            nhwc, nchw = torch.channels_last, torch.contiguous_format
            return {
                "stacked": lambda: _stacked(fresh(), player, amp, nhwc),
                "stacked NCHW": lambda: _stacked(fresh(), player, amp, nchw),
                "on streams": lambda: _on_streams(each(amp, True)),
                "one by one": lambda: _one_by_one(each(amp, True)),
                "plain loops": lambda: _one_by_one(each(amp, False)),
            }

        # On a GPU each way takes its libraries many seconds to prepare for ten networks' layers.
        short = device == "cuda" and settings.effort == "quick"
        candidates = []
        for amp in (True,) if short else (False, True):
            dtype = torch.bfloat16 if amp else torch.float32
            for name, build in ways(amp).items():
                if short and name == "stacked NCHW":
                    continue
                absent = (no_bf16 if amp else "") or (no_cuda if name == "on streams" else "")
                candidates.append(
                    Candidate(
                        f"{name} {'bf16' if amp else 'fp32'}",
                        None if absent else build(),
                        SCORE_ERROR[dtype],
                        absent,
                        str(dtype).removeprefix("torch."),
                        name != "plain loops",
                    )
                )
        return Work(
            candidates,
            lambda _, result: relative_error(result.cpu(), exact, floor=1e-30),
            [(images.to(device), [part.contiguous().to(device) for part in batches])],
            {"images": batch * count},
            REGION,
            {
                "network": preset,
                "models": count,
                "image_size": 28,
                "data": "smooth random images",
                "step": player,
            },
        )

    return prepare


def cases(settings: Settings) -> list[Case]:
    """Both players, of one model and of ten; every preset in the full run."""
    presets = tuple(PRESETS) if settings.effort == "full" else ("fast",)
    pairs = [(preset, player) for preset in presets for player in ("autoencoder", "distorter")]
    return [
        Case(
            f"training/{preset}/{player}",
            f'one step of the {player}, preset "{preset}", batches of 128 images of 28x28',
            _prepare(preset, player),
        )
        for preset, player in pairs
    ] + [
        Case(
            f"training/{preset}/{player}/ten models",
            f'one step of the {player} of each of ten models, preset "{preset}", a batch of '
            f"{_batch(settings)} images of 28x28 for each",
            _prepare_several(preset, player),
        )
        for preset, player in pairs
    ]
