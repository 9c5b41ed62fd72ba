"""Where the CPU engine stands against its ceilings, on one thread, and what its savings are worth.

For each preset: the engine with direct convolutions and with minimal algorithms, interleaved with
peers, 96 patches of 30x30 a call, both scores. GFLOP/s executed: multiplications and additions of
products only; useful: `ALPS.flops()`, which counts every tap, so savings can lift it above the
ceiling. Ceilings, measured between them: torch.mm of 1024 x 1024 (sgemm), and Tensor.copy_.
Intensity: FLOP executed for each byte of weights and pixels that a block of patches reads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fastalps
from bench import peers
from bench.command_line import Parser, guarded
from bench.harness import Settings, relative_error
from fastalps import backends
from fastalps.engine import Engine
from fastalps.engine.narrow import activation_ranges
from fastalps.environment import result_record
from fastalps.errors import UserError
from fastalps.files import write_json
from fastalps.models import PRESETS
from fastalps.quantization import NARROW, in_hardware
from fastalps.testing import SCORE_ERROR

PATCHES = 96
BLOCK_VECTORS = 3  # as csrc/cpu/engine.h
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
LANES = {"default": 4, "avx2": 8, "avx512": 16}


def _seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of a call: waiting for a core that somebody else uses does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _measure(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, taken in turns."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for number in range(rounds):
        order = list(candidates.items())
        for name, run in order if number % 2 == 0 else order[::-1]:
            samples[name].append(_seconds(run))
    return {name: statistics.median(times) for name, times in samples.items()}


def _check(
    model: fastalps.ALPS, patches: torch.Tensor, candidates: dict[str, Callable[[], Any]]
) -> None:
    """UserError unless each candidate's errors are those of the model in float64."""
    with torch.inference_mode():
        exact = peers.EagerNetwork(model).double()(patches.double())
        for name, run in candidates.items():
            dtype = next((d for d in DTYPES if name.startswith(d) or f" {d}" in name), "fp32")
            limit = SCORE_ERROR[DTYPES.get(dtype, torch.float32)]
            found = relative_error(run(), exact, floor=1e-30)
            if not found <= limit:
                raise UserError(f"{name}: off by {found:.1e}, more than {limit:g}; no speed of it")


def _preset(preset: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = fastalps.ALPS(30, preset=preset).eval()
    patches = torch.rand(PATCHES, 1, 30, 30)
    ranges = activation_ranges(model, patches)
    engines = {"direct": Engine(model, minimal=False), "minimal": Engine(model)}
    for precision in NARROW:
        # Without them the name says that other instructions stand in.
        name = precision if in_hardware(precision) else f"{precision}, emulated"
        engines[name] = Engine(model, precision=precision, ranges=ranges)
    settings = Settings("quick", "cpu", 1)
    candidates: dict[str, Callable[[], Any]] = {
        name: lambda engine=engine: engine.errors(patches, "both")
        for name, engine in engines.items()
    }
    eager = peers.eager(model, "cpu", torch.float32, True)
    candidates["eager NHWC"] = lambda: eager(patches)
    half = peers.eager(model, "cpu", torch.bfloat16, True)
    candidates["eager bf16 NHWC"] = lambda: half(patches)
    if not peers.missing("onnxruntime", "onnx"):
        onnx = peers.onnx_runtime(model, settings)
        candidates["ONNX Runtime"] = lambda: onnx(patches)
    if not peers.missing("openvino", "onnx"):
        vino = peers.openvino(model, settings, "f32")
        candidates["OpenVINO"] = lambda: vino(patches)
    _check(model, patches, candidates)
    candidates["minimal, normal only"] = lambda: engines["minimal"].errors(patches, "normal")
    square = torch.rand(1024, 1024)
    large, other = torch.rand(1 << 24), torch.rand(1 << 24)
    candidates["sgemm"] = lambda: square @ square
    short, byte = square.bfloat16(), (square * 127).to(torch.int8)
    if in_hardware("bf16"):
        candidates["bf16 product"] = lambda: short @ short
    if in_hardware("int8"):
        candidates["int8 product"] = lambda: torch._int_mm(byte, byte)
    candidates["copy"] = lambda: other.copy_(large)
    with torch.inference_mode():
        seconds = _measure(candidates, rounds)
    block = LANES[backends.cpu_kernels()] * BLOCK_VECTORS
    rows: dict[str, Any] = {}
    products = {name for name in seconds if name == "sgemm" or name.endswith(" product")}
    for name in seconds.keys() - products - {"copy", "minimal, normal only"}:
        rate = PATCHES / seconds[name]
        rows[name] = {"patches_per_second": rate, "useful_gflops": rate * model.flops() / 1e9}
        if name in engines:
            bytes_read = engines[name].weight_bytes / block + patches[0].numel() * 4
            rows[name] |= {
                "executed_gflops": rate * engines[name].flop / 1e9,
                "peak": next((p for p in products if p.split()[0] == name), "sgemm"),
                "flop_executed": engines[name].flop,
                "flop_per_byte": engines[name].flop / bytes_read,
                "weight_bytes": engines[name].weight_bytes,
            }
    rows["minimal"]["normal_only_speedup"] = seconds["minimal"] / seconds["minimal, normal only"]
    return {
        "flop_useful": model.flops(),
        "sgemm_gflops": 2 * 1024**3 / seconds["sgemm"] / 1e9,
        "product_gflops": {name: 2 * 1024**3 / seconds[name] / 1e9 for name in sorted(products)},
        "copy_gb_per_second": 2 * 4 * large.numel() / seconds["copy"] / 1e9,
        "candidates": rows,
    }


def _print(preset: str, result: dict[str, Any]) -> None:
    peak = result["sgemm_gflops"]
    print(
        f"{preset}: sgemm {peak:.1f} GFLOP/s, copy {result['copy_gb_per_second']:.1f} GB/s, "
        f"{result['flop_useful'] / 1e6:.1f} MFLOP a patch"
    )
    first = result["candidates"]["minimal"]["patches_per_second"]
    for name, row in sorted(
        result["candidates"].items(), key=lambda item: -item[1]["patches_per_second"]
    ):
        text = f"  {name:<15}{row['patches_per_second']:7.0f} patches/s"
        text += f"{first / row['patches_per_second']:7.2f}x   useful {row['useful_gflops']:5.1f}"
        if "executed_gflops" in row:
            name = row["peak"]
            share = row["executed_gflops"] / result["product_gflops"][name]
            text += f", executed {row['executed_gflops']:5.1f} GFLOP/s = {share:.0%} of {name}"
            text += f", {row['flop_executed'] / 1e6:.1f} MFLOP"
        print(text, flush=True)


def _draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fastalps"
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    peak = max(result["sgemm_gflops"] for result in results.values())
    copy = max(result["copy_gb_per_second"] for result in results.values())
    left, right = 0.5, 1000.0
    axes.plot([left, peak / copy, right], [left * copy, peak, peak], "k", label="copy, sgemm")
    for number, (preset, result) in enumerate(results.items()):
        rows, colour = result["candidates"], f"C{number}"
        for name, marker in (("direct", "o"), ("minimal", "s")):
            row = rows[name]
            at = row["flop_per_byte"]
            label = f"{preset}, {name}"
            axes.plot(at, row["executed_gflops"], colour + marker, label=label)
            axes.plot(at, row["useful_gflops"], colour + marker, fillstyle="none")
        best = max(row["useful_gflops"] for name, row in rows.items() if "flop_executed" not in row)
        axes.axhline(best, color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOP executed / byte read by a block")
    axes.set(ylabel="GFLOP/s, one thread", xlim=(left, right), ylim=(5, 3 * peak))
    axes.set_title("filled: executed; hollow: useful; dotted: best peer, useful", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _run(options: argparse.Namespace) -> int:
    if not backends.load_native("cpu").available:
        raise UserError(f"the engine cannot run: {backends.load_native('cpu').reason}")
    torch.set_num_threads(1)
    results = {}
    for preset in PRESETS:
        results[preset] = _preset(preset, options.rounds)
        _print(preset, results[preset])
    if options.out is not None:
        record = result_record(
            "roofline", results, seed=0, rounds=options.rounds, threads=1, peers=peers.versions(),
            cpu_kernels=backends.cpu_kernels(),
        )  # fmt: skip
        write_json(options.out, record)
    if options.figure is not None:
        _draw(results, options.figure)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/roofline.py",
        description=__doc__,
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of each candidate; medians count (default: 9)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw the roofline there")
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
