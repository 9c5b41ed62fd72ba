"""Instructions that the fp32 engine executes for a patch, and those of its peers, by callgrind.

Counts do not depend on what else a machine does: a second witness beside times. Each candidate runs
the same random network, both scores, on one thread under `valgrind --tool=callgrind`, with one call
and with two; the difference is a call. A vector instruction counts as one, whatever its width:
compare on one machine. The engine is its block kernel, called by bench/engine_block.cpp, which is
linked with the objects of the last build. OpenVINO is not among them: callgrind reported fewer
instructions for it (1.8 million a patch of network-b) than it must execute multiply-adds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Plans are made for a set of instructions, and valgrind (3.19) knows no AVX-512.
os.environ.setdefault("FASTALPS_CPU", "avx2")

import numpy as np
import torch

import fastalps
from bench import peers
from bench.command_line import Parser, guarded
from fastalps.engine import Engine
from fastalps.errors import UserError
from fastalps.models import PRESETS

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ("engine", "engine-direct", "onnxruntime")
# Without torch, whose import would take valgrind minutes.
PEERS = {
    "onnxruntime": """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
patches = numpy.load(sys.argv[2])
for _ in range(int(sys.argv[3])):
    session.run(None, {"patches": patches})
""",
}


def _engine_command(folder: Path, model: fastalps.ALPS, minimal: bool, patches: int) -> list[str]:
    """The compiled block kernel, with the files that it reads."""
    objects = sorted((ROOT / "build" / "native" / "fastalps_cpu").glob("*.o"))
    objects = [path for path in objects if not path.name.startswith("bindings")]
    compiler = os.environ.get("CXX", "c++")
    if not objects or shutil.which(compiler) is None:
        raise UserError("the engine's objects or a compiler are missing; run make setup")
    program = folder / "engine_block"
    source = str(ROOT / "bench" / "engine_block.cpp")
    command = [compiler, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", source, *map(str, objects)]
    subprocess.run([*command, "-o", str(program)], check=True)
    engine = Engine(model, None if minimal else False)
    files = [folder / name for name in ("plan", "weights", "words")]
    for file, part in zip(files, engine.packed, strict=True):
        part.numpy().tofile(file)
    return [str(program), *map(str, files), str(patches)]


def _peer_command(folder: Path, model: fastalps.ALPS, name: str, patches: int) -> list[str]:
    if reason := peers.missing(name, "onnx"):
        raise UserError(f"{name}: {reason}")
    (folder / "model.onnx").write_bytes(peers.onnx_bytes(model))
    np.save(folder / "patches.npy", np.random.default_rng(0).random((patches, 1, 30, 30), "f4"))
    files = [str(folder / "model.onnx"), str(folder / "patches.npy")]
    return [sys.executable, "-c", PEERS[name], *files]


def _counted(folder: Path, command: Sequence[str], calls: int) -> int:
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
    done = subprocess.run(
        # Peers write machine code while they run.
        [*valgrind, "--smc-check=all-non-file", *command, str(calls)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise UserError(
            f"valgrind failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    return int(found[1])


def _run(options: argparse.Namespace) -> int:
    if shutil.which("valgrind") is None:
        raise UserError("valgrind was not found; install it")
    torch.manual_seed(0)
    model = fastalps.ALPS(30, preset=options.preset).eval()
    first = None
    for name in options.candidates.split(","):
        if name not in CANDIDATES:
            raise UserError(f"--candidates: expected {', '.join(CANDIDATES)}; got {name!r}")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if name in PEERS:
                command = _peer_command(folder, model, name, options.patches)
            else:
                command = _engine_command(folder, model, name == "engine", options.patches)
            one, two = (_counted(folder, command, calls) for calls in (1, 2))
        patch = (two - one) / options.patches
        first = first or patch
        print(
            f"{name:<14}{patch / 1e6:7.2f} M instructions/patch {patch / first:6.2f}x", flush=True
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/instructions.py",
        description=__doc__,
    )
    parser.add_argument(
        "--preset",
        default="network-b",
        choices=tuple(PRESETS),
        help="the network (default: network-b)",
    )
    parser.add_argument("--patches", type=int, default=24, help="patches a call (default: 24)")
    parser.add_argument(
        "--candidates",
        default=",".join(CANDIDATES),
        metavar="NAME,NAME",
        help="what is counted (default: all: %(default)s)",
    )
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
