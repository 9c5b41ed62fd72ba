"""The layer-by-layer path of scoring: one network call after the other, nothing computed twice.

Batch norm is folded into the convolutions, memory is channels-last, both decoder passes are one of
2N, and neither the reconstruction nor its error's terms are ever stored. On CUDA a whole batch is
one graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastalps import ops
from fastalps.folding import fold_batch_norm
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, alterations
from fastalps.passes import Cut, Passes
from fastalps.smoothing import reconstruction_errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Sizes of batches that a CPU sees: a full one, and the smaller ones that a last one is padded to.
BATCH_SIZES = 8


def default_batch_size(image_size: tuple[int, int], device: torch.device) -> int:
    """Images a batch: as many as keep the widest activations at some ten megabytes on a CPU."""
    pixels = image_size[0] * image_size[1]
    budget = 1 << (17 if device.type == "cpu" else 20)
    return max(1, min(1024, budget // pixels))


class LayerByLayer:
    """Errors of images under a private, folded copy of an ALPS model.

    Args:
        model: an `fastalps.ALPS`; copied, so that later changes to it do not show.
        device: where to run.
        precision: "fp32" or "bf16", of weights and activations; targets and errors are float32.
        batch_size: images a network call at most.
    """

    def __init__(self, model: ALPS, device: torch.device, precision: str, batch_size: int) -> None:
        self.device = device
        self.dtype = DTYPES[precision]
        self.batch_size = batch_size
        network = copy.deepcopy(model).eval().requires_grad_(False)
        network.to(device)
        # Of layers that are not ours it is not known what else they read, what they do with a
        # result, whether they look at other images of a batch, or can be captured.
        self._plain = not alterations(model)
        if self._plain:
            fold_batch_norm(network)
            for module in network.modules():
                if isinstance(module, nn.LeakyReLU):
                    module.inplace = True
        # After folding, which rounds once only that way.
        self.network = network.to(self.dtype)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._graphs: dict[str, _Graph] = {}
        # Without a perturbation both passes are the same.
        self._single = model.config.perturbation == "none"

    @torch.inference_mode()
    def errors(self, images: Tensor, passes: Passes) -> Tensor:
        """See `fastalps.passes.Network.errors`."""
        images = unit_pixels(images)
        rows = 2 if passes == "both" else 1
        if self._single:
            passes = "normal"
        result = torch.empty(rows, images.shape[0], dtype=torch.float32, device=images.device)
        with _exact_float32(self.device):
            for start in range(0, images.shape[0], self.batch_size):
                batch = images[start : start + self.batch_size]
                result[:, start : start + batch.shape[0]] = self._batch(batch, passes)
        return result

    def frame_errors(
        self,
        frames: Tensor,
        cut: Cut,
        passes: Passes,
        background: Tensor | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """See `fastalps.passes.Network.frame_errors`."""
        patch, stride, edge = cut
        if background is None:
            scale = 1 / 255 if frames.dtype == torch.uint8 else 1.0
            patches = ops.tile_patches(frames, patch, stride, edge=edge, scale=scale)
            errors = self.errors(patches.flatten(0, 1), passes)
            return errors.unflatten(1, patches.shape[:2]), None
        patches, index = ops.active_patches(
            frames, background, patch, stride, threshold=threshold, edge=edge
        )
        rows, columns = ops.patch_grid(frames.shape[1:], *cut)
        shape = (frames.shape[0], len(rows) * len(columns))
        found = self.errors(patches, passes)
        errors = found.new_zeros(found.shape[0], *shape)
        kept = torch.zeros(shape, dtype=torch.bool, device=found.device)
        frame, number = index.unbind(1)
        errors[:, frame, number] = found
        kept[frame, number] = True
        return errors, kept

    def _batch(self, batch: Tensor, passes: Passes) -> Tensor:
        if not self._plain:
            return self.forward(batch, passes)
        if self.device.type != "cuda":
            # Libraries prepare, and keep, a kernel for each size of batch that they meet; behind a
            # motion gate every last batch has another. Padded, there are eight sizes.
            count, step = batch.shape[0], -(-self.batch_size // BATCH_SIZES)
            padding = -count % step
            if padding:
                batch = torch.cat([batch, batch.new_zeros(padding, *batch.shape[1:])])
            return self.forward(batch, passes)[:, :count]
        if passes not in self._graphs:
            self._graphs[passes] = _Graph(self, batch.shape[1:], passes)
        return self._graphs[passes].replay(batch)

    def forward(self, batch: Tensor, passes: Passes) -> Tensor:
        """One batch, eagerly: (rows, n) float32."""
        network, smoothing = self.network, self.network.config.smoothing
        target = batch.contiguous(memory_format=torch.channels_last)
        images = target.to(self.dtype)
        latent = network.encode(images)
        if passes == "normal":
            return reconstruction_errors(network.decode(latent), target, smoothing, paired=False)
        perturbed, _ = ops.perturb_latent(latent, network.distort(images), network.config.strength)
        if passes == "perturbed":
            return reconstruction_errors(network.decode(perturbed), target, smoothing, paired=False)
        both = network.decode(torch.cat([latent, perturbed]))
        return reconstruction_errors(both, target, smoothing, paired=True)


class _Graph:
    """One batch as a CUDA graph with static buffers."""

    def __init__(self, engine: LayerByLayer, shape: torch.Size, passes: Passes) -> None:
        self.images = torch.zeros(engine.batch_size, *shape, device=engine.device)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.graph = torch.cuda.CUDAGraph()
        # Libraries allocate and choose algorithms at their first calls, which no graph may record.
        stream = torch.cuda.Stream(engine.device)
        stream.wait_stream(torch.cuda.current_stream(engine.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                engine.forward(self.images, passes)
        torch.cuda.current_stream(engine.device).wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.errors = engine.forward(self.images, passes)

    def replay(self, batch: Tensor) -> Tensor:
        # The rest of a last, smaller batch keeps old images: their errors are not read.
        count = batch.shape[0]
        self.images[:count].copy_(batch)
        self.graph.replay()
        return self.errors[:, :count]


@contextlib.contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """fp32 means fp32: TF32 convolutions, cuDNN's default, keep 10 bits of mantissa."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    ):
        yield
