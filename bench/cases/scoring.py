"""uint8 frames or patches in, both scores out, against other ways to run the same network."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench import peers
from bench.cases.op_inputs import PATCH, PATCHES, eager_active, tile_permute
from bench.frames import Video, load_video
from bench.harness import Candidate, Case, Settings, Work, first_line, relative_error
from fastalps.engine import why_not
from fastalps.environment import has_fast_bfloat16
from fastalps.models import PRESETS
from fastalps.quantization import in_hardware
from fastalps.testing import SCORE_ERROR

# Patches a call, by effort.
COUNTS = {"smoke": (5,), "quick": (96,), "full": (96, 1024, 4096)}
# Larger calls only meet the peers that come nearest: all of them would take half an hour.
SLOW_PEERS_UP_TO = 1024
FAST_PEERS = ("ONNX Runtime", "OpenVINO fp32", "OpenVINO bf16")
# Of the networks in the quick run: the one that goals are stated for, and the fastest.
QUICK = ("network-b", "fast")
GATE = 3.0
REGION = (
    "uint8 frames on the {place} to both scores of every patch (normal, perturbed) on the {place}: "
    "tiling, gate, network, errors"
)

PATCH_REGION = (
    "uint8 patches on the host to both scores of each (normal, perturbed) on the host: conversion, "
    "network, errors"
)


@functools.cache
def _video(settings: Settings) -> Video:
    return load_video(settings)


@functools.cache
def _model(settings: Settings, preset: str) -> fastalps.ALPS:
    """Briefly trained: batch norms with statistics of their own, errors of a working network."""
    torch.manual_seed(settings.seed)
    model = fastalps.ALPS(PATCH, preset=preset)
    video = _video(settings)
    gate = fastalps.MotionGate(GATE, video.background)
    scene = tile_permute(video.train).mul(255).round().to(torch.uint8)
    moving = scene[gate.kept(video.train, PATCH)]
    images = moving[: settings.pick(32, 256, 1024)]
    config = fastalps.TrainConfig(
        epochs=2, batch_size=32, distorter_every=2, seed=settings.seed, device="cpu"
    )
    model = fastalps.Trainer(config, progress=False).fit(model, images).model
    model.quantization = fastalps.quantize(model, images)
    return model


@functools.cache
def _exact(settings: Settings, preset: str) -> Tensor:
    """(2, N, P) float64: both scores of every patch."""
    network = peers.EagerNetwork(copy.deepcopy(_model(settings, preset)))
    network = network.double().to(settings.device)
    patches = tile_permute(_video(settings).test)
    # A frame at a time, to keep the activations small. The patches are as the candidates see them.
    found = [network(frame.to(settings.device).double()) for frame in patches]
    return torch.stack(found, 1).cpu()


def _whole(frames: Tensor) -> tuple[Tensor, None]:
    return tile_permute(frames).flatten(0, 1), None


def _frame_scores(
    network: peers.Network, batch: int, background: Tensor | None, device: str
) -> Callable[[Tensor], Tensor]:
    """A peer around `network`: cut (or gate), run in batches, put the errors in place."""

    def run(frames: Tensor) -> Tensor:
        pixels = frames.to(device)
        patches, index = _whole(pixels) if background is None else eager_active(pixels, background)
        pieces = [network(piece) for piece in patches.split(batch) if len(piece)]
        found = torch.cat(pieces, 1) if pieces else torch.zeros(2, 0)
        if index is None:
            return found.view(2, len(frames), PATCHES).to(frames.device)
        errors = torch.zeros(2, len(frames), PATCHES, device=pixels.device)
        errors[:, index[:, 0], index[:, 1]] = found.to(pixels.device)
        return errors.to(frames.device)

    return torch.inference_mode()(run)


def _scorer(scorer: fastalps.Scorer) -> Callable[[Tensor], Tensor]:
    def run(frames: Tensor) -> Tensor:
        scores = scorer.scores_frames(frames)
        return torch.stack([scores["normal"].patches, scores["perturbed"].patches])

    return run


def _patch_scores(network: peers.Network, batch: int) -> Callable[[Tensor], Tensor]:
    """A peer around `network`: convert and run in batches."""

    def run(patches: Tensor) -> Tensor:
        return torch.cat([network(piece / 255) for piece in patches.split(batch)], 1)

    return torch.inference_mode()(run)


def _patch_scorer(scorer: fastalps.Scorer) -> Callable[[Tensor], Tensor]:
    return lambda patches: torch.stack(scorer.scores_images(patches)[:2])


def _candidates(
    settings: Settings, preset: str, gated: bool, frames: bool = True
) -> tuple[list[Candidate], int]:
    device, model = settings.device, _model(settings, preset)
    background = _video(settings).background.to(device) if gated else None
    gate = fastalps.MotionGate(GATE, background) if gated else None
    found: list[Candidate] = []
    batch = 1

    def add(name: str, dtype: torch.dtype, why_not: str, make: Callable[[], Any], ours=False):
        short = str(dtype).removeprefix("torch.")
        candidate = Candidate(name, None, SCORE_ERROR[dtype], why_not, short, ours)
        found.append(candidate)
        if why_not:
            return
        try:
            candidate.run = make()
        except Exception as failure:
            if ours:
                raise
            candidate.absent = first_line(failure)

    def scorer(precision: str) -> Callable[[], Any]:
        def make() -> Any:
            nonlocal batch
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the candidate's name says what is emulated
                made = fastalps.Scorer(model, precision=precision, gate=gate, device=device)
            batch = made.batch_size
            return _scorer(made) if frames else _patch_scorer(made)

        return make

    def peer(make: Callable[[], peers.Network]) -> Callable[[], Any]:
        if not frames:
            return lambda: _patch_scores(make(), batch)
        return lambda: _frame_scores(make(), batch, background, device)

    fp32, bf16 = torch.float32, torch.bfloat16
    no_bf16 = "" if has_fast_bfloat16(device) else f"this {device} has no bf16 arithmetic"
    no_compile = "" if settings.effort == "full" else "only in the full run"
    on_cpu = "" if device == "cpu" else "runs on CPUs here"
    no_onnx = peers.missing("onnxruntime", "onnx")
    no_openvino = on_cpu or peers.missing("openvino", "onnx")
    add("fastalps fp32", fp32, "", scorer("fp32"), True)
    if device == "cpu":
        for precision, dtype in (("bf16", bf16), ("int8", torch.int8)):
            fast = in_hardware(precision)
            name = f"fastalps {precision}" + ("" if fast else ", emulated")
            reason = why_not(model.config, torch.device("cpu"), precision)
            add(name, dtype, reason, scorer(precision), True)
    else:
        add("fastalps bf16", bf16, no_bf16, scorer("bf16"), True)
    add("eager fp32 NCHW", fp32, "", peer(lambda: peers.eager(model, device, fp32, False)))
    add("eager fp32 NHWC", fp32, "", peer(lambda: peers.eager(model, device, fp32, True)))
    add("eager bf16 NHWC", bf16, no_bf16, peer(lambda: peers.eager(model, device, bf16, True)))
    add("compile fp32", fp32, no_compile, peer(lambda: peers.compiled(model, device, fp32)))
    add(
        "compile bf16",
        bf16,
        no_compile or no_bf16,
        peer(lambda: peers.compiled(model, device, bf16)),
    )
    add("ONNX Runtime", fp32, no_onnx, peer(lambda: peers.onnx_runtime(model, settings)))
    add("OpenVINO fp32", fp32, no_openvino, peer(lambda: peers.openvino(model, settings, "f32")))
    add(
        "OpenVINO bf16",
        bf16,
        no_openvino or no_bf16,
        peer(lambda: peers.openvino(model, settings, "bf16")),
    )
    return found, batch


def _prepare(preset: str, gated: bool, place: str) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        video, model = _video(settings), _model(settings, preset)
        exact = _exact(settings, preset)
        kept = torch.ones(exact.shape[1:], dtype=torch.bool)
        if gated:
            kept = fastalps.MotionGate(GATE, video.background).kept(video.test, PATCH)
        exact = exact * kept
        candidates, batch = _candidates(settings, preset, gated)
        scored = int(kept.sum())
        amounts = {
            "frames": len(video.test),
            "patches": kept.numel(),
            "scored_patches": scored,
            "flop": scored * model.flops(),
        }
        details = {
            "data": video.source,
            "network": preset,
            "weights": "briefly trained here; no AUROC is claimed for them",
            "flop_per_patch": model.flops(),
            "batch_size": batch,
            "gate": f"mean absolute difference above {GATE} gray levels" if gated else None,
        }
        # An error of 0 is that of a patch that the gate dropped: it has to be exactly 0.
        return Work(
            candidates,
            lambda _, result: relative_error(result.cpu(), exact, floor=1e-30),
            [(video.test.to("cpu" if place == "host" else settings.device),)],
            amounts,
            REGION.format(place=place),
            details,
        )

    return prepare


def _patches(settings: Settings, count: int) -> Tensor:
    """uint8 (count, 1, 30, 30): patches of the test frames, repeated where they are too few."""
    found = tile_permute(_video(settings).test).flatten(0, 1).mul(255).round().to(torch.uint8)
    return _repeated(found, 0, count)


def _repeated(values: Tensor, dim: int, count: int) -> Tensor:
    """`values`, over and over along a dimension until there are `count`."""
    return values.index_select(dim, torch.arange(count) % values.shape[dim])


def _prepare_patches(preset: str, count: int) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        model, patches = _model(settings, preset), _patches(settings, count)
        exact = _repeated(_exact(settings, preset).cpu().flatten(1), 1, count)
        candidates, batch = _candidates(settings, preset, False, frames=False)
        if count > SLOW_PEERS_UP_TO:
            candidates = [c for c in candidates if c.ours or c.name in FAST_PEERS]
        amounts = {
            "patches": count,
            "scored_patches": count,
            "flop": count * model.flops(),
        }
        details = {
            "data": _video(settings).source,
            "network": preset,
            "weights": "briefly trained here; no AUROC is claimed for them",
            "flop_per_patch": model.flops(),
            "batch_size": batch,
        }
        return Work(
            candidates,
            lambda _, result: relative_error(result, exact, floor=1e-30),
            [(patches,)],
            amounts,
            PATCH_REGION,
            details,
        )

    return prepare


def cases(settings: Settings) -> list[Case]:
    """Each network on all patches and on those that move; on a CPU also on patches as such."""
    presets = {"smoke": QUICK[1:], "quick": QUICK, "full": tuple(PRESETS)}[settings.effort]
    places = ("host",) if settings.device == "cpu" else ("host", "device")
    found = [
        Case(
            f"scoring/{preset}/{'gated' if gated else 'all'}"
            + ("-on-device" if place == "device" else ""),
            f'frames of 240x360, preset "{preset}", '
            + ("only patches that move" if gated else "all 96 patches of 30x30")
            + ("; frames and scores stay on the device" if place == "device" else ""),
            _prepare(preset, gated, place),
        )
        for preset in presets
        for gated in (False, True)
        for place in places
    ]
    if settings.device == "cpu":
        found += [
            Case(
                f"scoring/{preset}/{count}-patches",
                f'patches of 30x30, {count:,} a call, preset "{preset}"',
                _prepare_patches(preset, count),
            )
            for preset in presets
            for count in COUNTS[settings.effort]
        ]
    return found
