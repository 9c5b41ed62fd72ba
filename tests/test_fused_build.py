"""Fused kernels for other widths, built at run time: what is refused, what is kept, what fails.

`test_fused_emulation.py::test_other_widths` proves such kernels' indices.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

import pytest
import torch

from fastalps import ALPS, Scorer, backends, fused
from fastalps.errors import UserError
from fastalps.fused import build as fused_build
from fastalps.fused.packing import pack_fused, shape_number, sizes
from fastalps.models import ModelConfig, model_config

HOPPER = (9, 0)
WIDTHS = {"encoder": (16, 16, 64), "decoder": (16, 64, 16, 16, 8, 16), "latent": 16}


@pytest.fixture
def config() -> ModelConfig:
    return model_config(25, 1, "fast", **WIDTHS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTALPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTALPS_FUSED_BUILD", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A compiler that notes its calls and does what it is told."""

    def make(script: str) -> Path:
        tools = tmp_path / "tools"
        (tools / "bin").mkdir(parents=True, exist_ok=True)
        nvcc = tools / "bin" / "nvcc"
        note = 'for each in "$@"; do case "$each" in *.cu) grep define "$each"; esac; done'
        note = f'(echo "$@"; {note}) | tr "\\n" " " >> {tools}/calls; echo >> {tools}/calls'
        nvcc.write_text(f"#!/bin/sh\n{note}\n{script}\n", encoding="utf-8")
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(tools))
        return tools / "calls"

    return make


COPY = 'while [ "$1" != "-o" ]; do shift; done; echo a library > "$2"'


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_size": 32}, "square images of 25 to 30 pixels, not 32 x 32"),
        ({"image_size": (28, 30)}, "not 28 x 30"),
        ({"channels": 3}, "one channel, not 3"),
        ({"distorter": (16, 16, 128)}, "a distorter of the encoder's widths"),
        ({"encoder": (24, 16, 64)}, "multiples of 16, 16, 64 for the encoder, not 24, 16, 64"),
        ({"encoder": (16, 48, 64)}, "16, 32 or 64 as the encoder's second width, not 48"),
        ({"decoder": (16, 32, 16, 16, 8, 8)}, "multiples of 16, 64, 16, 16, 8, 8 for the decoder"),
        ({"decoder": (16, 64, 16, 16, 24, 8)}, "8, 16, 32 or 64 as the decoder's fifth width"),
        ({"decoder": (208, 64, 16, 16, 8, 8)}, "at most 12 times its third, not 208 and 16"),
        ({"latent": 72}, "multiples of 64 for the latent, not 72"),
        ({"latent": 48}, "cannot share out a latent of 48"),
    ],
)
def test_what_kernels_cannot_have(options, reason) -> None:
    config = model_config(**{"image_size": 25, "channels": 1, **WIDTHS, **options})
    assert reason in fused_build.reason_against(config)
    with pytest.raises(UserError, match="the fused kernels"):
        fused_build.build(config, HOPPER)


@pytest.mark.parametrize("preset", ["paper", "fast", "network-b"])
def test_presets_could_be_built(preset) -> None:
    for size in fused_build.SIDES:
        assert not fused_build.reason_against(model_config(size, 1, preset))


def test_built_once(config, fake, cache: Path) -> None:
    calls = fake(COPY)
    place = fused_build.build(config, HOPPER)
    assert place.parent == cache and place.read_text() == "a library\n"
    (command,) = calls.read_text().splitlines()
    assert "#define FASTALPS_FUSED_SHAPE 25, 16, 16, 64, 16, 16, 64, 16, 16, 8, 16" in command
    assert "-gencode=arch=compute_90a,code=sm_90a" in command.split()
    assert fused_build.build(config, HOPPER) == place and calls.read_text().count("\n") == 1
    # Other widths, and other devices, are other libraries.
    other = model_config(26, 1, "fast", **WIDTHS)
    places = {place, fused_build.build(other, HOPPER), fused_build.build(config, (8, 0))}
    assert len(places) == 3 and calls.read_text().count("\n") == 3
    assert sorted(cache.iterdir()) == sorted(places)


def test_other_sources_are_another_library(config, monkeypatch: pytest.MonkeyPatch) -> None:
    place = fused_build.place_of(config, HOPPER)
    monkeypatch.setattr(fused_build, "_fingerprint", lambda: b"changed")
    assert place is not None and fused_build.place_of(config, HOPPER) != place


def test_a_compiler_that_fails_leaves_nothing(config, fake, cache: Path) -> None:
    fake(f"{COPY}; echo 'index.h(1): error: too large' >&2; exit 2")
    with pytest.raises(UserError, match=r"nvcc failed: index\.h\(1\): error: too large") as failure:
        fused_build.build(config, HOPPER)
    assert "\n" not in str(failure.value) and not list(cache.iterdir())
    fake("exit 3")
    with pytest.raises(UserError, match="nvcc failed: exit code 3"):
        fused_build.build(config, HOPPER)


def test_without_a_compiler(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_build, "compiler", lambda: None)
    with pytest.raises(UserError, match="nvcc was not found"):
        fused_build.build(config, HOPPER)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(config, fake, cache: Path) -> None:
    fake(COPY)
    cache.mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write .* set FASTALPS_CACHE to another folder"):
        fused_build.build(config, HOPPER)


def test_a_file_where_the_folder_should_be(config, fake, cache: Path) -> None:
    fake(COPY)
    cache.write_text("")
    with pytest.raises(UserError, match=r"cannot write .* set FASTALPS_CACHE to another folder"):
        fused_build.build(config, HOPPER)


def test_what_a_scorer_is_told(config, fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built unasked; what is there is taken; what does not load is said."""
    calls = fake(COPY)
    monkeypatch.setattr(backends, "load_native", lambda device: backends.State(True, ""))
    monkeypatch.setattr(
        fused_build, "_load", lambda place: 1000 if "library" in place.read_text() else -1
    )
    reason = fused_build.loaded_shape(config, HOPPER)
    assert "set FASTALPS_FUSED_BUILD=1" in str(reason) and not calls.exists()
    monkeypatch.setenv("FASTALPS_FUSED_BUILD", "1")
    assert fused_build.loaded_shape(config, HOPPER) == 1000 and calls.exists()
    monkeypatch.delenv("FASTALPS_FUSED_BUILD")
    assert fused_build.loaded_shape(config, HOPPER) == 1000
    place = fused_build.place_of(config, HOPPER)
    assert place is not None
    place.write_text("broken")
    assert "does not load: delete it" in str(fused_build.loaded_shape(config, HOPPER))
    monkeypatch.setattr(backends, "load_native", lambda device: backends.State(False, "no CUDA"))
    assert fused_build.loaded_shape(config, HOPPER) == "no CUDA"


class Sizes(ctypes.Structure):
    """`FusedSizes` of csrc/cuda/fused.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("side", "fragments", "biases", "map_bytes", "latent_bytes")
    ]


def test_with_nvcc(config) -> None:
    """A real library: its functions are there, and what it expects is what is packed."""
    if fused_build.compiler() is None:
        pytest.skip("nvcc was not found")
    library = ctypes.CDLL(str(fused_build.build(config, HOPPER)))
    assert library.fastalps_fused_errors
    found = Sizes()
    library.fastalps_fused_sizes.restype = ctypes.c_bool
    assert library.fastalps_fused_sizes(ctypes.byref(found))
    packed = pack_fused(ALPS(25, 1, "fast", **WIDTHS))
    scratch = sizes(config)
    assert (found.side, found.fragments, found.biases) == (
        25,
        len(packed.weights),
        len(packed.biases),
    )
    assert (found.map_bytes, found.latent_bytes) == (2 * scratch.maps, 4 * scratch.latent)


@pytest.mark.gpu
def test_scores_on_a_gpu(config, rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built on demand, the kernels give the scores of the model in float64."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is available")
    if fused_build.compiler() is None:
        pytest.skip("nvcc was not found")
    monkeypatch.setenv("FASTALPS_FUSED_BUILD", "1")
    device = torch.device("cuda")
    if reason := fused.why_not(config, device, "bf16"):
        pytest.skip(reason)
    assert shape_number(config) is None
    model = ALPS(25, 1, "fast", **WIDTHS).eval()
    scorer = Scorer(model, precision="bf16", device="cuda")
    images = torch.randint(0, 256, (2000, 1, 25, 25), dtype=torch.uint8, generator=rng)
    found = scorer.scores_images(images)
    assert scorer.method == "fused"
    exact = model.double().score(images.double() / 255.0)
    for one, other in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=1e-2, atol=1e-6)
