"""What rounding does to scores: of bf16 as the fused CUDA kernels round, and of fp8, an experiment
before there is a kernel for it.

The tensor cores of Hopper multiply e4m3 (four bits of exponent, three of fraction) at twice the
rate of bf16. Here the pretrained networks score real test data with their layers' weights and
inputs rounded to it, sums and everything else in float32: weights by a scale for each output,
inputs by one for each layer, from the largest value that the first test images bring there. "fp8,
inner" leaves the first convolution and the last layer, which meet the pixels, in bf16. "bf16"
rounds what a layer hands to the next one once; "bf16, leaky pairs" as the fused kernels do, before
a leaky ReLU and, what is negative, after it, whose slope is rounded, too.

Needs MNIST and UCSD Ped2. Errors are those of the arithmetic: they do not depend on the machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import fastalps
from bench.command_line import Parser, guarded
from bench.data import DATA, HELP
from bench.precision import PRETRAINED, exact_errors, print_rows, row
from fastalps.environment import result_record
from fastalps.files import write_json
from fastalps.folding import fold_batch_norm

LARGEST = torch.finfo(torch.float8_e4m3fn).max
CALIBRATION = 512  # images
BATCH = 512


def round_fp8(values: Tensor, largest: Tensor) -> Tensor:
    """To the nearest e4m3, scaled so that `largest` (above 0) is its largest value; values beyond
    are clipped."""
    scale = LARGEST / largest
    scaled = (values * scale).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).to(values.dtype) / scale


def round_bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers with products, of encoder, distorter and decoder, in this order."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return [layer for layer in network.modules() if isinstance(layer, kinds)]


def meets_pixels(layer: nn.Module) -> bool:
    """Whether a layer reads or writes images: of the pretrained networks, one channel."""
    return isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and (
        layer.in_channels == 1 or layer.out_channels == 1
    )


def leaky_pairs(layer: nn.LeakyReLU, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A leaky ReLU of bf16: `leaky_words` of csrc/cuda/fused_machine.cuh."""
    values = round_bf16(inputs[0])
    slope = round_bf16(values.new_tensor(layer.negative_slope))
    return torch.maximum(values, round_bf16(slope * values))


def rounded_network(
    model: fastalps.ALPS, images: Tensor, fp8: Callable[[nn.Module], bool], pairs: bool = False
) -> fastalps.ALPS:
    """A copy of the model that rounds each layer's weights and inputs: to fp8 where `fp8` says so,
    else to bf16.

    Args:
        model: with any batch norm; it is folded first.
        images: uint8 (N, C, H, W), which the inputs' scales are made from.
        fp8: whether a layer's products are in fp8.
        pairs: whether leaky ReLUs compute in bf16.
    """
    network = copy.deepcopy(model).float().eval().requires_grad_(False)
    fold_batch_norm(network)
    largest: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # A distorter shares nothing with the encoder, but the decoder runs twice.
        most = inputs[0].abs().max()
        largest[layer] = torch.maximum(largest.get(layer, most), most)

    layers = layers_of(network)
    watching = [layer.register_forward_pre_hook(watch) for layer in layers]
    network.score(images[:CALIBRATION].float() / 255)
    for handle in watching:
        handle.remove()
    for layer in layers:
        if fp8(layer):
            # Outputs come first, of transposed convolutions second.
            others = [0, 2, 3] if isinstance(layer, nn.ConvTranspose2d) else None
            others = others or list(range(1, layer.weight.dim()))
            most = layer.weight.abs().amax(others, keepdim=True).clamp(min=1e-30)
            layer.weight.data = round_fp8(layer.weight, most)
            layer.register_forward_pre_hook(
                lambda layer, inputs: (round_fp8(inputs[0], largest[layer]),)
            )
        else:
            layer.weight.data = round_bf16(layer.weight)
            layer.register_forward_pre_hook(lambda layer, inputs: (round_bf16(inputs[0]),))
    for layer in network.modules() if pairs else ():
        if isinstance(layer, nn.LeakyReLU):
            layer.register_forward_hook(leaky_pairs)
    return network


def errors_of(network: fastalps.ALPS, images: Tensor) -> Tensor:
    """(2, N): normal and perturbed."""
    parts = [network.score(part.float() / 255)[:2] for part in images.split(BATCH)]
    return torch.cat([torch.stack(part) for part in parts], 1)


# Which layers are in fp8, and whether leaky ReLUs compute in bf16.
WAYS: dict[str, tuple[Callable[[nn.Module], bool], bool]] = {
    "bf16": (lambda layer: False, False),
    "bf16, leaky pairs": (lambda layer: False, True),
    "fp8, inner": (lambda layer: not meets_pixels(layer), False),
    "fp8": (lambda layer: True, False),
}


@torch.inference_mode()
def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    results = {}
    for name, load in PRETRAINED.items():
        images, labels = load(options.root)
        model = fastalps.load_pretrained(name)
        exact = exact_errors(model, images)
        rows = {"fp32": row(errors_of(copy.deepcopy(model).float().eval(), images), exact, labels)}
        for way, (fp8, pairs) in WAYS.items():
            found = errors_of(rounded_network(model, images, fp8, pairs), images)
            rows[way] = row(found, exact, labels, rows["fp32"])
        results[name] = rows
        print_rows(name, rows)
    if options.out is not None:
        write_json(options.out, result_record("fp8", results, seed=None))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/fp8.py",
        description=__doc__,
    )
    parser.add_argument("--threads", type=int, default=1, help="of this process (default: 1)")
    parser.add_argument("--root", type=Path, default=DATA, help=HELP)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there")
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
