"""The ops as they are called: documented functions that check their arguments and call
`torch.ops.fastalps`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastalps import backends, reference
from fastalps.op_definitions import patch_counts
from fastalps.scalars import plain

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Validation ------------------------------------------------------------------------------------


def _pair_of(name: str, value: int | Sequence[int], smallest: int) -> tuple[int, int]:
    """`value` as (rows, columns), each at least `smallest`."""
    value = plain(value)
    if isinstance(value, int | torch.SymInt):
        pair: Any = (value, value)
    else:
        pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(part, int | torch.SymInt) for part in pair):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if isinstance(value, bool) or any(part < smallest for part in pair):
        raise ValueError(f"{name}: expected at least {smallest}, got {value!r}")
    return pair


def _grid(
    frame_size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    edge: str,
) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Validated (patch_size, stride, cover) for frames of `frame_size`."""
    if not torch.compiler.is_compiling():
        # Frames of one video ask the same again and again.
        try:
            return _known_grid(tuple(frame_size), patch_size, stride, edge)
        except TypeError:  # a list is no key, nor is a symbolic size
            pass
    return _checked_grid(frame_size, patch_size, stride, edge)


def _checked_grid(
    frame_size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    edge: str,
) -> tuple[tuple[int, int], tuple[int, int], bool]:
    patch = _pair_of("patch_size", patch_size, 1)
    step = patch if stride is None else _pair_of("stride", stride, 1)
    if edge not in ("cover", "drop", "error"):
        raise ValueError(f"edge: expected 'cover', 'drop' or 'error', got {edge!r}")
    if any(part > size for part, size in zip(patch, frame_size, strict=True)):
        raise ValueError(
            f"patch_size: {patch[0]}x{patch[1]} is larger than the frame "
            f"({frame_size[0]}x{frame_size[1]}); use a smaller patch"
        )
    if edge == "error" and any(
        (size - part) % move for size, part, move in zip(frame_size, patch, step, strict=True)
    ):
        raise ValueError(
            f"edge: patches of {patch[0]}x{patch[1]} with stride {step[0]}x{step[1]} do not "
            f"divide a frame of {frame_size[0]}x{frame_size[1]}; use edge='cover' or 'drop'"
        )
    return patch, step, edge == "cover"


# Keys are typed: True would pass for a 1 that was asked for before.
_known_grid = functools.lru_cache(maxsize=256, typed=True)(_checked_grid)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _require_floating(name: str, tensor: Tensor) -> None:
    _require_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}"
        )


def _require_output_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")


def _require_same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{second}: expected on {a.device} like {first}, got {b.device}")


def _call(name: str, device: torch.device, *arguments: Any) -> Any:
    if not torch.compiler.is_compiling() and _transformed():
        return getattr(reference, name)(*arguments)
    run = backends.implementation(name, device.type)
    if _differentiates(arguments):
        return run(*arguments)
    # Autograd's layer of Python in front of a custom op takes longer than a small op itself.
    with torch._C._AutoDispatchBelowAutograd():
        return run(*arguments)


def _transformed() -> bool:
    """Whether gradients are asked for that custom ops do not know: in forward mode, where tangents
    would be lost without a word, or by torch.func."""
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.maybe_current_level() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in levels)


def _differentiates(arguments: Sequence[Any]) -> bool:
    """Whether a gradient may be asked for, or a tracer or a transform must see the call whole."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return True
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in arguments
    )


# The public functions --------------------------------------------------------------------------


def patch_grid(
    frame_size: int | Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    edge: str = "cover",
) -> tuple[list[int], list[int]]:
    """The origins of the patches that `tile_patches` cuts from a frame.

    Args:
        frame_size: (height, width) in pixels, or one int for both.
        patch_size: (height, width) in pixels, or one int for both.
        stride: (rows, columns) from one patch to the next; the patch size where None.
        edge: what happens where patches do not divide the frame. "cover": the last row or column
            of patches is moved back to the border, so that no pixel goes unscored (with a stride
            at most the patch size); "drop": partial patches are left out; "error": ValueError.

    Returns:
        (row_origins, column_origins): patch ``p = r * len(column_origins) + c`` has its top left
        pixel at ``(row_origins[r], column_origins[c])``.

    Raises:
        ValueError: a size below 1, a patch larger than the frame, an unknown edge.
        TypeError: a size that is not an int or a pair of ints.
    """
    size = _pair_of("frame_size", frame_size, 1)
    patch, step, cover = _grid(size, patch_size, stride, edge)
    return (
        reference.origins(size[0], patch[0], step[0], cover),
        reference.origins(size[1], patch[1], step[1], cover),
    )


def tile_patches(
    frames: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    edge: str = "cover",
    dtype: torch.dtype = torch.float32,
    scale: float = 1 / 255,
    shift: float = 0.0,
) -> Tensor:
    """Cuts frames into patches and converts them in one pass: ``frames * scale + shift``.

    Args:
        frames: (N, H, W) or (N, C, H, W), uint8 or floating, any strides.
        patch_size, stride, edge: see `patch_grid`.
        dtype: the floating dtype of the result.
        scale: factor on the pixels; 1/255 takes uint8 to [0, 1].
        shift: added after scaling.

    Returns:
        (N, P, C, ph, pw), contiguous, on a row-major grid. Differentiable in floating frames.

    Raises:
        ValueError: wrong number of dimensions, bad sizes.
        TypeError: wrong dtypes.

    Source: the patch-based protocol of ALPS (30x30 patches of UCSD frames), section IV.
    """
    _require_tensor("frames", frames)
    if frames.dim() not in (3, 4):
        raise ValueError(
            f"frames: expected (N, H, W) or (N, C, H, W), got shape {tuple(frames.shape)}"
        )
    if frames.dtype != torch.uint8 and frames.dtype not in FLOATING:
        raise TypeError(f"frames: expected uint8 or a floating dtype, got {frames.dtype}")
    _require_output_dtype(dtype)
    patch, step, cover = _grid(frames.shape[-2:], patch_size, stride, edge)
    if frames.dim() == 3:
        frames = frames.unsqueeze(1)
    arguments = (frames, patch, step, cover, dtype, float(scale), float(shift))
    return _call("tile_patches", frames.device, *arguments)


def fold_scores(
    scores: Tensor,
    frame_size: int | Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    edge: str = "cover",
    reduce: str = "mean",
) -> Tensor:
    """Paints the patches' scores back onto their frames: a heatmap.

    Args:
        scores: (N, P) floating, P in the order of `patch_grid`.
        frame_size: (height, width) of the frames in pixels.
        patch_size, stride, edge: as the patches were cut.
        reduce: "mean" or "max" of the patches that cover a pixel.

    Returns:
        (N, H, W) float32; 0 where no patch covers a pixel. Differentiable; of patches that tie for
        a maximum the first has the gradient.

    Raises:
        ValueError: P is not the grid's number of patches; bad sizes.
        TypeError: wrong dtypes.
    """
    _require_floating("scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores: expected (N, P), got shape {tuple(scores.shape)}")
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce: expected 'mean' or 'max', got {reduce!r}")
    size = _pair_of("frame_size", frame_size, 1)
    patch, step, cover = _grid(size, patch_size, stride, edge)
    rows, columns = patch_counts(size, patch, step, cover)
    if scores.shape[1] != rows * columns:
        raise ValueError(
            f"scores: expected {rows * columns} patches ({rows}x{columns}) for a frame of "
            f"{size[0]}x{size[1]}, got {scores.shape[1]}"
        )
    return _call("fold_scores", scores.device, scores, size, patch, step, cover, reduce == "max")


def perturb_latent(
    latent: Tensor, perturbation: Tensor, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Adds a perturbation to a latent vector and measures it in the same pass.

    ``output = latent + strength * perturbation``,
    ``energy[n] = mean_d (strength * perturbation[n, d])**2``.

    Args:
        latent: (N, D) floating, any strides.
        perturbation: (N, D), same dtype and device.
        strength: factor on the perturbation.

    Returns:
        (output, energy): (N, D) of the latent's dtype, and (N,) float32. Differentiable in both
        tensors.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: wrong or different dtypes.

    Source: ALPS, section III-C.
    """
    _require_floating("latent", latent)
    _require_floating("perturbation", perturbation)
    if latent.dim() != 2:
        raise ValueError(f"latent: expected (N, D), got shape {tuple(latent.shape)}")
    if perturbation.shape != latent.shape:
        raise ValueError(
            f"perturbation: expected the latent's shape {tuple(latent.shape)}, "
            f"got {tuple(perturbation.shape)}"
        )
    if perturbation.dtype != latent.dtype:
        raise TypeError(
            f"perturbation: expected the latent's dtype {latent.dtype}, got {perturbation.dtype}"
        )
    _require_same_device("latent", latent, "perturbation", perturbation)
    return _call("perturb_latent", latent.device, latent, perturbation, float(strength))


def _squared_error(op: str, name: str, values: Tensor, target: Tensor, passes: int) -> Tensor:
    """Validates and calls one of the four squared-error ops; `name` is the first argument's."""
    _require_floating(name, values)
    _require_floating("target", target)
    if target.dim() < 1:
        raise ValueError("target: expected (N, ...), got a scalar")
    expected = (passes * target.shape[0], *target.shape[1:])
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{name}: expected shape {expected} for a target of {tuple(target.shape)}, "
            f"got {tuple(values.shape)}"
        )
    if (values.dtype == torch.float64) != (target.dtype == torch.float64):
        raise TypeError(
            f"target: float64 goes with float64 only, got {name} {values.dtype} and "
            f"target {target.dtype}"
        )
    _require_same_device(name, values, "target", target)
    return _call(op, values.device, values, target)


def per_sample_mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: ``mean over all but N of (reconstruction - target)**2``.

    Args:
        reconstruction: (N, ...) floating, any strides.
        target: the same shape and device; dtypes may differ (float64 goes with float64 only).

    Returns:
        (N,) float32. Differentiable in both.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: wrong dtypes.

    Source: ALPS, section III-D.
    """
    return _squared_error("per_sample_mse", "reconstruction", reconstruction, target, 1)


def paired_mse(reconstructions: Tensor, target: Tensor) -> Tensor:
    """`per_sample_mse` of two reconstructions of one target, which is read once.

    Args:
        reconstructions: (2N, ...): the N normal ones, then the N perturbed ones.
        target: (N, ...).

    Returns:
        (2, N) float32: normal, then perturbed. Dtypes, gradients and errors as `per_sample_mse`.
    """
    return _squared_error("paired_mse", "reconstructions", reconstructions, target, 2)


def sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """`per_sample_mse` of ``sigmoid(logits)``, which is never stored.

    Args:
        logits: (N, ...): the decoder's output before its sigmoid.
        target: (N, ...) in [0, 1].

    Returns:
        (N,) float32. Dtypes, gradients and errors as `per_sample_mse`.
    """
    return _squared_error("sigmoid_mse", "logits", logits, target, 1)


def paired_sigmoid_mse(logits: Tensor, target: Tensor) -> Tensor:
    """`paired_mse` of ``sigmoid(logits)``, which is never stored: both of ALPS's errors at once.

    Args:
        logits: (2N, ...): normal, then perturbed.
        target: (N, ...) in [0, 1].

    Returns:
        (2, N) float32. Dtypes, gradients and errors as `per_sample_mse`.
    """
    return _squared_error("paired_sigmoid_mse", "logits", logits, target, 2)


def active_patches(
    frames: Tensor,
    background: Tensor,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    threshold: float,
    edge: str = "cover",
    dtype: torch.dtype = torch.float32,
    scale: float = 1 / 255,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The patches of static-camera frames in which something differs from the background.

    A patch is kept when the mean of ``|frame - background|`` over its pixels exceeds `threshold`.

    Args:
        frames: uint8 (N, H, W), any strides.
        background: uint8 (H, W).
        patch_size, stride, edge: see `patch_grid`.
        threshold: gray levels, at least 0.
        dtype, scale, shift: of the patches, see `tile_patches`.

    Returns:
        (patches, index): the K kept patches in order (frame, then patch), (K, 1, ph, pw), and
        their (frame, patch) pairs, (K, 2) int64. K depends on the pixels, so a CUDA graph cannot
        capture this op. No gradient: pixels are uint8.

    Raises:
        ValueError: shapes, devices, sizes or threshold.
        TypeError: wrong dtypes.
    """
    for name, tensor in (("frames", frames), ("background", background)):
        _require_tensor(name, tensor)
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name}: expected uint8, got {tensor.dtype}")
    if frames.dim() != 3:
        raise ValueError(f"frames: expected (N, H, W), got shape {tuple(frames.shape)}")
    if background.shape != frames.shape[1:]:
        raise ValueError(
            f"background: expected the frames' size {tuple(frames.shape[1:])}, "
            f"got {tuple(background.shape)}"
        )
    _require_output_dtype(dtype)
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold: expected gray levels of at least 0, got {threshold}")
    _require_same_device("frames", frames, "background", background)
    patch, step, cover = _grid(frames.shape[1:], patch_size, stride, edge)
    arguments = (frames, background, patch, step, cover, dtype)
    rest = (float(scale), float(shift), float(threshold))
    return _call("active_patches", frames.device, *arguments, *rest)
