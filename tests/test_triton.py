"""The Triton ops: in Triton's interpreter (a process of its own), as traced, and on a GPU."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalps import backends, ops, reference, testing

triton = pytest.importorskip("triton", reason="the package triton is not installed")

if backends.triton_interpreted():
    pytest.skip("under the interpreter, run triton_interpreted.py", allow_module_level=True)

importlib.import_module("fastalps.kernels.registration")

HERE = Path(__file__).parent
FORWARD = [name for name in ops.SCHEMAS if not name.endswith("_backward")]
DIFFERENTIABLE = [name for name in FORWARD if name != "active_patches"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernel(name):
    return getattr(torch.ops.fastalps, f"{name}_triton").default


def compare(actual, expected):
    # The GPU's exponential is within a few units in the last place, not one.
    tolerance = dict(testing.TOLERANCE[actual.dtype])
    if actual.dtype == torch.float32:
        tolerance["rtol"] = 1e-5
    torch.testing.assert_close(actual.cpu(), expected.cpu(), equal_nan=True, **tolerance)


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def on_cuda(arguments):
    """The arguments on the GPU with the strides that they have."""

    def move(tensor):
        moved = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
        )
        # An expanded tensor is written through its one element of memory.
        if 0 in tensor.stride() and tensor.numel():
            index = tuple(slice(None, 1) if s == 0 else slice(None) for s in tensor.stride())
            moved[index] = tensor[index].cuda()
            return moved
        return moved.copy_(tensor)

    return tuple(move(x) if isinstance(x, torch.Tensor) else x for x in arguments)


def realistic(name, rng):
    """Arguments of the sizes that the op is for: 240x360 frames in 30x30 patches, 28x28 images."""
    where = ((30, 30), (20, 20), True)
    if name == "tile_patches":
        frames = torch.randn(16, 1, 240, 360, generator=rng)
        return (frames, *where, torch.bfloat16, 1 / 255, 0.0)
    if name == "fold_scores":
        return (torch.rand(64, 12 * 18, generator=rng), (240, 360), *where, True)
    if name == "perturb_latent":
        return (*(torch.randn(4096, 128, generator=rng) for _ in range(2)), 0.5)
    if name == "active_patches":
        frames = torch.randint(0, 256, (16, 240, 360), generator=rng, dtype=torch.uint8)
        return (frames, frames[0].clone(), *where, torch.float32, 1 / 255, 0.0, 85.0)
    count = 4096 if name.startswith("paired") else 2048
    target = torch.rand(2048, 1, 28, 28, generator=rng)
    return torch.randn(count, 1, 28, 28, generator=rng), target


def test_in_the_interpreter():
    """Values, gradients, strides, empty inputs and poisoned outputs of every op, on the CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("FASTALPS_BACKEND", None)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "triton_interpreted.py"),
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        ],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout[-300:])
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_schema_has_the_ops_arguments(name):
    """`triton_op` infers its schema from annotations, which cannot say the length of a list."""
    ours, other = (
        getattr(torch.ops.fastalps, key).default._schema for key in (name, f"{name}_triton")
    )
    describe = lambda schema: [  # noqa: E731
        (argument.name, str(argument.type)) for argument in schema.arguments
    ]
    assert describe(other) == describe(ours)
    assert str(other).split("->")[1] == str(ours).split("->")[1]


@pytest.mark.parametrize("name", FORWARD)
def test_fake_outputs_are_the_references(name, rng):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for arguments in itertools.islice(testing.sample_inputs(name, rng), None, None, 7):
        expected = outputs_of(getattr(reference, name)(*arguments))
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            actual = outputs_of(kernel(name)(*fake))
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == other.dtype
            if name != "active_patches":
                assert one.shape == other.shape
                assert one.stride() == other.contiguous().stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compilers_see_the_kernels(name, dynamic, rng):
    """Tracing an op gives its kernels' launches, forward and backward, not an opaque call."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        """Records what a graph calls; to be run, it gives zeros of the right shapes."""
        graphs.append([str(node.target) for node in graph.graph.nodes])
        results = graph.graph.find_nodes(op="output")[0].args[0]
        return make_boxed_func(lambda *_: [zeros(x) for x in results])

    def zeros(node):
        value = node if node is None else node.meta["val"]
        if isinstance(value, torch.Tensor):
            return torch.zeros([int(size) for size in value.shape], dtype=value.dtype)
        return value if value is None else int(value)

    tensors, rest = [], []
    for x in realistic(name, rng):
        (tensors if isinstance(x, torch.Tensor) else rest).append(x)
    tensors[-1 if name == "perturb_latent" else 0].requires_grad_()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    traced = torch.compile(
        lambda *x: kernel(name)(*x, *rest), backend=backend, fullgraph=True, dynamic=dynamic
    )
    sum(x.sum() for x in outputs_of(traced(*tensors))).backward()
    torch._dynamo.reset()
    assert len(graphs) == 2
    for targets in graphs:
        assert any("triton_kernel_wrapper" in target for target in targets), targets
        assert not any(target.startswith("fastalps") for target in targets), targets


@needs_gpu
@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("name", FORWARD)
    def test_values(self, name, rng):
        # Every fifth: coprime to the cycles of dtypes and strides, so that all of them come up.
        for arguments in itertools.islice(testing.sample_inputs(name, rng), None, None, 5):
            expected = outputs_of(getattr(reference, name)(*arguments))
            with testing.poisoned():
                actual = outputs_of(kernel(name)(*on_cuda(arguments)))
            for one, other in zip(actual, expected, strict=True):
                compare(one, other)

    @pytest.mark.parametrize("name", FORWARD)
    def test_realistic_sizes(self, name, rng):
        arguments = realistic(name, rng)
        results = []
        for function, values in (
            (kernel(name), on_cuda(arguments)),
            (getattr(reference, name), arguments),
        ):
            leaves = [
                x.requires_grad_()
                for x in values
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            ]
            with testing.poisoned():
                outputs = outputs_of(function(*values))
                grads = ()
                if leaves:
                    seeds = [
                        torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x) for x in outputs
                    ]
                    grads = torch.autograd.grad(outputs, leaves, seeds)
            results.append((*(x.detach() for x in outputs), *grads))
        for one, other in zip(*results, strict=True):
            compare(one, other)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, name, dynamic, rng):
        arguments = on_cuda(realistic(name, rng))
        arguments[0].requires_grad_()
        results = []
        for function in (
            kernel(name),
            torch.compile(kernel(name), fullgraph=True, dynamic=dynamic),
        ):
            outputs = outputs_of(function(*arguments))
            grad = torch.autograd.grad(sum(x.float().square().sum() for x in outputs), arguments[0])
            results.append((*(x.detach() for x in outputs), *grad))
        torch._dynamo.reset()
        for one, other in zip(*results, strict=True):
            compare(one, other)

    @pytest.mark.parametrize("name", FORWARD)
    @pytest.mark.parametrize("differentiable", [False, True])
    def test_opcheck(self, name, differentiable, rng):
        arguments = on_cuda(realistic(name, rng))
        if differentiable and arguments[0].is_floating_point():
            arguments[0].requires_grad_()
        torch.library.opcheck(kernel(name), arguments)

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_cuda_graph(self, name, rng):
        arguments = on_cuda(realistic(name, rng))
        leaf = arguments[0].requires_grad_()

        def run():
            outputs = outputs_of(kernel(name)(*arguments))
            grad = torch.autograd.grad(outputs, leaf, [torch.ones_like(x) for x in outputs])
            return [x.detach() for x in (*outputs, *grad)]

        expected = [x.clone() for x in run()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(captured, expected, strict=True):
            assert one.equal(other)

    def test_runs_repeat_bit_for_bit(self, rng):
        for name in DIFFERENTIABLE:
            arguments = on_cuda(realistic(name, rng))
            first, second = (outputs_of(kernel(name)(*arguments)) for _ in range(2))
            assert all(a.equal(b) for a, b in zip(first, second, strict=True))

    def test_more_than_two_to_the_31_elements(self):
        size = 2**30 + 3
        if torch.cuda.mem_get_info()[0] < 8 * 3 * size:
            pytest.skip("needs 26 GB of free GPU memory")
        values = torch.zeros(3, size, dtype=torch.bfloat16, device="cuda")
        target = torch.ones(3, size, dtype=torch.bfloat16, device="cuda")
        values[2] = 3
        assert kernel("per_sample_mse")(values, target).tolist() == [1.0, 1.0, 4.0]
        grad = torch.full((3,), size / 2, device="cuda")
        result = kernel("squared_error_backward")(grad, values, target, False)
        assert [result[n, -1].item() for n in range(3)] == [-1.0, -1.0, 2.0]
