"""The models that come with the package: they load, do what their card says, and are small."""

from __future__ import annotations

import re

import pytest
import torch

import fastalps
from bench import pretrained as program
from fastalps import metrics
from fastalps.cli import score
from fastalps.data import load_images
from fastalps.errors import UserError
from fastalps.pretrained import PRETRAINED, pretrained_path
from tests import ROOT
from tests.conftest import data_folder

CARD = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PRETRAINED)
def test_loads_ready_to_score(name, rng) -> None:
    model = fastalps.load_pretrained(name)
    assert not model.training
    assert model.calibration is not None and model.quantization is not None
    assert all(
        t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point()
    )
    images = torch.rand((3, 1, *model.config.image_size), generator=rng)
    scores = fastalps.Scorer(model, model.calibration.score).score_images(images)
    # Noise is nothing that the model knows.
    assert (scores > 2 * model.calibration.threshold).all()
    assert f"## {name}" in CARD


def test_all_of_them_fit_a_mebibyte() -> None:
    assert sum(pretrained_path(name).stat().st_size for name in PRETRAINED) <= 2**20


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="no pretrained model 'cats'; choose mnist-0"):
        fastalps.load_pretrained("cats")


def test_card_of_mnist() -> None:
    """The figures of the card are those of the file, on real data."""
    folder = data_folder("mnist")
    model = fastalps.load_pretrained("mnist-0")
    data = load_images("mnist", folder, normal_class=0)
    scores = fastalps.Scorer(model, model.calibration.score, "fp32").score_images(data.test)
    told = re.search(r"normal score \| ([\d.]+)", CARD)
    assert told and abs(100 * metrics.auroc(scores, data.test_labels) - float(told[1])) < 0.011


def test_the_program_refuses_other_names(tmp_path, capsys) -> None:
    assert set(program.MAKERS) == set(PRETRAINED)
    assert program.main(["cats", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no pretrained model 'cats'" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_scores_in_place_of_a_run(tmp_path, capsys, rng) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        noise = torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=rng)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    assert score.main(["pretrained:mnist-0", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "3 images, 3 flagged" in capsys.readouterr().out
    assert score.main(["pretrained:cats", str(folder), "--out", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert "no pretrained model 'cats'" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_the_bytes(tmp_path, dtype, step) -> None:
    torch.manual_seed(0)
    model = fastalps.ALPS(8, 1, "fast").eval()
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    fastalps.save(model, whole)
    fastalps.save(model, half, dtype=dtype)
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    found = fastalps.load(half)
    for name, tensor in model.state_dict().items():
        kept = found.state_dict()[name]
        assert kept.dtype == tensor.dtype
        if tensor.is_floating_point():
            # 2**-24: float16 has no smaller steps near zero.
            assert ((kept - tensor).abs() <= step * tensor.abs() + 2**-24).all()
        else:
            assert torch.equal(kept, tensor)


def test_what_cannot_be_stored(tmp_path) -> None:
    model = fastalps.ALPS(8, 1, "fast")
    with pytest.raises(ValueError, match=r"dtype must be one of .*float16.*, got torch.int8"):
        fastalps.save(model, tmp_path / "m", dtype=torch.int8)
    next(model.parameters()).data.fill_(1e5)
    with pytest.raises(ValueError, match="too large for float16; take bfloat16"):
        fastalps.save(model, tmp_path / "m", dtype=torch.float16)
    fastalps.save(model, tmp_path / "m", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
