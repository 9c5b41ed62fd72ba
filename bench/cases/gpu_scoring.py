"""On CUDA devices: UCSD Ped2's whole test set, and a single frame, to both scores of every patch.

These are the jobs that goals are stated for. Ours comes first: ratios are to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench import peers
from bench.cases.gpu_runs import (
    Run,
    captured_run,
    extra_memory,
    patches_of,
    peer_run,
    streamed_run,
    waited,
)
from bench.cases.op_inputs import PATCH, PATCHES
from bench.cases.scoring import (
    GATE,
    GATED,
    QUICK,
    WEIGHTS,
    made,
    make_scorer,
    presets,
    scorer_run,
    trained,
)
from bench.frames import load_test_set
from bench.harness import Candidate, Case, Settings, Work, input_sets, relative_error
from fastalps.environment import has_fast_bfloat16
from fastalps.fused import FusedEngine, why_not
from fastalps.gate import clip_background

# Frames whose patches the peers take at once. They divide the 2,010 of Ped2's test set:
# torch.compile sees one shape only.
BATCH = 67
# Frames that come at a time from the host: 12,672 patches, whole chunks of 132 multiprocessors.
STREAMED = 132
# The float64 reference takes as many at once: some gigabytes.
EXACT_BATCH = 20
FP32, BF16 = torch.float32, torch.bfloat16

ON_DEVICE = (
    "uint8 frames on the device to both scores of every patch (normal, perturbed) on the device: "
    "tiling, gate, network, errors"
)
FROM_HOST = (
    "uint8 frames in pinned memory of the host, in chunks, to both scores of every patch (normal, "
    "perturbed) on the host; the row on the device leaves out both ways"
)
ONE_FRAME = (
    "one uint8 frame on the device to both scores of its patches (normal, perturbed) on the "
    "device, each call waited for"
)


def _count(settings: Settings) -> int:
    return settings.pick(3, 2010, 2010)


def _checked(settings: Settings) -> slice:
    """The frames that are compared with float64: in the quick run every tenth, to save time."""
    return slice(None, None, settings.pick(1, 10, 1))


@functools.cache
def _test_set(settings: Settings) -> tuple[str, Tensor]:
    return load_test_set(settings, _count(settings))


@functools.cache
def _on_device(settings: Settings) -> Tensor:
    return _test_set(settings)[1].to(settings.device)


@functools.cache
def _on_host(settings: Settings) -> Tensor:
    frames = _test_set(settings)[1]
    return frames.pin_memory() if settings.device == "cuda" else frames


@functools.cache
def _background(settings: Settings) -> Tensor:
    return clip_background(_test_set(settings)[1])


@functools.cache
def _kept(settings: Settings, gated: bool) -> Tensor:
    """bool (N, P), on the host: which patches are scored."""
    frames = _test_set(settings)[1]
    if gated:
        return fastalps.MotionGate(GATE, _background(settings)).kept(frames, PATCH)
    return torch.ones(len(frames), PATCHES, dtype=torch.bool)


@functools.cache
def _exact(settings: Settings, preset: str) -> Tensor:
    """(2, n, P) float64, on the host: both scores of every patch of the frames to check."""
    network = peers.EagerNetwork(trained(settings, preset)).double().to(settings.device)
    parts = _on_device(settings)[_checked(settings)].split(EXACT_BATCH)
    with torch.inference_mode():
        # The pixels are as the candidates see them.
        found = torch.cat([network((patches_of(part) / 255).double()) for part in parts], 1)
    return found.unflatten(1, (-1, PATCHES)).cpu()


def _no_bf16(settings: Settings) -> str:
    fast = has_fast_bfloat16(settings.device)
    return "" if fast else f"this {settings.device} has no bf16 arithmetic"


def _eager(
    settings: Settings, preset: str, dtype: torch.dtype, channels_last: bool, wrap: Callable
) -> Candidate:
    name = f"eager {'fp32' if dtype == FP32 else 'bf16'} {'NHWC' if channels_last else 'NCHW'}"
    reason = "" if dtype == FP32 else _no_bf16(settings)
    model, device = trained(settings, preset), settings.device
    return made(name, dtype, reason, lambda: wrap(peers.eager(model, device, dtype, channels_last)))


def _compiled(settings: Settings, preset: str, mode: str, wrap: Callable) -> Candidate:
    reason = "" if settings.effort == "full" else "only in the full run"
    model, device = trained(settings, preset), settings.device
    return made(
        f"compile bf16 {mode}",
        BF16,
        reason or _no_bf16(settings),
        lambda: wrap(peers.compiled(model, device, BF16, mode)),
    )


def _work(
    settings: Settings,
    preset: str,
    candidates: list[Candidate],
    arguments: list[tuple[Tensor]],
    kept: Tensor,
    exact: Tensor,
    region: str,
    **details: Any,
) -> Work:
    """A case whose results are (2, N, P), 0 where `kept` is False, with (2, n, P) to check."""
    flops, scored = trained(settings, preset).flops(), int(kept.sum())
    checked = _checked(settings)
    exact = exact * kept[checked]

    def error(_: str, result: Tensor) -> float:
        # Of the frames that are not compared, too: every patch that is kept has a score, no other.
        result = result.cpu()
        if result.shape[1:] != kept.shape or not result.isfinite().all():
            return math.inf
        if not torch.equal(result != 0, kept.expand_as(result)):
            return math.inf
        return relative_error(result[:, checked], exact, floor=1e-30)

    amounts = {
        "frames": len(kept),
        "patches": kept.numel(),
        "scored_patches": scored,
        "flop": scored * flops,
    }
    details |= {
        "data": _test_set(settings)[0],
        "network": preset,
        "weights": WEIGHTS,
        "flop_per_patch": flops,
        "checked_frames": exact.shape[1],
    }
    return Work(candidates, error, arguments, amounts, region, details)


def _prepare_on_device(preset: str, gated: bool) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        model, device, frames = trained(settings, preset), settings.device, _on_device(settings)
        background = _background(settings).to(device) if gated else None
        gate = fastalps.MotionGate(GATE, background) if gated else None
        most = settings.pick(2, BATCH, BATCH) * PATCHES
        methods = {}

        def ours(precision: str) -> Run:
            scorer = make_scorer(model, precision, gate, device)
            methods[precision] = scorer.method
            return scorer_run(scorer)

        def peer(network: peers.Network) -> Run:
            return peer_run(network, most, background)

        candidates = [
            made("fastalps bf16", BF16, _no_bf16(settings), lambda: ours("bf16"), ours=True),
            made("fastalps fp32", FP32, "", lambda: ours("fp32"), ours=True),
            _eager(settings, preset, FP32, False, peer),
            _eager(settings, preset, FP32, True, peer),
            _eager(settings, preset, BF16, True, peer),
            _compiled(settings, preset, "reduce-overhead", peer),
            _compiled(settings, preset, "max-autotune", peer),
        ]
        return _work(
            settings,
            preset,
            candidates,
            [(frames,)],
            _kept(settings, gated),
            _exact(settings, preset),
            ON_DEVICE,
            methods=methods,
            peers_batch=most,
            gate=GATED if gated else None,
        )

    return prepare


def _prepare_from_host(preset: str) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        frames, resident = _on_host(settings), _on_device(settings)
        scorer = make_scorer(trained(settings, preset), "bf16", None, settings.device)
        chunk = settings.pick(2, STREAMED, STREAMED)
        streamed, whole = streamed_run(scorer, chunk), scorer_run(scorer)
        reason = _no_bf16(settings)
        candidates = [
            made("fastalps bf16 streamed", BF16, reason, lambda: streamed, ours=True),
            made("on the device", BF16, reason, lambda: lambda _: whole(resident), ours=True),
        ]
        return _work(
            settings,
            preset,
            candidates,
            [(frames,)],
            _kept(settings, False),
            _exact(settings, preset),
            FROM_HOST,
            methods={"bf16": scorer.method},
            frames_a_chunk=chunk,
            extra_device_bytes=extra_memory(streamed, frames, settings),
        )

    return prepare


def _prepare_one_frame(preset: str) -> Callable[[Settings], Work]:
    def prepare(settings: Settings) -> Work:
        model, device, frames = trained(settings, preset), settings.device, _on_device(settings)
        scorer = make_scorer(model, "bf16", None, device)
        no_engine = why_not(model.config, torch.device(device), "bf16")

        def captured() -> Run:
            return captured_run(FusedEngine(model, torch.device(device)), frames[:1])

        def peer(network: peers.Network) -> Run:
            return peer_run(network, PATCHES)

        candidates = [
            made("fastalps bf16", BF16, _no_bf16(settings), lambda: scorer_run(scorer), ours=True),
            made("fastalps bf16, captured", BF16, no_engine, captured, ours=True),
            _eager(settings, preset, BF16, True, peer),
            _compiled(settings, preset, "reduce-overhead", peer),
        ]
        # Another frame each time.
        sets = min(len(frames), input_sets(settings, frames[:1].nbytes))
        return _work(
            settings,
            preset,
            [waited(candidate, settings) for candidate in candidates],
            [(frames[number : number + 1],) for number in range(sets)],
            _kept(settings, False)[:1],
            _exact(settings, preset)[:, :1],
            ONE_FRAME,
            methods={"bf16": scorer.method},
        )

    return prepare


def every_case(settings: Settings) -> list[Case]:
    """Of each network: the whole test set, of some also gated, from the host, and a frame."""
    found = []
    for preset in presets(settings):
        about = f'{_count(settings):,} frames of 240x360, preset "{preset}"'
        jobs = [("ped2-on-device", f"{about}, all 96 patches", _prepare_on_device(preset, False))]
        if preset in QUICK:
            text = f"{about}, only patches that move"
            jobs.append(("ped2-gated-on-device", text, _prepare_on_device(preset, True)))
        jobs += [
            ("ped2-from-host", f"{about}, streamed from the host", _prepare_from_host(preset)),
            (
                "one-frame-on-device",
                f'latency of a frame of 240x360, 96 patches, preset "{preset}"',
                _prepare_one_frame(preset),
            ),
        ]
        found += [Case(f"scoring/{preset}/{name}", text, job) for name, text, job in jobs]
    return found


def cases(settings: Settings) -> list[Case]:
    """All of them on CUDA devices; none elsewhere."""
    return every_case(settings) if settings.device == "cuda" else []
