"""Several processes on one task: torchrun's environment, gradients, batch statistics, messages.

In training every process holds the model and takes its share of each batch; sums over processes
make the step the one that a single process would take on the whole batch, up to rounding. NCCL on
GPUs, gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from fastalps.errors import UserError

# What processes tell each other: tensors by their names.
Message = dict[str, Tensor]


def starts_first() -> bool:
    """Whether this is process 0 or alone, by torchrun's environment: also before they joined."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def rank() -> int:
    """The number of this process, from 0; 0 when it is alone."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes work together; 1 when this one is alone."""
    return dist.get_world_size() if _running() else 1


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def launched(device: str = "auto", backend: str | None = None) -> Iterator[str]:
    """Joins the processes that torchrun started, for as long as the context lasts.

    Args:
        device: "auto", "cpu" or "cuda"; with several processes each takes the GPU of its number.
        backend: what carries messages, "gloo" or "nccl"; None = nccl between GPUs, else gloo.

    Yields:
        the device of this process. A process that was not started by torchrun, or alone, or that
        has joined already, gets `device` back.

    Raises:
        UserError: fewer GPUs than processes, a numbered device, an environment that is not whole.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" or _running():
        yield device
        return
    missing = [
        n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
    ]
    if missing or not size.isdigit():
        raise UserError(
            f"WORLD_SIZE is {size!r}, but {', '.join(missing) or 'it'} is missing or no number; "
            "start several processes with torchrun"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda under torchrun, got {device!r}")
    local = int(os.environ["LOCAL_RANK"])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"device: torchrun started process {local} of this machine, which has {count} CUDA "
                f"devices; use --nproc-per-node={count} or --device cpu"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group(backend or ("nccl" if device != "cpu" else "gloo"))
    try:
        yield device
        # Nobody leaves while another still sends.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def share(count: int) -> slice:
    """This process's part of `count` things in order: all parts together are 0 to `count`."""
    size, number = world_size(), rank()
    return slice(count * number // size, count * (number + 1) // size)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Gradients of all processes, averaged in place, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    start = 0
    for gradient in gradients:
        # Strided weights (channels last) are flattened in logical order, and back.
        gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()


def average(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, as a new tensor."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def scatter(messages: Sequence[Message] | None) -> Message:
    """Process i gets the i-th of process 0's messages, one for each; the others give None."""
    if messages is None:
        return _receive(0)
    for number, message in enumerate(messages[1:], 1):
        _send(message, number)
    return messages[0]


def gather(message: Message) -> list[Message] | None:
    """The messages of all processes in their order on process 0; None on the others."""
    if rank():
        _send(message, 0)
        return None
    return [message, *(_receive(number) for number in range(1, world_size()))]


def _send(message: Message, to: int) -> None:
    # Not pickled: who could connect to a pickle's reader could run code in it.
    plain = {name: value.cpu().contiguous() for name, value in message.items()}
    data = torch.frombuffer(bytearray(save(plain)), dtype=torch.uint8)
    dist.send(torch.tensor([len(data)]), to)
    dist.send(data, to)


def _receive(source: int) -> Message:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, source)
    data = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(data, source)
    return load(data.numpy().tobytes())


class _Sum(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the batch of all processes, shares of one size.

    ``nn.SyncBatchNorm`` does the same on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        count = input.numel() // input.shape[1] * world_size()
        values = input.float()
        mean = _Sum.apply(values.sum((0, 2, 3))) / count
        # From the mean, not from the squares: no digits cancel.
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / max(1, count - 1))
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        result = centred * scale[:, None, None] + self.bias.float()[:, None, None]
        return result.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


@contextlib.contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """Inside, the model's batch norms see the batch of all processes."""
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d] if world_size() > 1 else []
    for norm in norms:
        # The same parameters and buffers by the same names, whoever holds the module.
        norm.__class__ = SynchronisedBatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d


def broadcast(model: nn.Module) -> None:
    """Process 0's weights for all."""
    if world_size() > 1:
        for value in model.state_dict().values():
            # Messages are contiguous; channels-last weights are not.
            plain = value.contiguous()
            dist.broadcast(plain, 0)
            value.copy_(plain)
