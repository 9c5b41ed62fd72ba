"""The Triton ops: in Triton's interpreter (a process of its own), as traced, and on a GPU."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastalps import backends, reference, testing
from fastalps.op_definitions import SCHEMAS
from tests import ROOT
from tests.conftest import needs_cuda
from tests.op_names import DIFFERENTIABLE, FORWARD, outputs_of

triton = pytest.importorskip("triton", reason="the package triton is not installed")

if backends.triton_interpreted():
    pytest.skip("under the interpreter, run triton_interpreted.py", allow_module_level=True)

importlib.import_module("fastalps.kernels.registration")


def kernel(name):
    return getattr(torch.ops.fastalps, f"{name}_triton").default


def test_in_the_interpreter():
    """Values, gradients, strides, empty inputs and poisoned outputs of every op, on the CPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("FASTALPS_BACKEND", None)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "tests" / "triton_interpreted.py"),
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout[-300:])
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("name", sorted(SCHEMAS))
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
    for x in testing.realistic_inputs(name, rng):
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


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_on_gpu(name, dynamic, rng):
    """Compiled, an op gives what it gives alone; test_kernels.py has all else."""
    arguments = testing.to_device(testing.realistic_inputs(name, rng), "cuda")
    arguments[0].requires_grad_()
    results = []
    for function in (kernel(name), torch.compile(kernel(name), fullgraph=True, dynamic=dynamic)):
        outputs = outputs_of(function(*arguments))
        grad = torch.autograd.grad(sum(x.float().square().sum() for x in outputs), arguments[0])
        results.append((*(x.detach() for x in outputs), *grad))
    torch._dynamo.reset()
    for one, other in zip(*results, strict=True):
        allowed = testing.tolerance(one.dtype, "cuda")
        torch.testing.assert_close(one, other, equal_nan=True, **allowed)
