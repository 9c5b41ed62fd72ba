"""From pixels to anomaly scores: images, frames, streams of frames."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fastalps import backends, ops, quantization
from fastalps.checkpoint import SCORE_KINDS
from fastalps.chunks import PATCH_BYTES, plan_chunks
from fastalps.engine import Engine, log_layer_by_layer, why_not
from fastalps.frame_errors import Network, frame_errors
from fastalps.frame_scores import FrameScores, check_frame_reduce, reduce_patches
from fastalps.fused import FUSED_BYTES, FusedEngine
from fastalps.fused import why_not as why_not_fused
from fastalps.gate import STREAM_SAMPLES, MotionGate, StreamingBackground, clip_background
from fastalps.inference import (
    LayerByLayer,
    Passes,
    choose_precision,
    default_batch_size,
    passes_for,
    pick,
)
from fastalps.inputs import (
    Pixels,
    by,
    check_array,
    check_pixels,
    home,
    is_array,
    pair,
    release_mapped,
    to_tensor,
)
from fastalps.models import ALPS, Scores
from fastalps.stage_times import StageTimes
from fastalps.streaming import Arriving, Staging, Stagings, one_ahead

if TYPE_CHECKING:
    from fastalps.checkpoint import Calibration


class Scorer:
    """Scores images, patches and frames with a trained model. Higher = more anomalous.

    The scores of an image x are mean squared errors (ALPS, section III-D): `normal` of its
    reconstruction, `perturbed` of the reconstruction of its perturbed latent, `average` of both.

    The model is copied when the scorer is made (in eval mode, batch norm folded): later training
    does not change the scores until `refresh()`. A model with perturbation="noise" draws new noise
    for every image, so only its normal score is the same twice.

    On CPUs the model runs in the whole-network engine (`fastalps.engine`) where the C++ kernels are
    there and no other backend was asked for; on CUDA devices, in bf16, in the fused kernels
    (`fastalps.fused`) where they were compiled for its shape. Else it runs layer by layer, for a
    reason that the logger "fastalps" tells once.

    Args:
        model: an `fastalps.ALPS`.
        score: "normal", "perturbed" or "average". What it does not need is not computed.
        precision: "fp32", "bf16", "int8" (CPUs; needs `model.quantization`, see
            `fastalps.quantize`), or "auto": in the engine the fastest that keeps the model's
            ranking by the rule of `fastalps.quantization.choose`; layer by layer, bf16 where the
            device multiplies it in hardware, else fp32. `scorer.precision` says which was chosen.
        patch_size: (height, width) of the patches that frames are cut into, or one int for both;
            None = the model's image size, the only one it takes.
        stride: (rows, columns) from one patch to the next; None = the patch size.
        edge: "cover", "drop" or "error" where patches do not divide a frame, see
            `fastalps.ops.patch_grid`.
        gate: drops the patches in which nothing moves, unscored: they score 0.
        frame_reduce: how a frame's score comes from its patches: "max", "mean" or "topk".
        top_k: patches averaged by "topk".
        batch_size: images or patches a network call, layer by layer; None = chosen by image size
            and device. The engine and the fused kernels choose for themselves.
        device: where to run; None = where the model is.

    Attributes:
        times: gets what a CUDA device worked on a stream and was waited for, see
            `fastalps.streaming`; None, the default, = nothing is timed.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    times: StageTimes | None = None

    def __init__(
        self,
        model: ALPS,
        score: str = "average",
        precision: str = "auto",
        *,
        patch_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        edge: str = "cover",
        gate: MotionGate | None = None,
        frame_reduce: str = "max",
        top_k: int = 3,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, ALPS):
            raise TypeError(f"model must be an ALPS, got {type(model).__name__}; fastalps.load one")
        _check_kind(score)
        check_frame_reduce(frame_reduce, top_k)
        self.model = model
        self.score = score
        self.image_size = pair(model.config.image_size)
        self.channels = model.config.channels
        self.patch_size = self.image_size if patch_size is None else pair(patch_size)
        if self.patch_size != self.image_size:
            raise ValueError(
                f"patch_size must be the model's image size {by(self.image_size)}, "
                f"got {by(self.patch_size)}; train a model for that size"
            )
        self.stride = self.patch_size if stride is None else pair(stride)
        self.edge = edge
        # Checks stride and edge now rather than at the first frame.
        ops.patch_grid(self.patch_size, self.patch_size, self.stride, edge)
        if gate is not None and not isinstance(gate, MotionGate):
            raise TypeError(f"gate must be a MotionGate or None, got {type(gate).__name__}")
        if gate is not None and self.channels != 1:
            raise ValueError(
                f"gate works on gray frames, but the model takes {self.channels} channels; "
                "use gate=None"
            )
        self.gate = gate
        self.frame_reduce = frame_reduce
        self.top_k = top_k
        self.device = torch.device(next(model.parameters()).device if device is None else device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device} is not there: torch finds no CUDA; use 'cpu'")
        self.precision = self._choose(precision)
        if batch_size is None:
            batch_size = default_batch_size(self.image_size, self.device)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a number of images from 1 up, got {batch_size!r}")
        self.batch_size = batch_size
        self._stagings = Stagings(self.device) if self.device.type == "cuda" else None
        self.refresh()

    def _choose(self, precision: str) -> str:
        auto = precision == "auto"
        reason = why_not(self.model.config, self.device, "fp32" if auto else precision)
        if not reason and auto:
            return quantization.choose(self.model)
        if precision == "int8" and reason:
            raise ValueError(f"precision int8 is not to be had: {reason}; use fp32, bf16 or auto")
        if precision == "int8" and self.model.quantization is None:
            raise ValueError(
                "precision int8 needs the ranges of the model's activations; set "
                "model.quantization = fastalps.quantize(model, normal_images) first"
            )
        if reason or auto:
            return choose_precision(precision, self.device)
        if precision in quantization.NARROW and not quantization.in_hardware(precision):
            needed = ", ".join(quantization.NARROW[precision])
            warnings.warn(
                f"this processor has no {precision} instructions ({needed}), so {precision} is "
                "emulated and slower than fp32",
                stacklevel=3,
            )
        return precision

    def refresh(self) -> None:
        """Takes the model's present weights."""
        self._copy: ALPS = copy.deepcopy(self.model)
        self._layers: LayerByLayer | None = None
        self._engine = self._make_engine()

    def _make_engine(self) -> Engine | FusedEngine | None:
        """What scores with the whole network in one call; None, and the reason logged, without."""
        if self.device.type == "cuda":
            reason = why_not_fused(self.model.config, self.device, self.precision)
            if not reason:
                return FusedEngine(self._copy, self.device)
        else:
            reason = why_not(self.model.config, self.device, self.precision)
            if not reason:
                found = self._copy.quantization
                ranges = None if found is None else found.ranges
                return Engine(self._copy, precision=self.precision, ranges=ranges)
        log_layer_by_layer(reason)
        return None

    @property
    def method(self) -> str:
        """How scores are computed now: "engine" (the whole network in one call, on CPUs), "fused"
        (the same on CUDA devices) or "layers"."""
        network = self._network()
        if isinstance(network, Engine):
            return "engine"
        return "fused" if isinstance(network, FusedEngine) else "layers"

    def _network(self) -> Network:
        """The engine where it covers the model and the backend asked for, else layer by layer."""
        if self._engine is not None:
            if backends.requested() in ("auto", "native"):
                return self._engine
            log_layer_by_layer(f"backend {backends.requested()} was asked for")
        if self._layers is None:
            self._layers = LayerByLayer(self._copy, self.device, self.precision, self.batch_size)
        return self._layers

    # Images ------------------------------------------------------------------------------------

    def score_images(self, images: Pixels) -> Tensor:
        """The chosen score of each image.

        Args:
            images: (N, C, H, W) of the model's size; uint8 (0 to 255) or floating (0 to 1); a
                tensor, an array or a memory map. N may be 0.

        Returns:
            (N,) float32, on the images' device (CPU for arrays).

        Raises:
            ValueError: another shape; NaN or infinite pixels.
            TypeError: another dtype.
        """
        return pick(self._image_errors(images, passes_for(self.score)), self.score)

    def scores_images(self, images: Pixels) -> Scores:
        """All three scores of each image in one pass: named normal, perturbed, average; (N,) each.

        Arguments and errors as for `score_images`.
        """
        errors = self._image_errors(images, "both")
        return Scores(*(pick(errors, kind) for kind in SCORE_KINDS))

    def _image_errors(self, images: Pixels, passes: Passes) -> Tensor:
        check_array("images", images)
        expected = (self.channels, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be (N, C, H, W) = (N, {', '.join(map(str, expected))}) for this "
                f"model, got shape {tuple(images.shape)}"
            )
        network = self._network()
        # Converted a few batches at a time: the whole in float32 would be four times its size.
        batch_bytes = 4 * math.prod(expected) * self.batch_size
        step = self.batch_size * max(1, PATCH_BYTES // batch_bytes)
        pieces = []
        for start in range(0, len(images), step):
            part = to_tensor(images[start : start + step])
            check_pixels("images", part, start)
            pieces.append(network.errors(part.to(self.device), passes))
            release_mapped(images)
        if not pieces:
            return torch.empty(2 if passes == "both" else 1, 0, device=home(images))
        return torch.cat(pieces, 1).to(home(images))

    # Frames ------------------------------------------------------------------------------------

    @overload
    def score_frames(self, frames: Pixels) -> FrameScores: ...

    @overload
    def score_frames(self, frames: Iterable[Pixels]) -> Iterator[FrameScores]: ...

    def score_frames(
        self, frames: Pixels | Iterable[Pixels]
    ) -> FrameScores | Iterator[FrameScores]:
        """The chosen score of each patch and each frame of a video.

        Args:
            frames: (N, H, W), or (N, C, H, W) for a model of several channels; uint8 (0 to 255), or
                floating (0 to 1) without a gate; a tensor, an array or a memory map. Or an
                iterable of such chunks (or of single frames) of one video: a stream. N may be 0.

        Returns:
            for an array, the `FrameScores` of its frames (on their device; CPU for arrays); for a
            stream, an iterator that yields the `FrameScores` of each chunk as it comes; on a CUDA
            device, when the next chunk has been taken, which is copied while this one is computed.
            Working memory does not depend on the number of frames. The gate's background, unless
            given, is the median of the clip; of a stream, of what came so far.

        Raises:
            ValueError: a shape that does not fit the model; a patch larger than the frame; a frame
                size that changes within a stream; NaN or infinite pixels.
            TypeError: another dtype.
        """
        results = self._frames(frames, (self.score,))
        if isinstance(results, dict):
            return results[self.score]
        return (result[self.score] for result in results)

    @overload
    def scores_frames(self, frames: Pixels) -> dict[str, FrameScores]: ...

    @overload
    def scores_frames(self, frames: Iterable[Pixels]) -> Iterator[dict[str, FrameScores]]: ...

    def scores_frames(
        self, frames: Pixels | Iterable[Pixels]
    ) -> dict[str, FrameScores] | Iterator[dict[str, FrameScores]]:
        """`score_frames` for all three kinds in one pass: {"normal": ..., "average": ..., ...}."""
        return self._frames(frames, SCORE_KINDS)

    def _frames(
        self, frames: Pixels | Iterable[Pixels], kinds: Sequence[str]
    ) -> dict[str, FrameScores] | Iterator[dict[str, FrameScores]]:
        if is_array(frames):
            return self._clip(frames, kinds)  # type: ignore[arg-type]
        if not isinstance(frames, Iterable):
            raise TypeError(
                "frames must be a tensor, an array or an iterable of them, "
                f"got {type(frames).__name__}"
            )
        return self._stream(frames, kinds)

    def _clip(self, frames: Pixels, kinds: Sequence[str]) -> dict[str, FrameScores]:
        self._check_frames(frames)
        # From the host in pieces: the next is copied while the device computes.
        staging = self._staging() if home(frames).type == "cpu" else None
        results = self._finished(self._launch(frames, kinds, staging=staging), kinds)
        self._leave(staging)
        return results

    def _stream(
        self, chunks: Iterable[Pixels], kinds: Sequence[str]
    ) -> Iterator[dict[str, FrameScores]]:
        staging = self._staging()
        launched = self._launched(chunks, kinds, staging)
        for pending in launched if staging is None else one_ahead(launched):
            yield self._finished(pending, kinds)
        self._leave(staging)

    def _staging(self) -> Staging | None:
        """The way of a stream to the device; None where the network reads the frames in place."""
        return None if self._stagings is None else self._stagings.take(self.times)

    def _leave(self, staging: Staging | None) -> None:
        if self._stagings is not None and staging is not None:
            self._stagings.leave(staging)

    def _launched(
        self, chunks: Iterable[Pixels], kinds: Sequence[str], staging: Staging | None
    ) -> Iterator[_Pending]:
        """Checks the chunks of a stream and starts on each, in order."""
        size: tuple[int, ...] | None = None
        estimate: StreamingBackground | None = None
        if self.gate is not None and self.gate.background is None:
            estimate = StreamingBackground(min(self.gate.samples or STREAM_SAMPLES, STREAM_SAMPLES))
        offset = 0
        for chunk in chunks:
            check_array("frames", chunk)
            if chunk.ndim == (2 if self.channels == 1 else 3):
                chunk = chunk[None]
            self._check_frames(chunk)
            if size is None:
                size = tuple(chunk.shape[-2:])
            if tuple(chunk.shape[-2:]) != size:
                raise ValueError(
                    f"frames must keep one size: they were {by(size)}, but frame {offset} is "
                    f"{by(chunk.shape[-2:])}"
                )
            background = None
            if estimate is not None and (len(chunk) or estimate.seen):
                background = estimate.update(chunk)
            yield self._launch(chunk, kinds, offset, background, staging)
            offset += len(chunk)

    def _check_frames(self, frames: Pixels) -> None:
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
        if self.gate is not None and str(frames.dtype).removeprefix("torch.") != "uint8":
            raise TypeError(f"frames must be uint8 for the motion gate, got {frames.dtype}")
        gate_background = None if self.gate is None else self.gate.background
        if gate_background is not None and tuple(gate_background.shape) != shape[-2:]:
            raise ValueError(
                f"frames must have the size {by(gate_background.shape)} of the gate's background, "
                f"got {by(shape[-2:])}"
            )

    def _launch(
        self,
        frames: Pixels,
        kinds: Sequence[str],
        offset: int = 0,
        background: Tensor | None = None,
        staging: Staging | None = None,
    ) -> _Pending:
        """Starts on frames that `_check_frames` has nothing against."""
        if frames.ndim == 4 and self.channels == 1:
            frames = frames[:, 0]
        size = (int(frames.shape[-2]), int(frames.shape[-1]))
        network = self._network()
        plan = _plan(
            size,
            self.patch_size,
            self.stride,
            self.edge,
            bytes_per_pixel=4 * self.channels,
            # Without patches in memory, pieces are limited by what holds the frames.
            limit=FUSED_BYTES if isinstance(network, FusedEngine) else PATCH_BYTES,
        )
        if staging is not None:
            plan = staging.limit(plan, frames.nbytes // max(1, len(frames)))
        if isinstance(network, FusedEngine):
            plan = network.whole_chunks(plan)
        passes: Passes = "both" if len(kinds) > 1 else passes_for(kinds[0])
        if self.gate is not None and background is None and len(frames):
            background = self.gate.background
            if background is None:
                background = clip_background(frames, self.gate.samples)
        threshold = None if self.gate is None else self.gate.threshold
        cut = (self.patch_size, self.stride, self.edge)
        errors, kept = frame_errors(
            network, frames, plan, cut, passes, threshold, background, offset, staging
        )
        if staging is None:
            return _Pending(errors, kept, size)
        if home(frames).type != "cpu":
            kept = None if kept is None else kept.to(home(frames))
            return _Pending(errors.to(home(frames)), kept, size)
        return _Pending(errors, kept, size, Arriving(staging, errors, kept))

    def _finished(self, pending: _Pending, kinds: Sequence[str]) -> dict[str, FrameScores]:
        errors, kept = pending.errors, pending.kept
        if pending.arriving is not None:
            errors, kept = pending.arriving.wait()
        # (kinds, N, P) in the order of SCORE_KINDS, all at once: operations on the few scores of a
        # single frame would take the host longer than the network takes the device.
        if len(kinds) > 1:
            patches = torch.cat([errors, errors.mean(0, keepdim=True)])
        else:
            patches = pick(errors, kinds[0])[None]
        frames = reduce_patches(patches, self.frame_reduce, self.top_k)
        common = (kept, pending.size, self.patch_size, self.stride, self.edge)
        return {
            kind: FrameScores(patches[row], frames[row], *common) for row, kind in enumerate(kinds)
        }

    # Threshold ---------------------------------------------------------------------------------

    def calibrate(
        self, normal_data: Any, target_fpr: float = 0.01, level: str = "image"
    ) -> Calibration:
        """The threshold that at most `target_fpr` of held-out normal scores exceed.

        See `fastalps.calibration.calibrate`.
        """
        from fastalps.calibration import calibrate

        return calibrate(self, normal_data, target_fpr, level)


@dataclass
class _Pending:
    """What `Scorer._launch` has started: the errors and flags of `frame_errors`, and the frames'
    size; where they are still on their way to the host, `arriving` has both instead."""

    errors: Tensor
    kept: Tensor | None
    size: tuple[int, int]
    arriving: Arriving | None = None


# A stream asks for the same plan with every chunk.
_plan = functools.lru_cache(maxsize=16)(plan_chunks)


def _check_kind(score: str) -> None:
    if score not in SCORE_KINDS:
        raise ValueError(f"score must be one of {', '.join(SCORE_KINDS)}, got {score!r}")
