"""What is measured in a process of its own: peaks of memory, times of imports.

`python bench/probes.py NAME [ARGUMENT ...]` prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

IMPORTS = {
    "import torch": "import torch",
    "then import fastalps": "import fastalps",
    "then fastalps.ops": "import fastalps; fastalps.ops",
    "then fastalps.Scorer": "import fastalps; fastalps.Scorer",
}


def _status(field: str) -> int:
    """A field of Linux's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _extra_peak(call: Callable[[], Any]) -> int:
    """By how much `call` raises the resident memory at most."""
    gc.collect()
    # "5" resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def error_peak(op: str, count: int) -> dict[str, Any]:
    """Extra peak memory of a squared-error op and of the eager expression on `count` images."""
    import torch

    from bench.cases.op_inputs import OPS

    case = next(one for one in OPS if one.op == op)
    rng = torch.Generator().manual_seed(0)
    few = case.inputs(2, torch.float32, rng)
    tensors = case.inputs(count, torch.float32, rng)
    found: dict[str, Any] = {"input": sum(t.nbytes for t in tensors)}
    for name, call in (("fastalps", case.call), ("eager", case.rivals["eager"])):
        call(*few)
        found[name] = _extra_peak(lambda call=call: call(*tensors))
    return found


def _chunks(frames: int) -> Iterator[Any]:
    import torch

    from bench.frames import synthetic_frames

    clip = synthetic_frames(250, torch.Generator().manual_seed(0), (32, 32))
    for start in range(0, frames, len(clip)):
        yield clip[: min(len(clip), frames - start)].clone()


def scoring_peak(source: str, frames: int) -> dict[str, Any]:
    """Extra peak memory of scoring `frames` frames of 32x32 from a stream or a memory map."""
    import numpy as np
    import torch

    import fastalps

    torch.manual_seed(0)
    scorer = fastalps.Scorer(
        fastalps.ALPS(8, preset="fast"), gate=fastalps.MotionGate(20.0), precision="fp32"
    )
    next(scorer.score_frames(_chunks(250)))
    if source == "stream":

        def run() -> None:
            for _ in scorer.score_frames(_chunks(frames)):
                pass

        return {"extra": _extra_peak(run), "result": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.bin"
        with path.open("wb") as file:
            for chunk in _chunks(frames):
                file.write(chunk.numpy().tobytes())
        mapped = np.memmap(path, np.uint8, "r", shape=(frames, 32, 32))
        # Scores, and which patches the gate kept.
        result = frames * (16 * 5 + 4)
        return {"extra": _extra_peak(lambda: scorer.score_frames(mapped)), "result": result}


def import_times() -> dict[str, float]:
    """Milliseconds of a fresh interpreter for torch, then for each further step on top of it."""
    found = {}
    for label, statement in IMPORTS.items():
        start = time.perf_counter()
        exec(statement)
        found[label] = 1e3 * (time.perf_counter() - start)
    return found


def main() -> None:
    sys.path.insert(0, str(ROOT))
    name, *arguments = sys.argv[1:]
    typed = [int(a) if a.isdigit() else a for a in arguments]
    probes = {
        "error_peak": error_peak,
        "scoring_peak": scoring_peak,
        "import_times": import_times,
    }
    print(json.dumps(probes[name](*typed)))


if __name__ == "__main__":
    main()
