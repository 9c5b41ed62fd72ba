"""Whole-network scoring on CUDA devices: frames in, one error a patch and pass out.

Five kernels of `csrc/cuda/fused*`, over chunks of patches whose maps stay in the L2 cache: E (the
first two convolutions), M in three parts (the other two; the perturbation and the dense layer; two
transposed convolutions) and D (the last four layers, sigmoid and squared error). No patch is copied
and no reconstruction is stored. Weights and maps are bf16, sums float32, errors float32.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastalps import backends, ops
from fastalps.chunks import Plan
from fastalps.fused import build, replay
from fastalps.fused.packing import SHAPES, pack_fused, shape_number, sizes
from fastalps.fused.replay import Repeats
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS, BOUNDS, ModelConfig
from fastalps.passes import Cut, Passes

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
# Patches of a call that is replayed as a graph, not tuned: ten frames or so. Larger calls take the
# device longer than their launches take the host, and each graph has scratch of its own.
MOST_REPLAYED = 1024
# Kinds of calls, by stream, size and options, of which an engine remembers graphs.
REPEATS = 4

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
    built = _unsupported(capability) or build.loaded_shape(config, capability)
    return built if isinstance(built, int) else f"{reason}: {built}"


class FusedEngine:
    """Errors of images and frames under a private, packed copy of an ALPS model, on a GPU.

    Calls allocate their outputs and scratch memory (8 to 17 KB a patch, about 40 MB at most) from
    torch's allocator and never wait for the device, so that `torch.cuda.graph` captures them, with
    a motion gate, too. A score does not depend on the other patches of the call.

    Calls of up to 1,024 patches, such as the frames of a camera, are CUDA graphs from the second
    one of a kind on (stream, sizes, options): pixels are copied in, results out. The engine keeps
    the last four, each with up to 18 MB of scratch memory of its own. Threads may share it.

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
        # Without a perturbation both passes are the same.
        self._single = model.config.perturbation == "none"
        self._repeats: Repeats[_Repeated] = Repeats(REPEATS)
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
        """See `fastalps.passes.Network.errors`."""
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
        """See `fastalps.passes.Network.frame_errors`; of less than 2^30 patches."""
        if frames.dim() == 4:
            frames = frames[:, 0]
        if frames.dtype not in (torch.uint8, torch.float32):
            frames = unit_pixels(frames)
        patches = _patches_of(frames.shape[1:], cut)
        call = _Call(frames, cut, passes, background, float(threshold), patches)
        errors, flags = self._replayed(call) or self._run(call, self._buffers(call))
        if self._single and passes == "both":
            errors = errors.repeat(2, 1, 1)
        # The kernels write 0 or 1.
        return errors, None if flags is None else flags.view(torch.bool)

    def _replayed(self, call: _Call) -> tuple[Tensor, Tensor | None] | None:
        """Errors and flags of a small call like an earlier one; None where it has to run."""
        where = call.frames.device
        total = call.frames.shape[0] * call.patches
        if not 0 < total <= min(MOST_REPLAYED, self.chunk) or where != self.weights.device:
            return None
        if call.background is not None and call.background.device != where:
            return None
        stream = replay.stream_of(where)
        if stream is None:
            return None
        # Graphs of one stream do their work in turn. Of several, each has its own memory.
        with self._repeats.lock:
            repeated = self._repeats.find((stream, call.kind()), lambda: _Repeated(self, call))
            return None if repeated is None else repeated.run(call)

    def _buffers(self, call: _Call) -> _Buffers:
        """Uninitialised."""
        shape = (call.frames.shape[0], call.patches)
        total = shape[0] * shape[1]
        normal, perturbed = self._passes(call)
        patch_bytes = self.sizes.bytes(2 if perturbed else 1)
        scratch = self._empty(max(1, min(self.chunk, total)) * patch_bytes, torch.uint8)
        errors = self._empty((2 if normal and perturbed else 1, *shape), torch.float32)
        if call.background is None:
            return _Buffers(scratch, errors, None, None)
        flags = self._empty(shape, torch.uint8)
        places = self._empty(-(-total // GATE_TILE) + 1 + 2 * total, torch.int64)
        return _Buffers(scratch, errors, flags, places)

    def _run(self, call: _Call, buffers: _Buffers) -> tuple[Tensor, Tensor | None]:
        """Fills errors and flags, and returns them."""
        config = self.config
        _, stride, edge = call.cut
        chunk = max(1, min(self.chunk, call.frames.shape[0] * call.patches))
        torch.ops.fastalps.fused_errors(
            call.frames, call.background, call.threshold, stride, edge != "drop",
            self.shape, self.weights, self.biases, BOUNDS.index(config.bound),
            config.negative_slope, config.strength, config.smoothing, *self._passes(call),
            chunk, buffers.scratch, buffers.flags, buffers.places, buffers.errors,
        )  # fmt: skip
        return buffers.errors, buffers.flags

    def _passes(self, call: _Call) -> tuple[bool, bool]:
        """Whether to run the normal and the perturbed pass."""
        if self._single:
            return True, False
        return call.passes != "perturbed", call.passes != "normal"

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


class _Call(NamedTuple):
    """What `FusedEngine.frame_errors` was asked for; frames are uint8 or float32 (N, H, W)."""

    frames: Tensor
    cut: Cut
    passes: Passes
    background: Tensor | None
    threshold: float
    patches: int  # Of a frame.

    def kind(self) -> Hashable:
        """All but the values of the pixels, and where they are."""
        frames, still = self.frames, self.background
        gate = None if still is None else (still.shape, still.dtype, self.threshold)
        return frames.shape, frames.dtype, self.cut, self.passes, gate


class _Buffers(NamedTuple):
    """What the kernels write in a call."""

    scratch: Tensor
    errors: Tensor
    flags: Tensor | None
    places: Tensor | None


class _Repeated:
    """The kernels of one kind of calls as a graph, with frames, background and buffers of its own.

    Args:
        engine: whose weights it reads where they are.
        call: like those to come.
    """

    def __init__(self, engine: FusedEngine, call: _Call) -> None:
        # What inference mode makes could not be written to by a later call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            frames = torch.empty_like(call.frames, memory_format=torch.contiguous_format)
            background = None if call.background is None else torch.empty_like(call.background)
            mine = self._call = call._replace(frames=frames, background=background)
            buffers = self._buffers = engine._buffers(mine)
            # Kernels are loaded when they first run, which no graph may record. Another thread's
            # call of this kind may not have come to that yet.
            engine._run(mine, buffers)
            self._replay = replay.capture(lambda: engine._run(mine, buffers), frames.device)

    def run(self, call: _Call) -> tuple[Tensor, Tensor | None]:
        """Errors and flags, which later calls leave as they are."""
        self._call.frames.copy_(call.frames)
        if self._call.background is not None and call.background is not None:
            self._call.background.copy_(call.background)
        self._replay()
        flags = self._buffers.flags
        return self._buffers.errors.clone(), None if flags is None else flags.clone()


@functools.lru_cache(maxsize=16)
def _patches_of(frame_size: tuple[int, int], cut: Cut) -> int:
    """Patches of a frame; frames of one video ask the same again and again."""
    rows, columns = ops.patch_grid(frame_size, *cut)
    return len(rows) * len(columns)
