"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference.

Run by test_triton.py in a process of its own: TRITON_INTERPRET=1 must be set before kernels are
decorated. Outputs start as NaN (torch's deterministic mode), so that unwritten elements fail.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastalps import backends, ops, reference, testing
from fastalps.op_definitions import SCHEMAS

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; test_triton.py runs it", allow_module_level=True)

import fastalps.kernels.registration  # noqa: F401
from fastalps.kernels import launch, squared_error

FLOATING = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (frame, patch, stride, cover): overlapping, dividing, moved back, dropped, gaps, one patch, a
# stride beyond the frame.
GRIDS = [
    ((7, 9), (3, 4), (2, 3), True),
    ((6, 8), (3, 4), (3, 4), True),
    ((7, 9), (3, 4), (3, 4), True),
    ((7, 9), (3, 4), (3, 4), False),
    ((8, 11), (2, 3), (5, 4), False),
    ((8, 11), (2, 3), (5, 4), True),
    ((5, 5), (3, 2), (1, 1), True),
    ((5, 6), (5, 6), (2, 2), False),
    ((5, 6), (2, 3), (100, 2**40), True),
    ((5, 6), (2, 3), (100, 2**40), False),
]
ERRORS = {"per_sample_mse": 1, "paired_mse": 2, "sigmoid_mse": 1, "paired_sigmoid_mse": 2}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with testing.poisoned():
        assert torch.empty(3).isnan().all()
        yield


def kernel(name):
    return getattr(torch.ops.fastalps, f"{name}_triton").default


def compare(actual, expected, dtype=None):
    torch.testing.assert_close(
        actual, expected, equal_nan=True, **testing.TOLERANCE[dtype or actual.dtype]
    )


def pixels(shape, dtype, rng):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def strided(tensor):
    """The same values with every dimension's stride doubled and dimensions 1.. reversed."""
    order = [0, *range(tensor.dim() - 1, 0, -1)]
    large = tensor.new_zeros([2 * size for size in (tensor.shape[i] for i in order)])
    view = large[tuple(slice(None, None, 2) for _ in order)].permute(order)
    view.copy_(tensor)
    return view


def gradients(function, inputs, seeds):
    """Gradients of `function` of `inputs` against the cotangents `seeds`."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert not any(output.detach().isnan().any() for output in outputs)
    return torch.autograd.grad(outputs, leaves, seeds)


def test_the_kernels_run_in_the_interpreter():
    assert backends.triton_interpreted()
    with ops.backends.use_backend("triton"):
        assert backends.implementation("paired_mse", "cpu") is kernel("paired_mse")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATING], ids=str)
def test_tile_patches(grid, dtype, rng):
    size, *where = grid
    frames = strided(pixels((2, 2, *size), dtype, rng))
    for out in FLOATING:
        arguments = (frames, *where, out, 1 / 255, -0.37)
        compare(kernel("tile_patches")(*arguments), reference.tile_patches(*arguments))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_tile_patches_gradient(grid, dtype, rng):
    size, *where = grid
    frames = pixels((2, 2, *size), dtype, rng)
    for out in (dtype, torch.float32):
        arguments = (*where, out, 0.3, 1.0)
        seed = strided(
            torch.randn(reference.tile_patches(frames, *arguments).shape, generator=rng).to(out)
        )
        (actual,) = gradients(lambda x, a=arguments: kernel("tile_patches")(x, *a), [frames], seed)
        expected = reference.tile_patches_backward(seed, size, *where, dtype, 0.3)
        compare(actual, expected)
        (automatic,) = gradients(
            lambda x, a=arguments: reference.tile_patches(x, *a), [frames], seed
        )
        compare(
            actual,
            automatic,
            torch.promote_types(torch.float32, dtype)
            if dtype in (torch.float32, torch.float64)
            else dtype,
        )


@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_fold_scores(grid, dtype, maximum, rng):
    size, *where = grid
    count = reference.tile_patches(torch.zeros(1, 1, *size), *where, torch.float32, 1, 0).shape[1]
    # Few distinct values: maxima tie, and the first patch must win.
    scores = torch.randint(-3, 3, (3, count), generator=rng).to(dtype) / 3
    arguments = (size, *where, maximum)
    expected = reference.fold_scores(scores, *arguments)
    compare(kernel("fold_scores")(strided(scores), *arguments), expected, torch.float32)
    seed = torch.randn(3, *size, generator=rng)
    (actual,) = gradients(lambda x: kernel("fold_scores")(x, *arguments), [strided(scores)], seed)
    compare(
        actual,
        reference.fold_scores_backward(seed, scores, *where, maximum),
        torch.float32 if dtype == torch.float64 else dtype,
    )


@pytest.mark.parametrize("maximum", [False, True])
def test_fold_scores_propagates_nan_and_infinity(maximum, rng):
    grid = ((7, 9), (3, 4), (2, 2), True)
    size, *where = grid
    scores = torch.randn(2, 12, generator=rng)
    scores[0, 5] = float("nan")
    scores[1, :] = float("-inf")
    expected = reference.fold_scores(scores, size, *where, maximum)
    assert expected.isnan().any()
    assert not expected.isnan().all()
    compare(kernel("fold_scores")(scores, size, *where, maximum), expected)
    seed = torch.randn(2, *size, generator=rng)
    compare(
        kernel("fold_scores_backward")(seed, scores, *where, maximum),
        reference.fold_scores_backward(seed, scores, *where, maximum),
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (129, 17), (2, 151), (3, 1030)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_perturb_latent(shape, dtype, rng):
    latent, perturbation = (strided(pixels(shape, dtype, rng)) for _ in range(2))
    output, energy = kernel("perturb_latent")(latent, perturbation, 0.7)
    expected_output, expected_energy = reference.perturb_latent(latent, perturbation, 0.7)
    assert output.is_contiguous()
    compare(output, expected_output)
    compare(energy, expected_energy)
    seeds = (pixels(shape, dtype, rng), torch.randn(shape[0], generator=rng))
    actual = gradients(lambda *x: kernel("perturb_latent")(*x, 0.7), [latent, perturbation], seeds)
    expected = gradients(
        lambda *x: reference.perturb_latent(*x, 0.7), [latent, perturbation], seeds
    )
    for one, other in zip(actual, expected, strict=True):
        compare(one, other)


def test_gradients_that_autograd_expands(rng):
    """`sum().backward()` hands over gradients of stride 0."""
    latent, perturbation = (pixels((3, 20), torch.float32, rng) for _ in range(2))
    both = []
    for function in (kernel("perturb_latent"), reference.perturb_latent):
        leaf = perturbation.clone().requires_grad_()
        output, energy = function(latent, leaf, 1.3)
        (output.sum() + energy.sum()).backward()
        both.append(leaf.grad)
    compare(*both)
    both = []
    for function in (kernel("paired_mse"), reference.paired_mse):
        leaf = perturbation.repeat(2, 1).requires_grad_()
        function(leaf, latent).sum().backward()
        both.append(leaf.grad)
    compare(*both)


MIXES = [(a, b) for a in FLOATING[:3] for b in FLOATING[:3]] + [(torch.float64, torch.float64)]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_squared_errors(name, dtypes, rng):
    passes = ERRORS[name]
    for shape in [(3, 2, 5, 7), (5, 1), (70, 11), (2, 1500)]:
        values = pixels((passes * shape[0], *shape[1:]), dtypes[0], rng)
        target = pixels(shape, dtypes[1], rng)
        for change in (lambda x: x, strided):
            actual = kernel(name)(change(values), change(target))
            compare(actual, getattr(reference, name)(values, target))
        seed = torch.randn(actual.shape, generator=rng)
        got = gradients(kernel(name), [values, target], seed)
        expected = gradients(getattr(reference, name), [values, target], seed)
        compare(got[0], expected[0])
        # The target's gradient is the sum of each pass's, which may cancel: they are rounded to
        # its dtype, then their sum is, as is the reference's.
        largest = 0.0
        for part in torch.eye(passes).unbind():
            masked = seed * part.reshape(-1, *[1] * (seed.dim() - 1)) if passes == 2 else seed
            largest += gradients(getattr(reference, name), [values, target], masked)[1].abs().max()
        rounding = 2 * testing.TOLERANCE[dtypes[1]]["rtol"] * float(largest)
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_over_several_programs(dtype, rng):
    size = 2 * launch.CHUNK + 77
    values, target = pixels((4, size), dtype, rng), pixels((2, size), dtype, rng)
    for name in ("paired_mse", "paired_sigmoid_mse"):
        compare(kernel(name)(values, target), getattr(reference, name)(values, target))
    output, energy = kernel("perturb_latent")(target, values[:2], 0.5)
    expected_output, expected_energy = reference.perturb_latent(target, values[:2], 0.5)
    compare(output, expected_output)
    compare(energy, expected_energy)
    # A sample's result does not depend on its neighbours.
    alone = kernel("per_sample_mse")(values[1:2], target[1:2])
    assert alone.equal(kernel("per_sample_mse")(values[:2], target)[1:])


def test_channels_last_is_not_copied(rng):
    values = pixels((4, 3, 5, 7), torch.float32, rng).contiguous(memory_format=torch.channels_last)
    target = pixels((2, 3, 5, 7), torch.float32, rng).contiguous(memory_format=torch.channels_last)
    expected = reference.paired_sigmoid_mse(values, target)
    grad = torch.randn(4, generator=rng)
    backward = reference.squared_error_backward(grad, values, target, True)
    for pair in ((values, target), (values[::2], target[:, :, :, :]), (values[1:], target)):
        assert squared_error._flat(*pair)[0] is pair[0]
    mixed = squared_error._flat(values, target.contiguous())
    assert all(tensor.is_contiguous() for tensor in mixed)
    compare(kernel("paired_sigmoid_mse")(values, target), expected)
    compare(kernel("paired_sigmoid_mse")(values, target.contiguous()), expected)
    result = kernel("squared_error_backward")(grad, values, target, True)
    assert result.is_contiguous()
    compare(result, backward)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_active_patches(grid, rng):
    size, *where = grid
    frames = torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8)
    background = torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)
    frames[1] = background
    for threshold in (0.0, 70.5, 85.0, 255.0, 1e12):
        for dtype in FLOATING:
            rest = (*where, dtype, 1 / 255, 0.5, threshold)
            patches, index = kernel("active_patches")(strided(frames), strided(background), *rest)
            expected, expected_index = reference.active_patches(frames, background, *rest)
            assert index.equal(expected_index)
            assert index.is_contiguous()
            compare(patches, expected)


def test_active_patches_threshold_is_strict():
    frames = torch.full((1, 4, 4), 10, dtype=torch.uint8)
    background = torch.full((4, 4), 13, dtype=torch.uint8)
    for threshold, kept in ((3.0, 0), (2.999, 4)):
        rest = ((2, 2), (2, 2), True, torch.float32, 1.0, 0.0, threshold)
        assert kernel("active_patches")(frames, background, *rest)[1].shape == (kept, 2)


def test_empty_inputs():
    where = ((2, 3), (2, 2), True)
    frames = torch.empty(0, 1, 5, 6)
    assert kernel("tile_patches")(frames, *where, torch.float32, 1.0, 0.0).shape == (0, 9, 1, 2, 3)
    grad = torch.empty(0, 9, 1, 2, 3)
    result = kernel("tile_patches_backward")(grad, (5, 6), *where, torch.float32, 1.0)
    assert result.shape == (0, 1, 5, 6)
    for maximum in (False, True):
        scores = torch.empty(0, 9)
        folded = kernel("fold_scores")(scores, (5, 6), *where, maximum)
        assert folded.shape == (0, 5, 6)
        result = kernel("fold_scores_backward")(folded, scores, *where, maximum)
        assert result.shape == (0, 9)
    for name, passes in ERRORS.items():
        shape = (2, 0) if passes == 2 else (0,)
        assert kernel(name)(torch.empty(0, 4, 4), torch.empty(0, 4, 4)).shape == shape
        nothing = kernel(name)(torch.empty(passes * 3, 0), torch.empty(3, 0))
        assert nothing.isnan().all()
        assert nothing.numel() == passes * 3
    for shape in ((0, 4), (3, 0)):
        z = torch.empty(shape)
        output, energy = kernel("perturb_latent")(z, z, 1.0)
        assert output.shape == shape
        assert energy.shape == shape[:1]
        assert energy.isnan().all()
        assert kernel("perturb_latent_backward")(z, energy, z, 1.0).shape == shape
        result = kernel("squared_error_backward")(energy, z, z, True)
        assert result.shape == shape
    none = kernel("active_patches")(
        torch.empty(0, 5, 6, dtype=torch.uint8),
        torch.zeros(5, 6, dtype=torch.uint8),
        *where,
        torch.float32,
        1.0,
        0.0,
        0.0,
    )
    assert none[0].shape == (0, 1, 2, 3)
    assert none[1].shape == (0, 2)


def test_a_grid_that_needs_two_dimensions(rng, monkeypatch):
    """2^30 programs cannot run here, so the limit is lowered: programs then count over x and y."""
    monkeypatch.setattr(launch, "GRID_X", 3)
    assert launch.grid_of(3) == (3,)
    assert launch.grid_of(10) == (3, 4)
    frames = pixels((5, 1, 6, 6), torch.uint8, rng)
    arguments = (frames, (3, 3), (2, 2), True, torch.float32, 1.0, 0.0)
    compare(kernel("tile_patches")(*arguments), reference.tile_patches(*arguments))
    values, target = (pixels((5, launch.CHUNK + 9), torch.float32, rng) for _ in range(2))
    compare(kernel("sigmoid_mse")(values, target), reference.sigmoid_mse(values, target))
    scores = torch.randn(5, 9, generator=rng)
    arguments = (scores, (6, 6), (3, 3), (2, 2), True, True)
    compare(kernel("fold_scores")(*arguments), reference.fold_scores(*arguments))


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schema_is_the_ops_own(name):
    ours, other = (
        str(getattr(torch.ops.fastalps, key).default._schema) for key in (name, f"{name}_triton")
    )
    assert other.replace("_triton(", "(") == ours
