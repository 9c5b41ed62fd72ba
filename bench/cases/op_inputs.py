"""Inputs, public calls and rival expressions of each op; shared with the pytest benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import missing
from fastalps import ops, reference

# The job that the project is about: a UCSD Ped2 frame and its 96 patches.
FRAME, PATCH = (240, 360), 30
ROWS, COLUMNS = FRAME[0] // PATCH, FRAME[1] // PATCH
PATCHES, PIXELS = ROWS * COLUMNS, FRAME[0] * FRAME[1]
THRESHOLD = 3.0
LATENT = 256

# Moved by the largest inputs: past every cache, still allocated in no time. GPUs have caches of up
# to 126 MB, and take 30 us for a hundred, which is what starting an op takes a host.
LARGE_BYTES = {"cpu": 100_000_000, "cuda": 400_000_000}


@dataclass(frozen=True)
class OpCase:
    """One op at work.

    Attributes:
        inputs: makes the tensors of `count` items, on the CPU.
        call: the public function on them.
        rivals: the same result in plain PyTorch, by name; a text instead of a function says why it
            cannot be had.
        item_bytes: bytes that one item makes an op read and write, by the size of an element; for
            active_patches an estimate.
        differentiable: numbers of the inputs that the backward case asks gradients for.
        small: counts that stay in a cache.
        exact: the reference's raw arguments after the tensors.
        compile: whether the first rival is also timed under torch.compile.
        waits: whether the host waits for a device's result once a call: on CUDA it is timed at four
            times the large size as well, where that weighs less.
    """

    op: str
    inputs: Callable[[int, torch.dtype, torch.Generator], tuple[Tensor, ...]]
    call: Callable[..., Any]
    rivals: dict[str, Callable[..., Any] | str]
    item_bytes: Callable[[int], int]
    item: str
    small: tuple[int, ...]
    differentiable: tuple[int, ...] = ()
    exact: tuple[Any, ...] = ()
    compile: bool = False
    waits: bool = False
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32,))

    def large(self, itemsize: int, device: str, times: int = 1) -> int:
        """How many items move `LARGE_BYTES`, or some times as many."""
        return max(1, times * LARGE_BYTES[device] // self.item_bytes(itemsize))

    def reference(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The float64 reference on these inputs."""
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        if self.op == "tile_patches":
            wide[0] = wide[0].unsqueeze(1)
        result = getattr(reference, self.op)(*wide, *self.exact)
        return result if isinstance(result, tuple) else (result,)


def _frames(count: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, 256, (count, *FRAME), dtype=torch.uint8, generator=rng),)


def _blocks(frames: Tensor) -> Tensor:
    grid = frames.view(-1, ROWS, PATCH, COLUMNS, PATCH).permute(0, 1, 3, 2, 4)
    return grid.contiguous().view(-1, PATCHES, 1, PATCH, PATCH)


def tile_unfold(frames: Tensor) -> Tensor:
    """F.unfold gives patches as columns; turning them into rows is left to a view, for free."""
    columns = F.unfold((frames / 255).unsqueeze(1), PATCH, stride=PATCH)
    return columns.transpose(1, 2).unflatten(2, (1, PATCH, PATCH))


def tile_permute(frames: Tensor) -> Tensor:
    """The layout changed as bytes, converted after: the fastest order that eager has."""
    return _blocks(frames) / 255


def tile_tensor_unfold(frames: Tensor) -> Tensor:
    """Tensor.unfold on both axes, then a copy."""
    view = frames.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return view.contiguous().view(-1, PATCHES, 1, PATCH, PATCH) / 255


def _tile_kornia(frames: Tensor) -> Tensor:
    from kornia.contrib import extract_tensor_patches

    return extract_tensor_patches((frames / 255).unsqueeze(1), PATCH, stride=PATCH)


def _images(passes: int) -> Callable[..., tuple[Tensor, ...]]:
    def make(count: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
        values = torch.randn(passes * count, 1, PATCH, PATCH, generator=rng).to(dtype)
        return values, torch.rand(count, 1, PATCH, PATCH, generator=rng).to(dtype)

    return make


def eager_mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Per-sample mean squared error."""
    return (reconstruction - target).square().flatten(1).mean(1)


def eager_paired_mse(reconstructions: Tensor, target: Tensor) -> Tensor:
    """The same for two reconstructions of each target."""
    both = reconstructions.unflatten(0, (2, target.shape[0]))
    return (both - target).square().flatten(2).mean(2)


def eager_sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """The error of the sigmoid of logits."""
    return eager_mse(logits.sigmoid(), target)


def eager_paired_sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """The same for two passes."""
    return eager_paired_mse(logits.sigmoid(), target)


def _latents(count: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    both = torch.randn(2, count, LATENT, generator=rng).to(dtype)
    return both[0].clone(), both[1].clone()


def eager_perturb(latent: Tensor, perturbation: Tensor) -> tuple[Tensor, Tensor]:
    """The perturbed latent and the perturbation's energy."""
    scaled = 0.5 * perturbation
    return latent + scaled, scaled.square().mean(1)


def _scores(count: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.rand(count, PATCHES, generator=rng).to(dtype),)


def eager_fold(scores: Tensor) -> Tensor:
    """Scores spread over their patches by a view, then one copy."""
    grid = scores.view(-1, ROWS, 1, COLUMNS, 1).expand(-1, ROWS, PATCH, COLUMNS, PATCH)
    return grid.reshape(-1, *FRAME)


def fold_interpolate(scores: Tensor) -> Tensor:
    """Nearest-neighbour enlargement."""
    grid = scores.view(-1, 1, ROWS, COLUMNS)
    return F.interpolate(grid, scale_factor=PATCH, mode="nearest").squeeze(1)


# Of UCSD Ped2's patches (six clips of its test set, the gate at 3 gray levels), and of the patches
# to the right of one that moves.
MOVING, MOVING_BESIDE = 0.3, 0.74


def _moving(count: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    # Runs of patches differ from the background: each depends on its left neighbour alone, in such
    # a way that `MOVING` of them do.
    begins = MOVING * (1 - MOVING_BESIDE) / (1 - MOVING)
    chance = torch.rand(COLUMNS, count, ROWS, generator=rng)
    moves = [chance[0] < MOVING]
    for draw in chance[1:]:
        moves.append(draw < torch.where(moves[-1], MOVING_BESIDE, begins))
    background = torch.randint(0, 256, FRAME, dtype=torch.uint8, generator=rng)
    (noise,) = _frames(count, dtype, rng)
    where = eager_fold(torch.stack(moves, dim=2).flatten(1))
    return torch.where(where, noise, background), background


def eager_active(frames: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """The motion gate: differences summed over each patch, then boolean indexing."""
    difference = (frames.short() - background.short()).abs_()
    total = difference.view(-1, ROWS, PATCH, COLUMNS, PATCH).sum((2, 4))
    index = (total.flatten(1) > THRESHOLD * PATCH * PATCH).nonzero()
    return _blocks(frames)[index[:, 0], index[:, 1]] / 255, index


_GRID = ((PATCH, PATCH), (PATCH, PATCH), True)
_HALF = (torch.float32, torch.bfloat16)

OPS = (
    OpCase(
        "tile_patches",
        _frames,
        lambda frames: ops.tile_patches(frames, PATCH),
        {
            "F.unfold": tile_unfold,
            "view+permute+contiguous": tile_permute,
            "Tensor.unfold": tile_tensor_unfold,
            "kornia": missing("kornia") or _tile_kornia,
        },
        lambda _: PIXELS * 5,
        "frames",
        (1, 20),
        exact=(*_GRID, torch.float64, 1 / 255, 0.0),
    ),
    *(
        OpCase(
            op,
            _images(passes),
            getattr(ops, op),
            {"eager": rival},
            lambda itemsize, passes=passes: (passes + 1) * PATCH * PATCH * itemsize,
            "images",
            (96,),
            differentiable=(0,),
            compile=True,
            dtypes=_HALF,
        )
        for op, passes, rival in (
            ("per_sample_mse", 1, eager_mse),
            ("paired_mse", 2, eager_paired_mse),
            ("sigmoid_mse", 1, eager_sigmoid_mse),
            ("paired_sigmoid_mse", 2, eager_paired_sigmoid_mse),
        )
    ),
    OpCase(
        "perturb_latent",
        _latents,
        lambda latent, perturbation: ops.perturb_latent(latent, perturbation, 0.5),
        {"eager": eager_perturb},
        lambda itemsize: 3 * LATENT * itemsize,
        "latents",
        (96,),
        differentiable=(0, 1),
        exact=(0.5,),
    ),
    OpCase(
        "fold_scores",
        _scores,
        lambda scores: ops.fold_scores(scores, FRAME, PATCH),
        {"expand+reshape": eager_fold, "F.interpolate": fold_interpolate},
        lambda itemsize: PATCHES * itemsize + PIXELS * 4,
        "frames",
        (1,),
        differentiable=(0,),
        exact=(FRAME, *_GRID, False),
    ),
    OpCase(
        "active_patches",
        _moving,
        lambda frames, background: ops.active_patches(
            frames, background, PATCH, threshold=THRESHOLD
        ),
        {"eager": eager_active},
        lambda _: PIXELS + int(MOVING * PATCHES * (4 * PATCH * PATCH + 16)),
        "frames",
        (20,),
        waits=True,
        exact=(*_GRID, torch.float64, 1 / 255, 0.0, THRESHOLD),
    ),
)
