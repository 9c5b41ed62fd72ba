"""Ways to score frames on a CUDA device: peers in batches, streams, captured calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalps
from bench import peers
from bench.cases.op_inputs import COLUMNS, PATCH, PATCHES, ROWS
from bench.cases.scoring import GATE
from bench.harness import Candidate, Settings
from fastalps.fused import FusedEngine

# Frames to (2, N, P): both scores of every patch.
Run = Callable[[Tensor], Tensor]

CUT = ((PATCH, PATCH), (PATCH, PATCH), "cover")


def patches_of(frames: Tensor) -> Tensor:
    """(N, 240, 360) to (N * 96, 1, 30, 30), the bytes as they are."""
    grid = frames.view(-1, ROWS, PATCH, COLUMNS, PATCH).permute(0, 1, 3, 2, 4)
    return grid.reshape(-1, 1, PATCH, PATCH)


def moving(frames: Tensor, background: Tensor) -> Tensor:
    """Numbers of the patches that the motion gate keeps, in plain PyTorch."""
    difference = (frames.short() - background.short()).abs_()
    total = difference.view(-1, ROWS, PATCH, COLUMNS, PATCH).sum((2, 4))
    return (total.flatten() > GATE * PATCH * PATCH).nonzero().flatten()


def peer_run(network: peers.Network, most: int, background: Tensor | None = None) -> Run:
    """A peer around `network`: patches cut (and gated) as bytes, converted and run in batches of
    one size, `most` or a little less; errors put in place."""

    def run(frames: Tensor) -> Tensor:
        patches, index = patches_of(frames), None
        total = len(patches)
        if background is not None:
            index = moving(frames, background)
            patches = patches[index]
        count = len(patches)
        batches = max(1, math.ceil(count / most))
        size = math.ceil(count / batches)
        # Fewer rows than there are batches: a last batch of another size would be compiled, too.
        if missing := batches * size - count:
            patches = F.pad(patches, (0, 0, 0, 0, 0, 0, 0, missing))
        found = torch.zeros(2, 0, device=frames.device)
        if count:
            found = torch.cat([network(part / 255) for part in patches.split(size)], 1)[:, :count]
        if index is not None:
            errors = torch.zeros(2, total, device=frames.device)
            errors[:, index] = found
            found = errors
        return found.view(2, len(frames), PATCHES)

    return torch.inference_mode()(run)


def streamed_run(scorer: fastalps.Scorer, chunk: int) -> Run:
    """Frames of the host in chunks, scores put together on the host."""

    def run(frames: Tensor) -> Tensor:
        found = list(scorer.scores_frames(iter(frames.split(chunk))))
        return torch.stack(
            [torch.cat([part[kind].patches for part in found]) for kind in ("normal", "perturbed")]
        )

    return run


def captured_run(engine: FusedEngine, like: Tensor) -> Run:
    """A call of the engine as a CUDA graph, for frames of the shape of `like`."""
    still = like.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            engine.frame_errors(still, CUT, "both")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        errors, _ = engine.frame_errors(still, CUT, "both")

    def run(frames: Tensor) -> Tensor:
        still.copy_(frames)
        graph.replay()
        # The next replay overwrites the result.
        return errors.clone()

    # The graph has addresses of the engine's weights, and no reference to them.
    run.engine = engine  # type: ignore[attr-defined]
    return run


def waited(candidate: Candidate, settings: Settings) -> Candidate:
    """The same, returning when the device is done: calls do not overlap."""
    inner = candidate.run
    if inner is None or settings.device != "cuda":
        return candidate

    def run(frames: Tensor) -> Tensor:
        result = inner(frames)
        torch.cuda.synchronize()
        return result

    candidate.run = run
    return candidate


def extra_memory(run: Run, frames: Tensor, settings: Settings) -> int | None:
    """Bytes that a call takes on the device at its peak; None where there is no such device."""
    if settings.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(frames)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
