"""From pixels to anomaly scores: images, frames, streams of frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fastalps import ops
from fastalps.chunks import PATCH_BYTES
from fastalps.environment import find_device
from fastalps.frame_pipeline import FramePipeline
from fastalps.frame_scores import FrameScores, check_frame_reduce
from fastalps.gate import MotionGate
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
from fastalps.layers import default_batch_size
from fastalps.models import ALPS, SCORE_KINDS, Scores, check_kind
from fastalps.networks import Networks, choose_precision
from fastalps.passes import Passes, passes_for, pick
from fastalps.scalars import is_whole, plain
from fastalps.stage_times import StageTimes
from fastalps.streaming import Stagings

if TYPE_CHECKING:
    from fastalps.calibration import Calibration


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
            `fastalps.quantize`), or "auto": on CPUs the fastest that is known to keep the model's
            ranking; on CUDA devices, and layer by layer, bf16 where the device multiplies it in
            hardware, unless it is known not to keep it (`fastalps.quantization.choose`).
            `scorer.precision` says which was chosen.
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
        check_kind("score", score)
        check_frame_reduce(frame_reduce, top_k)
        self.model = model
        self.score = score
        self.image_size = pair(model.config.image_size)
        self.channels = model.config.channels
        self.patch_size = self.image_size if patch_size is None else pair(patch_size, "patch_size")
        if self.patch_size != self.image_size:
            raise ValueError(
                f"patch_size must be the model's image size {by(self.image_size)}, "
                f"got {by(self.patch_size)}; train a model for that size"
            )
        self.stride = self.patch_size if stride is None else pair(stride, "stride")
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
        self.top_k = plain(top_k)
        self.device = find_device(next(model.parameters()).device if device is None else device)
        self.precision = choose_precision(model, self.device, precision)
        if batch_size is None:
            batch_size = default_batch_size(self.image_size, self.device)
        if not is_whole(batch_size):
            raise ValueError(f"batch_size must be a number of images from 1 up, got {batch_size!r}")
        self.batch_size = batch_size
        self._stagings = Stagings(self.device) if self.device.type == "cuda" else None
        self.refresh()

    def refresh(self) -> None:
        """Takes the model's present weights."""
        self._networks = Networks(self.model, self.device, self.precision, self.batch_size)

    @property
    def method(self) -> str:
        """How scores are computed now: "engine" (the whole network in one call, on CPUs), "fused"
        (the same on CUDA devices) or "layers"."""
        return self._networks.method

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
        network = self._networks.current()
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
        pipeline = FramePipeline(
            self._networks.current(),
            self._stagings,
            self.channels,
            (self.patch_size, self.stride, self.edge),
            kinds,
            self.frame_reduce,
            self.top_k,
            self.gate,
            self.times,
        )
        if is_array(frames):
            return pipeline.clip(frames)  # type: ignore[arg-type]
        if not isinstance(frames, Iterable):
            raise TypeError(
                "frames must be a tensor, an array or an iterable of them, "
                f"got {type(frames).__name__}"
            )
        return pipeline.stream(frames)

    # Threshold ---------------------------------------------------------------------------------

    def calibrate(
        self, normal_data: Any, target_fpr: float = 0.01, level: str = "image"
    ) -> Calibration:
        """The threshold that at most `target_fpr` of held-out normal scores exceed.

        See `fastalps.calibration.calibrate`.
        """
        from fastalps.calibration import calibrate

        return calibrate(self, normal_data, target_fpr, level)
