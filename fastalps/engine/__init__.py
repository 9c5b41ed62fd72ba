"""The whole-network engine of the CPU: pixels in, errors out, in one native call.

Batch norm is folded into packed weights, activations of a few patches stay in a core's caches, and
no reconstruction is stored. `csrc/cpu/engine.inl` computes; this package folds, packs and calls.
"""

from __future__ import annotations

import copy
import functools
import logging

import torch
from torch import Tensor

from fastalps import backends, ops
from fastalps.engine import narrow
from fastalps.engine.packing import PRECISIONS, pack
from fastalps.folding import fold_batch_norm
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, ModelConfig
from fastalps.passes import Cut, Passes

logger = logging.getLogger("fastalps")

# Floating-point operations of a native call for each thread, or a single frame if that has more:
# Ctrl-C waits for a call. Half a second at most on any machine, and enough blocks to share out.
CALL_FLOP = 1e10

_library = torch.library.Library("fastalps", "FRAGMENT")
_library.define(
    "engine_images(Tensor images, Tensor plan, Tensor weights, Tensor words, Tensor? noise, "
    "bool normal, bool perturbed) -> Tensor"
)
_library.define(
    "engine_frames(Tensor frames, Tensor? background, float threshold, int[2] stride, bool cover, "
    "Tensor plan, Tensor weights, Tensor words, Tensor? noise, bool normal, bool perturbed) "
    "-> (Tensor, Tensor)"
)


# Pixels along an axis at most: the last maps of larger images have more than the 64 pixels that
# csrc/cpu/engine.h sums at once.
LARGEST_IMAGE = 1024


def why_not(config: ModelConfig, device: torch.device, precision: str) -> str:
    """Why the engine cannot score with this model, device and precision; empty where it can."""
    if device.type != "cpu":
        return f"the engine runs on CPUs, not on {device.type} devices"
    if precision not in PRECISIONS:
        return f"the engine computes in {', '.join(PRECISIONS)}, not in {precision}"
    largest = LARGEST_IMAGE if precision == "fp32" else narrow.LARGEST_IMAGE
    if max(config.image_size) > largest:
        size = config.image_size
        return f"in {precision} the engine takes images of up to {largest} pixels, not {size}"
    native = backends.load_native("cpu")
    return "" if native.available else native.reason


@functools.cache
def log_layer_by_layer(reason: str) -> None:
    """Says once for each reason that a model is scored layer by layer."""
    logger.info("scoring layer by layer: %s", reason)


class Engine:
    """Errors of images and frames under a private, packed copy of an ALPS model.

    A score depends neither on the other images of the call, nor on the number of threads
    (`torch.get_num_threads()`). Calls may come from several threads at once.

    Args:
        model: an `fastalps.ALPS`; copied, so that later changes to it do not show.
        minimal: in fp32, use algorithms with fewer multiplications (see `fastalps.engine.axes`);
            False: direct convolutions, as in bf16 and int8; None: for each layer, what is faster.
        precision: "fp32", "bf16" or "int8" of weights and activations; errors are float32. Without
            instructions for the last two (AVX512-BF16, AVX512-VNNI) others give the same, slower.
        ranges: of activations, for int8; see `fastalps.engine.narrow.activation_ranges`.

    Raises:
        ValueError: int8 without the ranges of this model, or with weights that are not finite.

    `flop`: floating-point operations of both scores of an image, without the sums around products.
    """

    def __init__(
        self,
        model: ALPS,
        minimal: bool | None = None,
        *,
        precision: str = "fp32",
        ranges: narrow.Ranges | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        if precision == "int8" and len(ranges or ()) != narrow.range_count(model):
            raise ValueError(
                f"ranges: int8 needs {narrow.range_count(model)} ranges of activations for this "
                f"model, got {len(ranges or ())}; find them with fastalps.quantize"
            )
        self.precision = precision
        # Folded and mixed in float64: weights round once.
        network = copy.deepcopy(model).eval().requires_grad_(False).to("cpu", torch.float64)
        fold_batch_norm(network)
        self.config = model.config
        if precision == "fp32":
            found = pack(network, minimal)
        else:
            found = narrow.pack_narrow(network, precision, ranges)
        self.packed, self.flop = found[:3], found.flop
        # Bytes have no NaN: scores would look as if nothing were wrong.
        if precision == "int8" and not self.packed[1].isfinite().all():
            raise ValueError("precision int8 needs finite weights; train the model again")
        self.call_size = max(1, int(CALL_FLOP / model.flops()))  # images, for each thread

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        _, weights, words = self.packed
        return 4 * (weights.numel() + words.numel())

    @torch.inference_mode()
    def errors(self, images: Tensor, passes: Passes) -> Tensor:
        """See `fastalps.passes.Network.errors`."""
        images = _accepted(images)
        found = [self._call(part, passes) for part in images.split(self._images_a_call())]
        return torch.cat(found, 1)

    def _images_a_call(self) -> int:
        return self.call_size * torch.get_num_threads()

    def _call(self, images: Tensor, passes: Passes) -> Tensor:
        noise, flags = self._passes(images.shape[0], passes)
        errors = torch.ops.fastalps.engine_images(images, *self.packed, noise, *flags)
        return self._rows(errors, passes)

    @torch.inference_mode()
    def frame_errors(
        self,
        frames: Tensor,
        cut: Cut,
        passes: Passes,
        background: Tensor | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """See `fastalps.passes.Network.frame_errors`."""
        frames = _accepted(frames if frames.dim() == 4 else frames.unsqueeze(1))
        _, stride, edge = cut
        rows, columns = ops.patch_grid(frames.shape[-2:], *cut)
        patches = len(rows) * len(columns)
        pieces = []
        for part in frames.split(max(1, self._images_a_call() // patches)):
            noise, flags = self._passes(part.shape[0] * patches, passes)
            pieces.append(
                torch.ops.fastalps.engine_frames(
                    part, background, float(threshold), stride, edge != "drop",
                    *self.packed, noise, *flags,
                )
            )  # fmt: skip
        errors = self._rows(torch.cat([errors for errors, _ in pieces], 1), passes)
        if background is None:
            return errors, None
        return errors, torch.cat([kept for _, kept in pieces])

    def _passes(self, count: int, passes: Passes) -> tuple[Tensor | None, tuple[bool, bool]]:
        """What the native call takes for `passes`: noise, and which passes to run."""
        if self.config.perturbation == "none":  # both passes are the same
            return None, (True, False)
        noise = None
        if self.config.perturbation == "noise" and passes != "normal":
            noise = torch.randn(count, self.config.latent)
        return noise, (passes != "perturbed", passes != "normal")

    def _rows(self, errors: Tensor, passes: Passes) -> Tensor:
        if passes == "both" and errors.shape[0] == 1:
            return errors.repeat(2, *[1] * (errors.dim() - 1))
        return errors


def _accepted(pixels: Tensor) -> Tensor:
    return pixels if pixels.dtype in (torch.uint8, torch.float32) else unit_pixels(pixels)
