"""Other people's ways to run the same network, imported only when asked for."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Settings

PACKAGES = ("onnxruntime", "onnx", "openvino", "kornia")

# A network: float32 patches (K, C, h, w) to both errors (2, K).
Network = Callable[[Tensor], Tensor]


def missing(*packages: str) -> str:
    """Why a peer that needs these packages cannot run; empty when it can."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def versions() -> dict[str, str | None]:
    """Versions of the peers' packages; None = not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class EagerNetwork(nn.Module):
    """Both scores in plain PyTorch, as a user of the layers would write them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.encoder, self.distorter, self.decoder = model.encoder, model.distorter, model.decoder
        self.strength = model.config.strength

    def forward(self, patches: Tensor) -> Tensor:
        images = patches.to(self.encoder.layers[0].weight.dtype)
        latent = self.encoder(images)
        perturbed = latent + self.strength * self.distorter(images)
        logits = self.decoder(torch.cat([latent, perturbed]))
        # Errors in the targets' precision, as the scorer's.
        reconstructions = logits.to(patches.dtype).sigmoid().unflatten(0, (2, patches.shape[0]))
        return (reconstructions - patches).square().flatten(2).mean(2)


def eager(model: Any, device: str, dtype: torch.dtype, channels_last: bool) -> Network:
    """PyTorch layer by layer."""
    network = EagerNetwork(model).to(device=device, dtype=dtype)
    if not channels_last:
        return network
    network = network.to(memory_format=torch.channels_last)
    return lambda patches: network(patches.contiguous(memory_format=torch.channels_last))


def compiled(model: Any, device: str, dtype: torch.dtype, mode: str | None = None) -> Network:
    """torch.compile; `mode` is one of those that capture CUDA graphs, or None for the default."""
    torch._dynamo.reset()
    network = EagerNetwork(model).to(device=device, dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    run = torch.compile(network, mode=mode, dynamic=False)
    if mode is None:
        return run
    # The next replay overwrites the result.
    return lambda patches: run(patches).clone()


def onnx_bytes(model: Any) -> bytes:
    """Both scores as an ONNX file: input "patches", output "errors", any number of patches."""
    # The TorchScript exporter: the newer one needs yet another package.
    shape = (2, model.config.channels, *model.config.image_size)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            EagerNetwork(model).cpu(),
            (torch.rand(shape),),
            buffer,
            dynamo=False,
            input_names=["patches"],
            output_names=["errors"],
            dynamic_axes={"patches": {0: "n"}, "errors": {1: "n"}},
        )
    return buffer.getvalue()


def onnx_runtime(model: Any, settings: Settings) -> Network:
    """ONNX Runtime on the CPU, float32, all its graph optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    # Its threads would otherwise spin on while the next candidate is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(onnx_bytes(model), options, providers=providers)

    def run(patches: Tensor) -> Tensor:
        (errors,) = session.run(None, {"patches": patches.numpy()})
        return torch.from_numpy(errors)

    return run


def openvino(model: Any, settings: Settings, precision: str) -> Network:
    """OpenVINO on the CPU; `precision` is its hint, "f32" or "bf16"."""
    import openvino

    core = openvino.Core()
    network = core.read_model(io.BytesIO(onnx_bytes(model)))
    options = {
        "INFERENCE_NUM_THREADS": settings.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    ready = core.compile_model(network, "CPU", options)

    def run(patches: Tensor) -> Tensor:
        return torch.from_numpy(ready([patches.numpy()])[0])

    return run
