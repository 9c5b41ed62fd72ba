"""On CPUs: uint8 frames or patches in, both scores out, against other ways to run the network.

`bench.cases.gpu_scoring` has the cases of CUDA devices, and takes the networks from here.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench import peers
from bench.cases.op_inputs import PATCH, PATCHES, eager_active, tile_permute
from bench.frames import Video, load_video, repeated
from bench.harness import Candidate, Case, Settings, Work, first_line, relative_error
from fastalps.engine import why_not
from fastalps.environment import has_fast_bfloat16
from fastalps.models import PRESETS
from fastalps.quantization import in_hardware, measured_agreement
from fastalps.testing import SCORE_ERROR

# int8 passes where ranks of its average scores correlate with those in float64 by this less than 1.
# How near it is to float64 otherwise depends on the network, as precision="auto" knows.
RANK_ERROR = 1e-2
# Patches a call, by effort.
COUNTS = {"smoke": (96,), "quick": (96,), "full": (96, 1024, 4096)}
# Larger calls only meet the peers that come nearest: all of them would take half an hour.
SLOW_PEERS_UP_TO = 1024
FAST_PEERS = ("ONNX Runtime", "OpenVINO fp32", "OpenVINO bf16")
# Of the networks in the quick run: the one that goals are stated for, and the fastest.
QUICK = ("network-b", "fast")
GATE = 3.0
WEIGHTS = "briefly trained here; no AUROC is claimed for them"
GATED = f"mean absolute difference above {GATE} gray levels"
REGION = (
    "uint8 frames on the host to both scores of every patch (normal, perturbed) on the host: "
    "tiling, gate, network, errors"
)

PATCH_REGION = (
    "uint8 patches on the host to both scores of each (normal, perturbed) on the host: conversion, "
    "network, errors"
)


def presets(settings: Settings) -> tuple[str, ...]:
    """The networks that a run of this effort scores with."""
    return {"smoke": QUICK[1:], "quick": QUICK, "full": tuple(PRESETS)}[settings.effort]


@functools.cache
def _video(settings: Settings) -> Video:
    return load_video(settings)


@functools.cache
def trained(settings: Settings, preset: str) -> fastalps.ALPS:
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


def made(
    name: str, dtype: torch.dtype, why_not: str, make: Callable[[], Any], ours: bool = False
) -> Candidate:
    """A candidate that computes in `dtype`, unless there is a reason against it or, for one of
    others, making it fails."""
    short = str(dtype).removeprefix("torch.")
    allowed = RANK_ERROR if dtype == torch.int8 else SCORE_ERROR[dtype]
    candidate = Candidate(name, None, allowed, why_not, short, ours)
    if not why_not:
        try:
            candidate.run = make()
        except Exception as failure:
            if ours:
                raise
            candidate.absent = first_line(failure)
    return candidate


def make_scorer(
    model: fastalps.ALPS, precision: str, gate: fastalps.MotionGate | None, device: str
) -> fastalps.Scorer:
    """A scorer that does not warn of emulation: the candidate's name says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastalps.Scorer(model, precision=precision, gate=gate, device=device)


def scorer_run(scorer: fastalps.Scorer) -> Callable[[Tensor], Tensor]:
    """Frames to (2, N, P): both scores of every patch."""

    def run(frames: Tensor) -> Tensor:
        scores = scorer.scores_frames(frames)
        return torch.stack([scores["normal"].patches, scores["perturbed"].patches])

    return run


def _patch_scorer_run(scorer: fastalps.Scorer) -> Callable[[Tensor], Tensor]:
    return lambda patches: torch.stack(scorer.scores_images(patches)[:2])


def _error(name: str, result: Tensor, exact: Tensor) -> float:
    """Of both scores, relative to float64; of int8, which is for ranking, see `RANK_ERROR`.

    A patch that the gate dropped has exactly 0 in both.
    """
    if "int8" not in name:
        return relative_error(result, exact, floor=1e-30)
    if result.shape != exact.shape or not torch.equal(result == 0, exact == 0):
        return math.inf
    scores, expected = (values.mean(0)[exact[0] > 0].double() for values in (result, exact))
    return 1 - measured_agreement(scores, expected).correlation


@functools.cache
def _exact(settings: Settings, preset: str) -> Tensor:
    """(2, N, P) float64: both scores of every patch."""
    network = peers.EagerNetwork(copy.deepcopy(trained(settings, preset))).double()
    patches = tile_permute(_video(settings).test)
    # A frame at a time, to keep the activations small. The patches are as the candidates see them.
    return torch.stack([network(frame.double()) for frame in patches], 1)


def _whole(frames: Tensor) -> tuple[Tensor, None]:
    return tile_permute(frames).flatten(0, 1), None


def _frame_scores(
    network: peers.Network, batch: int, background: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """A peer around `network`: cut (or gate), run in batches, put the errors in place."""

    def run(frames: Tensor) -> Tensor:
        patches, index = _whole(frames) if background is None else eager_active(frames, background)
        pieces = [network(piece) for piece in patches.split(batch) if len(piece)]
        found = torch.cat(pieces, 1) if pieces else torch.zeros(2, 0)
        if index is None:
            return found.view(2, len(frames), PATCHES)
        errors = torch.zeros(2, len(frames), PATCHES)
        errors[:, index[:, 0], index[:, 1]] = found
        return errors

    return torch.inference_mode()(run)


def _patch_scores(network: peers.Network, batch: int) -> Callable[[Tensor], Tensor]:
    """A peer around `network`: convert and run in batches."""

    def run(patches: Tensor) -> Tensor:
        return torch.cat([network(piece / 255) for piece in patches.split(batch)], 1)

    return torch.inference_mode()(run)


def _candidates(
    settings: Settings,
    preset: str,
    gate: fastalps.MotionGate | None,
    run_ours: Callable[[fastalps.Scorer], Any],
    run_peer: Callable[[peers.Network], Any],
) -> list[Candidate]:
    model = trained(settings, preset)
    fp32, bf16 = torch.float32, torch.bfloat16
    no_bf16 = "" if has_fast_bfloat16("cpu") else "this cpu has no bf16 arithmetic"
    no_compile = "" if settings.effort == "full" else "only in the full run"
    no_onnx = peers.missing("onnxruntime", "onnx")
    no_openvino = peers.missing("openvino", "onnx")
    found = []
    for precision, dtype in (("fp32", fp32), ("bf16", bf16), ("int8", torch.int8)):
        emulated = precision != "fp32" and not in_hardware(precision)
        reason = "" if dtype == fp32 else why_not(model.config, torch.device("cpu"), precision)
        found.append(
            made(
                f"fastalps {precision}" + (", emulated" if emulated else ""),
                dtype,
                reason,
                lambda p=precision: run_ours(make_scorer(model, p, gate, "cpu")),
                ours=True,
            )
        )
    for name, dtype, reason, network in (
        ("eager fp32 NCHW", fp32, "", lambda: peers.eager(model, "cpu", fp32, False)),
        ("eager fp32 NHWC", fp32, "", lambda: peers.eager(model, "cpu", fp32, True)),
        ("eager bf16 NHWC", bf16, no_bf16, lambda: peers.eager(model, "cpu", bf16, True)),
        ("compile fp32", fp32, no_compile, lambda: peers.compiled(model, "cpu", fp32)),
        ("compile bf16", bf16, no_compile or no_bf16, lambda: peers.compiled(model, "cpu", bf16)),
        ("ONNX Runtime", fp32, no_onnx, lambda: peers.onnx_runtime(model, settings)),
        ("OpenVINO fp32", fp32, no_openvino, lambda: peers.openvino(model, settings, "f32")),
        (
            "OpenVINO bf16",
            bf16,
            no_openvino or no_bf16,
            lambda: peers.openvino(model, settings, "bf16"),
        ),
    ):
        found.append(made(name, dtype, reason, lambda make=network: run_peer(make())))
    return found


def _prepare(preset: str, gated: bool) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        video, model = _video(settings), trained(settings, preset)
        exact = _exact(settings, preset)
        kept = torch.ones(exact.shape[1:], dtype=torch.bool)
        gate = fastalps.MotionGate(GATE, video.background) if gated else None
        if gate is not None:
            kept = gate.kept(video.test, PATCH)
        exact = exact * kept
        batch = make_scorer(model, "fp32", gate, "cpu").batch_size
        background = video.background if gated else None
        candidates = _candidates(
            settings,
            preset,
            gate,
            scorer_run,
            lambda network: _frame_scores(network, batch, background),
        )
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
            "weights": WEIGHTS,
            "flop_per_patch": model.flops(),
            "batch_size": batch,
            "gate": GATED if gated else None,
        }
        return Work(
            candidates,
            lambda name, result: _error(name, result, exact),
            [(video.test,)],
            amounts,
            REGION,
            details,
        )

    return prepare


def _patches(settings: Settings, count: int) -> Tensor:
    """uint8 (count, 1, 30, 30): patches of the test frames, repeated where they are too few."""
    found = tile_permute(_video(settings).test).flatten(0, 1).mul(255).round().to(torch.uint8)
    return repeated(found, 0, count)


def _prepare_patches(preset: str, count: int) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        model, patches = trained(settings, preset), _patches(settings, count)
        exact = repeated(_exact(settings, preset).flatten(1), 1, count)
        batch = make_scorer(model, "fp32", None, "cpu").batch_size
        candidates = _candidates(
            settings,
            preset,
            None,
            _patch_scorer_run,
            lambda network: _patch_scores(network, batch),
        )
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
            "weights": WEIGHTS,
            "flop_per_patch": model.flops(),
            "batch_size": batch,
        }
        return Work(
            candidates,
            lambda name, result: _error(name, result, exact),
            [(patches,)],
            amounts,
            PATCH_REGION,
            details,
        )

    return prepare


def cases(settings: Settings) -> list[Case]:
    """Each network on all patches, on those that move, and on patches as such; none on CUDA."""
    if settings.device != "cpu":
        return []
    found = [
        Case(
            f"scoring/{preset}/{'gated' if gated else 'all'}",
            f'frames of 240x360, preset "{preset}", '
            + ("only patches that move" if gated else "all 96 patches of 30x30"),
            _prepare(preset, gated),
        )
        for preset in presets(settings)
        for gated in (False, True)
    ]
    found += [
        Case(
            f"scoring/{preset}/{count}-patches",
            f'patches of 30x30, {count:,} a call, preset "{preset}"',
            _prepare_patches(preset, count),
        )
        for preset in presets(settings)
        for count in COUNTS[settings.effort]
    ]
    return found
