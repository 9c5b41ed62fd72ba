"""Instructions that one call of the fp32 engine executes, and those of its peers, by callgrind.

Counts do not depend on what else a machine does: a second witness beside times. Each candidate runs
the same random network on the same patches, on one thread, under `valgrind --tool=callgrind`, once
with one call and once with two; the difference is a call. A vector instruction counts as one,
whatever its width: compare on one machine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.command_line import Parser, guarded
from fastalps.errors import UserError
from fastalps.models import PRESETS

CANDIDATES = ("engine", "engine-direct", "onnxruntime", "openvino", "eager-nhwc")


def _candidate(name: str, preset: str) -> Callable[[Any], Any]:
    import torch

    import fastalps
    from bench import peers
    from bench.harness import Settings
    from fastalps.engine import Engine

    torch.manual_seed(0)
    model = fastalps.ALPS(30, preset=preset).eval()
    settings = Settings("quick", "cpu", 1)
    if name.startswith("engine"):
        engine = Engine(model, minimal=name == "engine")
        return lambda patches: engine.errors(patches, "both")
    if name == "onnxruntime":
        return peers.onnx_runtime(model, settings)
    if name == "openvino":
        return peers.openvino(model, settings, "f32")
    return torch.inference_mode()(peers.eager(model, "cpu", torch.float32, True))


def _child(name: str, preset: str, patches: int, calls: int) -> None:
    import torch

    from fastalps import backends

    torch.set_num_threads(1)
    backends.load_native("cpu")
    run = _candidate(name, preset)
    data = torch.rand(patches, 1, 30, 30, generator=torch.Generator().manual_seed(0))
    for _ in range(calls):
        run(data)


def _counted(name: str, preset: str, patches: int, calls: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        command += ["--smc-check=all-non-file", sys.executable, __file__]
        command += ["--child", name, "--preset", preset, "--patches", str(patches)]
        done = subprocess.run(
            [*command, "--calls", str(calls)], capture_output=True, text=True, check=False
        )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{name}: valgrind failed: {last}")
    return int(found[1])


def _run(options: argparse.Namespace) -> int:
    if options.child:
        _child(options.child, options.preset, options.patches, options.calls)
        return 0
    if shutil.which("valgrind") is None:
        raise UserError("valgrind was not found; install it")
    first = None
    for name in options.candidates.split(","):
        # One call beforehand in both: libraries prepare their kernels at the first.
        one, two = (_counted(name, options.preset, options.patches, calls) for calls in (1, 2))
        patch = (two - one) / options.patches
        first = first or patch
        print(
            f"{name:<16}{patch / 1e6:8.2f} M instructions/patch   {patch / first:5.2f}x", flush=True
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/instructions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="network-b", choices=tuple(PRESETS))
    parser.add_argument("--patches", type=int, default=24, help="a call")
    parser.add_argument("--candidates", default=",".join(CANDIDATES), metavar="NAME,NAME")
    parser.add_argument("--child", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=1, help=argparse.SUPPRESS)
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
