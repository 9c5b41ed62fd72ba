"""Fused scoring kernels for networks of other widths than the presets', built on this machine.

The kernels of `csrc/cuda/fused*` are compiled for one network's widths at a time. For a network
that the installed library does not have, nvcc makes a library of its own, once: it is kept in a
folder of the user's and found there the next time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastalps import backends
from fastalps.errors import UserError
from fastalps.models import ModelConfig

# What the kernels are made of, and the header that says what a call is.
SOURCES = ("cuda/fused*", "cuda/device.h", "cuda/launchers.h")
SECONDS = 900
# Sides of patches whose maps after two halvings are 7 or 8 pixels wide.
SIDES = range(25, 31)


def reason_against(config: ModelConfig) -> str:
    """What of a network's widths the kernels cannot be compiled for; empty if they can.

    Tiles are 16 terms by 8 outputs, and eight warps share out a layer.

    Args:
        config: with what else the kernels need, see `fastalps.fused.why_not`.
    """
    height, width = config.image_size
    if height != width or height not in SIDES:
        sides = f"{SIDES[0]} to {SIDES[-1]}"
        return f"the fused kernels need square images of {sides} pixels, not {height} x {width}"
    if config.channels != 1:
        return f"the fused kernels need one channel, not {config.channels}"
    if config.distorter != config.encoder:
        return "the fused kernels need a distorter of the encoder's widths"
    units = {
        "encoder": (16, 16, 64),
        "decoder": (16, 64, 16, 16, 8, 8),
        "latent": (16 if config.latent < 64 else 64,),
    }
    for name, unit in units.items():
        widths = (config.latent,) if name == "latent" else getattr(config, name)
        if any(value % one for value, one in zip(widths, unit, strict=True)):
            multiples = ", ".join(map(str, unit))
            given = ", ".join(map(str, widths))
            return f"the fused kernels need multiples of {multiples} for the {name}, not {given}"
    for name, place, width, choices in (
        ("encoder", "second", config.encoder[1], (16, 32, 64)),
        ("decoder", "fifth", config.decoder[4], (8, 16, 32, 64)),
    ):
        if width not in choices:
            known = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
            return f"the fused kernels need {known} as the {name}'s {place} width, not {width}"
    if config.decoder[0] > 12 * config.decoder[2]:
        return (
            f"the fused kernels need a first width of the decoder of at most 12 times its third, "
            f"not {config.decoder[0]} and {config.decoder[2]}"
        )
    groups = max(1, min(8, config.latent // 8))
    if 8 % groups or config.encoder[2] // 16 % (8 // groups):
        return (
            f"the fused kernels cannot share out a latent of {config.latent} with "
            f"{config.encoder[2]} channels before it"
        )
    return ""


def arguments(config: ModelConfig) -> tuple[int, ...]:
    """Those of `Shape` in csrc/cuda/fused_shapes.h."""
    return (config.image_size[0], *config.encoder, config.latent, *config.decoder)


def folder() -> Path:
    """Where libraries are kept: $FASTALPS_CACHE, else fastalps in the user's folder of caches."""
    if chosen := os.environ.get("FASTALPS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalps"


@functools.cache
def sources() -> Path | None:
    """The folder of the kernels' sources: of the package, or of a source tree; None where neither
    has them."""
    here = Path(__file__).resolve().parents[1]
    for place in (here / "csrc", here.parent / "csrc"):
        if (place / "cuda" / "fused.cu").is_file():
            return place
    return None


@functools.cache
def _fingerprint() -> bytes:
    place = sources()
    assert place is not None
    found = sorted(path for pattern in SOURCES for path in place.glob(pattern))
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in found)


def place_of(config: ModelConfig, capability: tuple[int, int]) -> Path | None:
    """Where the library of a network and a GPU's compute capability is, or would be; None without
    sources."""
    if sources() is None:
        return None
    key = f"{arguments(config)} {capability}".encode()
    return folder() / f"fused-{hashlib.sha256(_fingerprint() + key).hexdigest()[:24]}.so"


def compiler() -> str | None:
    """nvcc, of $CUDA_HOME, the path or its usual place."""
    home = os.environ.get("CUDA_HOME")
    names = [str(Path(home) / "bin" / "nvcc")] if home else []
    names += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in names if (found := shutil.which(name))), None)


def build(config: ModelConfig, capability: tuple[int, int]) -> Path:
    """Compiles the kernels for a network, unless that was done before; takes some seconds.

    Args:
        config: of the network.
        capability: of the GPU: (9, 0), say.

    Returns:
        the library.

    Raises:
        UserError: widths that the kernels cannot have, or a compiler that is absent or fails.
    """
    if reason := reason_against(config):
        raise UserError(reason)
    place, origin, nvcc = place_of(config, capability), sources(), compiler()
    if place is None or origin is None:
        raise UserError("the fused kernels' sources are not installed: fastalps/csrc is missing")
    if place.exists():
        return place
    if nvcc is None:
        raise UserError(
            "nvcc was not found, which builds fused kernels for this network: install the CUDA "
            "toolkit, or set CUDA_HOME"
        )
    number = "".join(map(str, capability)) + ("a" if capability[0] >= 9 else "")
    widths = ", ".join(map(str, arguments(config)))
    with _atomic(place) as target, tempfile.TemporaryDirectory() as temporary:
        # nvcc takes the commas of a definition on its command line for more definitions.
        source = Path(temporary) / "network.cu"
        source.write_text(
            f'#define FASTALPS_FUSED_SHAPE {widths}\n#include "cuda/fused.cu"\n', encoding="utf-8"
        )
        command = [nvcc, "-std=c++20", "-O3", "-shared", f"-I{origin}"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        command += [str(source), "-o", str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as failure:
            raise UserError(f"{nvcc} failed: {str(failure).splitlines()[0]}") from failure
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
            # The first is the cause; an assertion names the limit that a width exceeds.
            raise UserError(f"{nvcc} failed: {said[0] if said else f'exit code {done.returncode}'}")
    return place


@contextlib.contextmanager
def _atomic(place: Path) -> Iterator[Path]:
    """A file to write, which gets its name when it is whole: others may build the same."""
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".part", dir=place.parent)
    except OSError as failure:
        raise UserError(
            f"cannot write {place.parent}: {failure.strerror}; set FASTALPS_CACHE to another folder"
        ) from failure
    os.close(handle)
    try:
        yield Path(name)
        # As other files are, which mkstemp's are not.
        Path(name).chmod(0o755)
        os.replace(name, place)
    finally:
        Path(name).unlink(missing_ok=True)


@functools.cache
def _load(place: Path) -> int:
    """The number of a library's network for `torch.ops.fastalps.fused_errors`."""
    native = backends.library_path("cuda")
    assert native is not None
    load = ctypes.CDLL(str(native)).fastalps_load_fused
    load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_int64
    return load(os.fsencode(place))


def loaded_shape(config: ModelConfig, capability: tuple[int, int]) -> int | str:
    """The number of a network that was built, or is now if $FASTALPS_FUSED_BUILD is 1; else why
    there is none."""
    if reason := reason_against(config):
        return reason
    native = backends.load_native("cuda")
    if not native.available:
        return native.reason
    place = place_of(config, capability)
    try:
        if os.environ.get("FASTALPS_FUSED_BUILD") == "1":
            place = build(config, capability)
        elif place is None or not place.exists():
            return (
                "the fused kernels were not built for this network's widths; set "
                "FASTALPS_FUSED_BUILD=1 to let nvcc build them once, which takes some seconds"
            )
    except UserError as failure:
        return str(failure)
    number = _load(place)
    return number if number >= 0 else f"{place} does not load: delete it to have it built again"
