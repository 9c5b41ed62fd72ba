"""The history of a training, as TensorBoard reads it."""

from __future__ import annotations

import sys

import pytest
import torch

import fastalps
from fastalps.cli import train
from fastalps.errors import UserError
from fastalps.training import TensorBoardLogger
from tests.commands import rows_of

OPTIONS = ["--dataset", "digits", "--normal-class", "3", "--preset", "fast", "--latent", "4"]


def scalars(folder) -> dict[str, dict[int, float]]:
    pytest.importorskip("tensorboard", reason="not installed: pip install 'fastalps[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_history(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="not installed: pip install 'fastalps[tensorboard]'")
    run = tmp_path / "run"
    assert train.main([*OPTIONS, "--epochs", "2", "--tensorboard", "--out", str(run)]) == 0
    # The resumed run goes on logging, since that is part of its configuration.
    assert train.main(["--resume", "--epochs", "3", "--out", str(run)]) == 0
    found = scalars(run / "tensorboard")
    rows = rows_of(run / "history.csv")
    assert len(rows) == 3
    for column, tag in (
        ("normal_error", "training/normal_error"),
        ("validation_average", "validation/average"),
        ("validation_auroc_average", "validation/auroc_average"),
    ):
        expected = {int(row["epoch"]): float(row[column]) for row in rows}
        assert found[tag] == pytest.approx(expected)


def test_without_the_option_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = tmp_path / "run"
    assert train.main([*OPTIONS, "--epochs", "1", "--out", str(run)]) == 0
    assert not (run / "tensorboard").exists()


def test_without_tensorboard(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'fastalps\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)
    run = tmp_path / "run"
    assert train.main([*OPTIONS, "--tensorboard", "--out", str(run)]) == 2
    assert "pip install 'fastalps[tensorboard]'" in capsys.readouterr().err
    assert not run.exists()


def test_loggers_get_every_row(rng) -> None:
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=rng)
    rows = []
    config = fastalps.TrainConfig(epochs=3, batch_size=10)
    model = fastalps.ALPS(8, 1, "fast", latent=2)
    fitted = fastalps.Trainer(config, progress=False, loggers=[rows.append]).fit(model, images)
    assert rows == fitted.history and len(rows) == 3
