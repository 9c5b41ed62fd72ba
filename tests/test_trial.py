"""bench/trial.py: options are tried on training images only."""

from __future__ import annotations

import json

import pytest
import torch

from bench import trial
from fastalps.data import load_images
from tests.images import write_idx_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("trial")
    write_idx_set(root / "mnist", torch.Generator().manual_seed(2), size=(28, 28))
    return root


def test_splits_training_images_only(folder, monkeypatch) -> None:
    monkeypatch.setattr(trial, "HELD_OUT", 3)
    monkeypatch.setattr(trial, "ANOMALOUS", 11)
    data, classes = trial.trial_data("mnist", 2, str(folder))
    pool = {
        bytes(image.numpy())
        for c in range(10)
        for image in load_images("mnist", folder, normal_class=c, protocol="strict").train
    }
    shown = [bytes(image.numpy()) for image in torch.cat([data.train, data.validation])]
    assert set(shown) <= pool
    assert not {bytes(i.numpy()) for i in data.train} & {bytes(i.numpy()) for i in data.validation}
    assert data.validation_labels.tolist() == [False] * 3 + [True] * 11
    assert (classes[:3] == 2).all() and (classes[3:] != 2).all()
    again, _ = trial.trial_data("mnist", 2, str(folder))
    assert torch.equal(again.validation, data.validation)


@pytest.mark.usefixtures("kept_threads")
def test_prints_what_was_measured(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trial, "HELD_OUT", 3)
    monkeypatch.setattr(trial, "ANOMALOUS", 40)
    options = ["--normal-class", "3", "--root", str(folder), "--epochs", "2", "--device", "cpu"]
    options += ["--preset", "fast", "--batch-size", "2"]
    options += ["--encoder", "[8,8,16]", "--decoder", "[16,8,8,8,8,8]"]
    assert trial.main(options) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["epoch"] for row in rows[:2]] == [1, 2]
    assert all(0 <= row[kind] <= 100 for row in rows[:7] for kind in ("normal", "average"))
    model = rows[-1]["model"]
    assert (model["preset"], model["encoder"], model["distorter"]) == (
        "fast",
        [8, 8, 16],
        [8, 8, 16],
    )


def test_bad_options_are_one_line(folder, capsys) -> None:
    assert trial.main(["--dataset", "digits"]) == 2
    assert trial.main(["--normal-class", "3", "--root", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
