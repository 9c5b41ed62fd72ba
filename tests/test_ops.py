"""The ops as users call them: gradients of the reference, compilers, validation, backends.

What each kernel computes is tested in test_kernels.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastalps
from fastalps import backends, ops, reference
from fastalps.op_definitions import SCHEMAS
from fastalps.testing import sample_inputs
from tests.conftest import threads
from tests.op_names import DIFFERENTIABLE, LOW_PRECISION, outputs_of


def test_every_op_has_a_reference() -> None:
    assert set(backends.OPS) == set(SCHEMAS)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_reference_gradcheck(op: str, rng: torch.Generator) -> None:
    checked = 0
    for arguments in sample_inputs(op, rng):
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if not all(t.dtype == torch.float64 and 0 < t.numel() < 900 for t in tensors):
            continue
        if arguments[-1] is True or any(d in arguments for d in LOW_PRECISION):
            continue  # a maximum has kinks; low-precision results hide the differences
        inputs = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
        # Results are float32 by contract, hence the wide step and tolerance.
        assert torch.autograd.gradcheck(
            getattr(reference, op), inputs, eps=1e-2, atol=2e-3, rtol=1e-2, check_batched_grad=False
        )
        checked += 1
        if checked == 3:
            break
    assert checked


def _public_calls(rng: torch.Generator):
    frames = torch.randint(0, 256, (3, 20, 33), dtype=torch.uint8, generator=rng)
    a, b = torch.randn(2, 6, 40, generator=rng).unbind()
    half = b[:3]
    return {
        "tile_patches": lambda: ops.tile_patches(frames, 7, 5),
        "fold_scores": lambda: ops.fold_scores(a[:, :12], (20, 33), (7, 9), reduce="max"),
        "perturb_latent": lambda: ops.perturb_latent(a, b, 0.5),
        "per_sample_mse": lambda: ops.per_sample_mse(a, b),
        "paired_mse": lambda: ops.paired_mse(a, half),
        "sigmoid_mse": lambda: ops.sigmoid_mse(a, b),
        "paired_sigmoid_mse": lambda: ops.paired_sigmoid_mse(a, half),
        "active_patches": lambda: ops.active_patches(frames, frames[0], 7, threshold=60.0),
    }


def test_public_functions_compile_and_agree(rng: torch.Generator) -> None:
    for name, call in _public_calls(rng).items():
        eager = outputs_of(call())
        compiled = outputs_of(torch.compile(call, fullgraph=True)())
        with fastalps.use_backend("reference"):
            expected = outputs_of(call())
        for one, two, three in zip(eager, compiled, expected, strict=True):
            torch.testing.assert_close(one, two, msg=name)
            torch.testing.assert_close(one, three, rtol=2e-6, atol=2e-6, msg=name)


def test_compiled_gradient_matches(rng: torch.Generator) -> None:
    logits = torch.randn(8, 1, 28, 28, generator=rng)
    target = torch.rand(4, 1, 28, 28, generator=rng)

    def loss(values: Tensor) -> Tensor:
        return (ops.paired_sigmoid_mse(values, target) * torch.tensor([[1.0], [0.5]])).sum()

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        values = logits.clone().requires_grad_()
        run(values).backward()
        gradients.append(values.grad)
    torch.testing.assert_close(*gradients)


def test_export_with_dynamic_sizes(rng: torch.Generator) -> None:
    class Model(torch.nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            patches = ops.tile_patches(frames, 6, 4)
            return ops.per_sample_mse(
                patches.flatten(0, 1), torch.zeros_like(patches).flatten(0, 1)
            )

    sizes = {0: torch.export.Dim("n"), 1: torch.export.Dim("height", min=6, max=400)}
    frames = torch.randint(0, 256, (2, 20, 30), dtype=torch.uint8, generator=rng)
    program = torch.export.export(Model(), (frames,), dynamic_shapes=(sizes,))
    other = torch.randint(0, 256, (5, 31, 30), dtype=torch.uint8, generator=rng)
    torch.testing.assert_close(program.module()(other), Model()(other))
    assert any("fastalps.tile_patches" in str(node.target) for node in program.graph.nodes)


def test_grid_covers_every_pixel_or_drops_or_raises() -> None:
    assert ops.patch_grid((240, 360), 30) == (list(range(0, 240, 30)), list(range(0, 360, 30)))
    rows, columns = ops.patch_grid((158, 238), 30)
    assert rows == [0, 30, 60, 90, 120, 128] and columns[-1] == 208
    assert ops.patch_grid((158, 238), 30, edge="drop") == (rows[:-1], columns[:-1])
    with pytest.raises(ValueError, match="do not divide a frame of 158x238"):
        ops.patch_grid((158, 238), 30, edge="error")


def test_patches_are_the_frames_pixels(rng: torch.Generator) -> None:
    frames = torch.randint(0, 256, (2, 3, 19, 26), dtype=torch.uint8, generator=rng)
    rows, columns = ops.patch_grid((19, 26), (5, 8), (4, 7))
    patches = ops.tile_patches(frames, (5, 8), (4, 7), scale=1.0)
    for r, y in enumerate(rows):
        for c, x in enumerate(columns):
            cut = frames[:, :, y : y + 5, x : x + 8].float()
            assert torch.equal(patches[:, r * len(columns) + c], cut)


def test_results_do_not_depend_on_threads(rng: torch.Generator) -> None:
    values = torch.randn(2, 300001, generator=rng)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(ops.sigmoid_mse(values, values.flip(0)))
    assert torch.equal(*results)


BAD = [
    (lambda: ops.tile_patches(torch.zeros(4, 4), 2), ValueError, r"frames: expected \(N, H, W\)"),
    (lambda: ops.tile_patches(torch.zeros(1, 4, 4), 5), ValueError, "5x5 is larger than the frame"),
    (
        lambda: ops.tile_patches(torch.zeros(1, 4, 4), 2, 0),
        ValueError,
        "stride: expected at least 1",
    ),
    (lambda: ops.tile_patches(torch.zeros(1, 4, 4), 2.0), TypeError, "patch_size: expected an int"),
    (lambda: ops.tile_patches(torch.zeros(1, 4, 4).int(), 2), TypeError, "frames: expected uint8"),
    (lambda: ops.tile_patches([1], 2), TypeError, "frames: expected a torch.Tensor"),
    (
        lambda: ops.tile_patches(torch.zeros(1, 4, 4), 2, dtype=torch.int8),
        TypeError,
        "dtype: expected",
    ),
    (
        lambda: ops.tile_patches(torch.zeros(1, 4, 4), 2, edge="pad"),
        ValueError,
        "edge: expected 'cover'",
    ),
    (lambda: ops.fold_scores(torch.zeros(2, 5), (4, 4), 2), ValueError, "expected 4 patches"),
    (lambda: ops.fold_scores(torch.zeros(2, 4), (4, 4), 2, reduce="sum"), ValueError, "reduce"),
    (lambda: ops.fold_scores(torch.zeros(4), (4, 4), 2), ValueError, r"scores: expected \(N, P\)"),
    (
        lambda: ops.perturb_latent(torch.zeros(2, 3), torch.zeros(2, 4)),
        ValueError,
        "latent's shape",
    ),
    (
        lambda: ops.perturb_latent(torch.zeros(2, 3), torch.zeros(2, 3).half()),
        TypeError,
        "latent's dtype",
    ),
    (
        lambda: ops.per_sample_mse(torch.zeros(2, 3), torch.zeros(3, 3)),
        ValueError,
        "expected shape",
    ),
    (
        lambda: ops.paired_mse(torch.zeros(2, 3), torch.zeros(2, 3)),
        ValueError,
        r"expected shape \(4, 3\)",
    ),
    (
        lambda: ops.sigmoid_mse(torch.zeros(2, 3).double(), torch.zeros(2, 3)),
        TypeError,
        "float64 goes with",
    ),
    (
        lambda: ops.sigmoid_mse(torch.zeros(2).int(), torch.zeros(2)),
        TypeError,
        "logits: expected float32",
    ),
    (
        lambda: ops.per_sample_mse(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3)),
        ValueError,
        "target: expected on meta",
    ),
    (
        lambda: ops.active_patches(
            torch.zeros(1, 4, 4).byte(), torch.zeros(4, 5).byte(), 2, threshold=1.0
        ),
        ValueError,
        "background: expected the frames' size",
    ),
    (
        lambda: ops.active_patches(
            torch.zeros(1, 4, 4).byte(), torch.zeros(4, 4).byte(), 2, threshold=math.nan
        ),
        ValueError,
        "threshold: expected gray levels",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"), fastalps.use_backend("cudnn"):
        pass
    if not backends.triton_state("cpu").available:
        with (
            fastalps.use_backend("triton"),
            pytest.raises(fastalps.BackendUnavailable, match="triton cannot run per_sample_mse"),
        ):
            ops.per_sample_mse(torch.zeros(1, 1), torch.zeros(1, 1))
    assert backends.requested() == "auto"


TRANSFORMED = [
    lambda x: ops.sigmoid_mse(x, torch.full_like(x, 0.5)),
    lambda x: ops.perturb_latent(x, 0.3 * x.square(), 0.5)[0].sum(1) + 1,
    lambda x: ops.tile_patches(x.unflatten(1, (4, 6)), (2, 3)).square().sum((1, 2, 3, 4)),
    lambda x: ops.fold_scores(x, (8, 12), 2).square().sum((1, 2)),
]


@pytest.mark.parametrize("function", TRANSFORMED)
def test_forward_mode_and_transforms_have_gradients(function, rng: torch.Generator) -> None:
    values, tangent = torch.randn(2, 3, 24, generator=rng)
    wanted = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(wanted).sum(), wanted)
    torch.testing.assert_close(torch.func.grad(lambda x: function(x).sum())(values), gradient)
    _, found = torch.func.jvp(function, (values,), (tangent,))
    torch.testing.assert_close(found, (gradient * tangent).sum(1), rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values, tangent)
        found = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(found, (gradient * tangent).sum(1), rtol=1e-4, atol=1e-5)
    hessian = torch.func.hessian(lambda x: function(x[None]).sum())(values[0])
    assert hessian.shape == (24, 24) and hessian.abs().max() > 0


def test_second_derivatives_are_refused_rather_than_lost(rng: torch.Generator) -> None:
    values = torch.randn(2, 5, generator=rng, requires_grad=True)
    loss = ops.sigmoid_mse(values, torch.zeros(2, 5)).sum()
    (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is not to be had; compute with"):
        (loss + gradient.square().sum()).backward()


def test_sizes_may_be_numpys() -> None:
    frames = torch.zeros(1, 8, 12)
    expected = ops.tile_patches(frames, (4, 6), 2)
    sizes = np.array([4, 6, 2])
    assert torch.equal(ops.tile_patches(frames, tuple(sizes[:2]), sizes[2]), expected)
