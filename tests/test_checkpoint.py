"""Models on disk: exact round trips, and files that are not ours."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import fastalps
from fastalps import ALPS, Calibration
from fastalps.checkpoint import read_tensors
from fastalps.errors import UserError

SETTINGS = {"stride": [30, 30], "of a later version": {"any": 1}}
CALIBRATION = Calibration(0.0125, "average", "frame", 0.05, 300, SETTINGS)


def trained(**options) -> fastalps.ALPS:
    model = fastalps.ALPS((9, 12), 2, "fast", latent=5, **options)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape) * 3)
    return model


@pytest.mark.parametrize("perturbation", ["adversarial", "none"])
def test_round_trip(tmp_path, perturbation, rng) -> None:
    path = tmp_path / "model.safetensors"
    model = trained(perturbation=perturbation)
    fastalps.save(model, path, CALIBRATION)
    again = fastalps.load(path)
    assert again.config == model.config
    assert again.calibration == CALIBRATION
    assert not again.training
    x = torch.rand(3, 2, 9, 12, generator=rng)
    for mine, theirs in zip(again.score(x), model.score(x), strict=True):
        assert torch.equal(mine, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_loaded_model_trains(tmp_path) -> None:
    fastalps.save(trained(), tmp_path / "m.safetensors")
    model = fastalps.load(tmp_path / "m.safetensors").train()
    model(torch.rand(4, 2, 9, 12)).reconstruction.sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_absent_file(tmp_path) -> None:
    with pytest.raises(fastalps.UserError, match="no such file; train a model first"):
        fastalps.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip or a pickle", b"\xff" * 64])
def test_foreign_bytes(tmp_path, content) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(fastalps.UserError, match="not a readable safetensors file"):
        fastalps.load(path)


def test_truncated_file(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    fastalps.save(trained(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(fastalps.UserError, match="not a readable safetensors file"):
        fastalps.load(path)


def test_safetensors_of_another_kind(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(fastalps.UserError, match="of another kind"):
        fastalps.load(path)


def altered(tmp_path, change) -> str:
    path = tmp_path / "model.safetensors"
    fastalps.save(trained(), path, CALIBRATION)
    tensors, metadata = read_tensors(path, "fastalps-model")
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return str(path)


def edit(key, **values):
    def change(_, metadata):
        metadata[key] = json.dumps({**json.loads(metadata[key]), **values})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("decoder.dense.weight"), "lacks tensor decoder.dense.weight"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "has an unknown tensor extra"),
        (
            lambda t, m: t.update({"decoder.dense.bias": torch.zeros(3)}),
            r"tensor decoder.dense.bias should be torch.float32 \(96,\), is torch.float32 \(3,\)",
        ),
        (lambda t, m: m.update(version="9"), "expected version 1 of the format, got '9'"),
        (lambda t, m: m.pop("config"), "config"),
        (lambda t, m: m.update(config="[1"), "config"),
        (edit("config", latent=-4), "latent"),
        (edit("config", latent=10**12), "a size above 65536"),
        (edit("config", image_size=[10**9, 10**9]), "a size above 65536"),
        (edit("config", surprise=1), "surprise"),
        (edit("config", preset="giant"), "preset: expected one of paper, .*; got 'giant'"),
        (edit("config", strength=10**400), "a number of 401 digits"),
        (lambda t, m: m.update(config="[" * 200_000), "configuration is not .*nested too deeply"),
        (lambda t, m: m.update(calibration="[" * 200_000), "calibration is not .*nested"),
        (lambda t, m: m.update(quantization="[" * 200_000), "quantization is not .*nested"),
        (
            lambda t, m: m.update(
                quantization='{"ranges": [], "images": 4, "agreement": '
                '{"bf16": {"correlation": "x", "difference": 0}}}'
            ),
            "quantization is not valid .correlation: expected a number, got 'x'",
        ),
        (edit("calibration", threshold="high"), "calibration is not valid"),
        (edit("calibration", threshold=10**400), "calibration is not valid"),
        (edit("calibration", settings=[]), "settings: expected names with values, got list"),
        (edit("calibration", samples="x"), "samples: expected a number of them, got 'x'"),
        (edit("calibration", level="galaxy"), "calibration is not valid"),
    ],
)
def test_altered_files(tmp_path, change, message) -> None:
    with pytest.raises(fastalps.UserError, match=message):
        fastalps.load(altered(tmp_path, change))


def test_failed_write_leaves_the_old_model(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    fastalps.save(trained(), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastalps.checkpoint.save_file", full)
    with pytest.raises(fastalps.UserError, match="No space left on device"):
        fastalps.save(trained(), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_that_does_not_exist(tmp_path) -> None:
    with pytest.raises(fastalps.UserError, match="check the folder"):
        fastalps.save(trained(), tmp_path / "absent" / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "best"}, "score: expected one of"),
        ({"level": "video"}, "level: expected one of"),
        ({"threshold": float("inf")}, "threshold: expected a finite"),
        ({"threshold": 10**400}, "threshold: expected a finite"),
        ({"target_false_positive_rate": 1.0}, "between 0 and 1"),
        ({"correlation": 10**400}, "correlation: expected at least 1"),
        ({"samples": 1.5}, "samples: expected a number of them"),
        ({"settings": "x"}, "settings: expected names with values, got str"),
        ({"settings": {"gate_threshold": "x"}}, "gate_threshold: expected gray levels"),
        ({"settings": {"gate_threshold": [1]}}, "gate_threshold: expected gray levels"),
        ({"settings": {"stride": 7.5}}, "stride: expected one or two sides"),
        ({"settings": {"stride": [10**30, 1]}}, "stride: expected one or two sides"),
        ({"settings": {"patch_size": [1, 2, 3]}}, "patch_size: expected one or two sides"),
        ({"settings": {"edge": "wrap"}}, "edge: expected one of cover"),
        ({"settings": {"frames": "depth"}}, "frames: expected one of gray, motion"),
        ({"settings": {"frame_reduce": "median"}}, "frame_reduce must be one of"),
        ({"settings": {"top_k": 0}}, "top_k must be"),
        ({"settings": {"smoothing": 2}}, "smoothing: expected an odd number"),
        ({"settings": {"precision": 16}}, "precision: expected its name"),
    ],
)
def test_wrong_calibration(fields, message) -> None:
    good = {
        "threshold": 0.1,
        "score": "normal",
        "level": "image",
        "target_false_positive_rate": 0.1,
        "samples": 3,
    }
    with pytest.raises(ValueError, match=message):
        Calibration(**{**good, **fields})


def test_weights_that_are_not_finite_are_refused(tmp_path) -> None:
    model = ALPS(8, preset="fast")
    with torch.no_grad():
        model.decoder.dense.weight[0, 0] = torch.nan
    fastalps.save(model, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"tensor decoder\.dense\.weight is not finite; train"):
        fastalps.load(tmp_path / "nan.safetensors")


@pytest.mark.filterwarnings("ignore:this processor has no bf16", "ignore:this cpu has no bf16")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(tmp_path, rng, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=rng)
    model = ALPS(8, preset="fast").eval()
    fastalps.save(model, tmp_path / "model.safetensors")
    expected = [fastalps.Scorer(model, precision=p).score_images(images) for p in ("fp32", "bf16")]
    torch.set_default_dtype(dtype)
    try:
        loaded = fastalps.load(tmp_path / "model.safetensors")
        found = [
            fastalps.Scorer(loaded, precision=p).score_images(images) for p in ("fp32", "bf16")
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
