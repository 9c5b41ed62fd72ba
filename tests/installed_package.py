"""Run under an interpreter that has fastalps from a wheel: is all there, and does it score?

Usage: python tests/installed_package.py [--any]

With --any, a package without compiled kernels passes, too, if it says why it has none. Ends with a
line that says so, or with the assertion that failed. The checkout that this file lies in must not
be what is imported; only the standard library, torch and fastalps are used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import sysconfig
from pathlib import Path

# A script's folder comes first on the path; tests/ holds nothing that is wanted here.
sys.path.pop(0)

import torch

import fastalps
from fastalps import backends
from fastalps.cli import score


def check_files() -> None:
    """The package lies in this interpreter's own folder, with its kernels' sources inside."""
    package = Path(fastalps.__file__).resolve().parent
    home = Path(sysconfig.get_paths()["platlib"]).resolve()
    assert package == home / "fastalps", f"fastalps was imported from {package}, not from {home}"
    for name in ("kernels", "csrc"):
        assert importlib.util.find_spec(name) is None, f"a top-level {name} was installed"
        assert importlib.util.find_spec(f"fastalps.{name}") is not None, f"no fastalps.{name}"
    assert (package / "csrc" / "bindings.cpp").is_file()
    assert (package / "kernels" / "tile_patches.py").is_file()
    assert (package / "py.typed").is_file()
    for name in fastalps.pretrained.PRETRAINED:
        assert fastalps.load_pretrained(name).calibration is not None
    assert importlib.metadata.version("fastalps") == fastalps.__version__


def check_scores(native: bool) -> str:
    """Images, and a video with its motion gate, score as in plain PyTorch; returns the method."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = fastalps.ALPS(image_size=8, channels=1, preset="fast").eval()
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=generator)
    frames = torch.randint(0, 256, (4, 20, 27), dtype=torch.uint8, generator=generator)
    scorer = fastalps.Scorer(model, precision="fp32", gate=fastalps.MotionGate())
    assert scorer.method == ("engine" if native else "layers"), scorer.method
    found = [scorer.score_images(images), scorer.score_frames(frames).patches]
    with fastalps.use_backend("reference"):
        expected = [scorer.score_images(images), scorer.score_frames(frames).patches]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return scorer.method


def main(arguments: list[str]) -> None:
    """Checks all of it."""
    check_files()
    state = backends.load_native("cpu")
    assert state.reason, "no word on the compiled kernels"
    assert state.available or "--any" in arguments, state.reason
    method = check_scores(state.available)
    report = subprocess.run(
        [sys.executable, "-m", "fastalps"], capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in report.splitlines() if "native (cpu)" in line)
    assert (" on " in line) == state.available, report
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert score.main([]) == 2
    assert "are required" in said.getvalue()
    print(
        f"fastalps {fastalps.__version__} under Python {sys.version.split()[0]} and torch "
        f"{torch.__version__}: {' '.join(line.split())}; scored by the {method}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
