"""Whole-network scoring on CUDA devices: frames in, one error a patch and pass out.

Four kernels of `csrc/cuda/fused*`, over chunks of patches whose maps stay in the L2 cache: E (the
first two convolutions), M in two halves (the other two; the perturbation, the dense layer and two
transposed convolutions) and D (the last four layers, sigmoid and squared error). No patch is copied
and no reconstruction is stored. Weights and maps are bf16, sums float32, errors float32.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fastalps import backends, fused_build, ops
from fastalps.chunks import Plan
from fastalps.fused_packing import SHAPES, pack_fused, shape_number, sizes
from fastalps.inference import Cut, Passes
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, BOUNDS, ModelConfig

# Patches a block of the first half of M: a chunk gives each multiprocessor as many blocks.
BLOCK_PATCHES = 16
# Flags that one step of the motion gate's scan covers: kTile of csrc/cuda/active_patches.cu.
GATE_TILE = 4096
# Scratch of a chunk, about: what the L2 cache of an H100 still holds. Narrow networks (8 KB a
# patch) were 5% faster with twice the patches, wide ones (17 KB) no faster.
CHUNK_BYTES = 40_000_000
# Bytes that a call's patches would take as float32, if they were stored: the gate's lists of a call
# take a two-hundredth of it.
FUSED_BYTES = 1 << 30
# Patches of one native call: csrc/bindings_fused.cpp counts them in 32 bits.
MOST_PATCHES = 1 << 29

_library = torch.library.Library("fastalps", "FRAGMENT")
_library.define(
    "fused_errors(Tensor frames, Tensor? background, float threshold, int[2] stride, bool cover, "
    "int shape, Tensor weights, Tensor biases, int bound, float slope, float strength, "
    "int smoothing, bool normal, bool perturbed, int chunk, Tensor(a!) scratch, Tensor(b!)? flags, "
    "Tensor(c!)? places, Tensor(d!) errors) -> ()"
)
torch.library.register_fake("fastalps::fused_errors", lambda *arguments: None, lib=_library)


def why_not(config: ModelConfig, device: torch.device, precision: str) -> str:
    """Why the fused kernels cannot score with this model, device and precision; empty if they can.

    Args:
        config: of the model.
        device: where to run.
        precision: "bf16" is the only one that they have.
    """
    if device.type != "cuda":
        return f"the fused kernels run on CUDA devices, not on {device.type}"
    if precision != "bf16":
        return f"the fused kernels compute in bf16, not in {precision}"
    if reason := _not_covered(config, device):
        return reason
    native = backends.load_native("cuda")
    if not native.available:
        return native.reason
    return _unsupported(torch.cuda.get_device_capability(device))


def _unsupported(capability: tuple[int, int]) -> str:
    # 163 KiB of shared memory a block, which smaller chips of these generations lack.
    if capability == (8, 0) or capability[0] in (9, 10):
        return ""
    number = ".".join(map(str, capability))
    return f"the fused kernels need compute capability 8.0, 9.x or 10.x, not {number}"


def _not_covered(config: ModelConfig, device: torch.device) -> str:
    """What of a model the kernels do not have; empty if they have all."""
    if config.perturbation == "noise":
        return "the fused kernels draw no noise for a perturbation"
    if not 0 <= config.negative_slope <= 1:
        return f"the fused kernels need a negative_slope of 0 to 1, not {config.negative_slope}"
    shape = _shape(config, device)
    return shape if isinstance(shape, str) else ""


def _shape(config: ModelConfig, device: torch.device) -> int | str:
    """The number of the compiled network of these widths, or why there is none."""
    number = shape_number(config)
    if number is not None:
        return number
    known = ", ".join(f"{preset} at {side} x {side}" for preset, side in SHAPES)
    reason = (
        f"the fused kernels are compiled for one channel and the widths of {known}, not for "
        f"{config.preset} with latent {config.latent}, {config.channels} channel(s) and images of "
        f"{config.image_size[0]} x {config.image_size[1]}"
    )
    if device.type != "cuda" or not torch.cuda.is_available():
        return reason
    capability = torch.cuda.get_device_capability(device)
    built = _unsupported(capability) or fused_build.shape_number(config, capability)
    return built if isinstance(built, int) else f"{reason}: {built}"


class FusedEngine:
    """Errors of images and frames under a private, packed copy of an ALPS model, on a GPU.

    Calls allocate their outputs and scratch memory (8 to 17 KB a patch, about 40 MB at most) from
    torch's allocator and never wait for the device, so that `torch.cuda.graph` captures them, with
    a motion gate, too. A score does not depend on the other patches of the call.

    Args:
        model: an `fastalps.ALPS` that `why_not` has nothing against; copied.
        device: a CUDA device.

    Raises:
        ValueError: a model that the kernels do not cover.
    """

    def __init__(self, model: ALPS, device: torch.device) -> None:
        self.device = device
        self.config = model.config
        if reason := _not_covered(model.config, device):
            raise ValueError(f"model: {reason}")
        shape = _shape(model.config, device)
        assert isinstance(shape, int)
        self.shape = shape
        self.weights, self.biases = (part.to(device) for part in pack_fused(model))
        count = torch.cuda.get_device_properties(device).multi_processor_count
        wave = BLOCK_PATCHES * count
        self.sizes = sizes(model.config)
        self.chunk = wave * max(1, CHUNK_BYTES // (wave * self.sizes.bytes(2)))

    def update(self, model: ALPS) -> None:
        """Takes another model's weights in place: graphs that were captured use them, too.

        Args:
            model: of the same configuration.

        Raises:
            ValueError: another configuration.
        """
        if model.config != self.config:
            raise ValueError(f"model: expected the configuration {self.config}, got {model.config}")
        packed = pack_fused(model)
        self.weights.copy_(packed.weights)
        self.biases.copy_(packed.biases)

    def whole_chunks(self, plan: Plan) -> Plan:
        """The plan with pieces of whole chunks: a part of one takes the first half of M as long."""
        patches = plan.step * plan.patches // self.chunk * self.chunk
        return replace(plan, step=max(1, patches // plan.patches)) if patches else plan

    def errors(self, images: Tensor, passes: Passes) -> Tensor:
        """See `fastalps.frame_errors.Network.errors`."""
        size = self.config.image_size
        pieces = [
            self.frame_errors(part, (size, size, "drop"), passes)[0].flatten(1)
            for part in images.split(MOST_PATCHES)
        ]
        return torch.cat(pieces, 1)

    @torch.no_grad()
    def frame_errors(
        self,
        frames: Tensor,
        cut: Cut,
        passes: Passes,
        background: Tensor | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """See `fastalps.frame_errors.Network.frame_errors`; of less than 2^30 patches."""
        if frames.dim() == 4:
            frames = frames[:, 0]
        if frames.dtype not in (torch.uint8, torch.float32):
            frames = unit_pixels(frames)
        _, stride, edge = cut
        shape = (frames.shape[0], _patches_of(frames.shape[1:], cut))
        total = shape[0] * shape[1]
        config = self.config
        single = config.perturbation == "none"  # Both passes are the same.
        normal, perturbed = single or passes != "perturbed", not single and passes != "normal"
        count = 2 if normal and perturbed else 1
        chunk = max(1, min(self.chunk, total))
        scratch = self._empty(chunk * self.sizes.bytes(2 if perturbed else 1), torch.uint8)
        errors = self._empty((count, *shape), torch.float32)
        flags = places = None
        if background is not None:
            flags = self._empty(shape, torch.uint8)
            places = self._empty(-(-total // GATE_TILE) + 1 + 2 * total, torch.int64)
        torch.ops.fastalps.fused_errors(
            frames, background, float(threshold), stride, edge != "drop",
            self.shape, self.weights, self.biases, BOUNDS.index(config.bound),
            config.negative_slope, config.strength, config.smoothing, normal, perturbed,
            chunk, scratch, flags, places, errors,
        )  # fmt: skip
        if single and passes == "both":
            errors = errors.repeat(2, 1, 1)
        # The kernels write 0 or 1.
        return errors, None if flags is None else flags.view(torch.bool)

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


@functools.lru_cache(maxsize=16)
def _patches_of(frame_size: tuple[int, int], cut: Cut) -> int:
    """Patches of a frame; frames of one video ask the same again and again."""
    rows, columns = ops.patch_grid(frame_size, *cut)
    return len(rows) * len(columns)
