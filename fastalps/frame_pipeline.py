"""Frames through a scorer: checked, cut, staged to the device, scored, and back in order."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalps.chunks import PATCH_BYTES, plan_chunks
from fastalps.frame_errors import frame_errors
from fastalps.frame_scores import FrameScores, reduce_patches
from fastalps.fused import FUSED_BYTES, FusedEngine
from fastalps.gate import STREAM_SAMPLES, MotionGate, StreamingBackground
from fastalps.inputs import Pixels, by, check_array, home
from fastalps.passes import Cut, Network, Passes, passes_for, pick
from fastalps.stage_times import StageTimes
from fastalps.streaming import Arriving, Staging, Stagings, one_ahead


@dataclass
class FramePipeline:
    """The way of one clip's or stream's frames to their scores.

    Attributes:
        network: computes the errors.
        stagings: ways to its device; None where it reads frames in place.
        channels: of the frames.
        cut: how frames are cut into patches.
        kinds: one kind of score, or all of them.
        frame_reduce, top_k: how a frame's score comes from its patches.
        gate: drops patches in which nothing moves; None = no gate.
        times: gets what the device worked and was waited for.
    """

    network: Network
    stagings: Stagings | None
    channels: int
    cut: Cut
    kinds: Sequence[str]
    frame_reduce: str
    top_k: int
    gate: MotionGate | None
    times: StageTimes | None

    def clip(self, frames: Pixels) -> dict[str, FrameScores]:
        """The scores of (N, H, W) or (N, C, H, W) frames, by kind."""
        self._check(frames)
        # From the host in pieces: the next is copied while the device computes.
        staging = self._staging() if home(frames).type == "cpu" else None
        results = self._finish(self._launch(frames, staging=staging))
        self._leave(staging)
        return results

    def stream(self, chunks: Iterable[Pixels]) -> Iterator[dict[str, FrameScores]]:
        """The scores of each chunk of a stream, one late where a device computes beside the
        host."""
        staging = self._staging()
        launched = self._launch_each(chunks, staging)
        for pending in launched if staging is None else one_ahead(launched):
            yield self._finish(pending)
        self._leave(staging)

    def _staging(self) -> Staging | None:
        return None if self.stagings is None else self.stagings.take(self.times)

    def _leave(self, staging: Staging | None) -> None:
        if self.stagings is not None and staging is not None:
            self.stagings.leave(staging)

    def _launch_each(self, chunks: Iterable[Pixels], staging: Staging | None) -> Iterator[_Pending]:
        """Checks the chunks of a stream and starts on each, in order."""
        gate = self.gate
        size: tuple[int, ...] | None = None
        estimate: StreamingBackground | None = None
        if gate is not None and gate.background is None:
            estimate = StreamingBackground(min(gate.samples or STREAM_SAMPLES, STREAM_SAMPLES))
        offset = 0
        for chunk in chunks:
            check_array("frames", chunk)
            if chunk.ndim == (2 if self.channels == 1 else 3):
                chunk = chunk[None]
            self._check(chunk)
            if size is None:
                size = tuple(chunk.shape[-2:])
            if tuple(chunk.shape[-2:]) != size:
                raise ValueError(
                    f"frames must keep one size: they were {by(size)}, but frame {offset} is "
                    f"{by(chunk.shape[-2:])}"
                )
            background = None
            if estimate is not None and (len(chunk) or estimate.seen):
                background = estimate.update(chunk.reshape(len(chunk), *size))
            yield self._launch(chunk, offset, background, staging)
            offset += len(chunk)

    def _check(self, frames: Pixels) -> None:
        check_array("frames", frames)
        shape = tuple(frames.shape)
        if frames.ndim not in (3, 4):
            raise ValueError(f"frames must be (N, H, W) or (N, C, H, W), got shape {shape}")
        channels = 1 if frames.ndim == 3 else shape[1]
        if channels != self.channels:
            raise ValueError(
                f"frames must have the model's {self.channels} channel(s), "
                f"got {channels} in shape {shape}"
            )
        gate = self.gate
        if gate is None:
            return
        if str(frames.dtype).removeprefix("torch.") != "uint8":
            raise TypeError(f"frames must be uint8 for the motion gate, got {frames.dtype}")
        if gate.background is not None and tuple(gate.background.shape) != shape[-2:]:
            raise ValueError(
                f"frames must have the size {by(gate.background.shape)} of the gate's background, "
                f"got {by(shape[-2:])}"
            )

    def _launch(
        self,
        frames: Pixels,
        offset: int = 0,
        background: Tensor | None = None,
        staging: Staging | None = None,
    ) -> _Pending:
        """Starts on frames that `_check` has nothing against."""
        if frames.ndim == 4 and self.channels == 1:
            frames = frames[:, 0]
        size = (int(frames.shape[-2]), int(frames.shape[-1]))
        network, gate = self.network, self.gate
        plan = _plan(
            size,
            *self.cut,
            bytes_per_pixel=4 * self.channels,
            # Without patches in memory, pieces are limited by what holds the frames.
            limit=FUSED_BYTES if isinstance(network, FusedEngine) else PATCH_BYTES,
        )
        if staging is not None:
            plan = staging.limit(plan, frames.nbytes // max(1, len(frames)))
        if isinstance(network, FusedEngine):
            plan = network.whole_chunks(plan)
        passes: Passes = "both" if len(self.kinds) > 1 else passes_for(self.kinds[0])
        if gate is not None and background is None and len(frames):
            background = gate.background_of(frames)
        threshold = None if gate is None else gate.threshold
        errors, kept = frame_errors(
            network, frames, plan, self.cut, passes, threshold, background, offset, staging
        )
        if staging is None:
            return _Pending(errors, kept, size)
        if home(frames).type != "cpu":
            kept = None if kept is None else kept.to(home(frames))
            return _Pending(errors.to(home(frames)), kept, size)
        return _Pending(errors, kept, size, Arriving(staging, errors, kept))

    def _finish(self, pending: _Pending) -> dict[str, FrameScores]:
        errors, kept = pending.errors, pending.kept
        if pending.arriving is not None:
            errors, kept = pending.arriving.wait()
        # (kinds, N, P) in the order of SCORE_KINDS, all at once: operations on the few scores of a
        # single frame would take the host longer than the network takes the device.
        if len(self.kinds) > 1:
            patches = torch.cat([errors, errors.mean(0, keepdim=True)])
        else:
            patches = pick(errors, self.kinds[0])[None]
        frames = reduce_patches(patches, self.frame_reduce, self.top_k)
        common = (kept, pending.size, *self.cut)
        return {
            kind: FrameScores(patches[row], frames[row], *common)
            for row, kind in enumerate(self.kinds)
        }


@dataclass
class _Pending:
    """What was started: the errors and flags of `frame_errors`, and the frames' size; where they
    are still on their way to the host, `arriving` has both instead."""

    errors: Tensor
    kept: Tensor | None
    size: tuple[int, int]
    arriving: Arriving | None = None


# A stream asks for the same plan with every chunk.
_plan = functools.lru_cache(maxsize=16)(plan_chunks)
