"""bench/widths.py: AUROC against FLOPs, on training images only, resumable."""

from __future__ import annotations

import json

import pytest
import torch

from bench import trial, widths
from bench.quality.recipes import Recipe
from tests.images import write_idx_set

TINY = {
    "tiny": {"encoder": (4, 4, 4), "decoder": (4, 4, 4, 4, 4, 4)},
    "wider": {"encoder": (8, 8, 8), "decoder": (8, 8, 8, 8, 8, 8)},
}


@pytest.fixture
def small(tmp_path, monkeypatch, kept_threads):
    """Few images, tiny networks, results in a folder of the test; each training in this process."""
    write_idx_set(tmp_path / "mnist", torch.Generator().manual_seed(2), size=(28, 28))
    monkeypatch.setattr(trial, "HELD_OUT", 3)
    monkeypatch.setattr(trial, "ANOMALOUS", 40)
    monkeypatch.setattr(widths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(widths, "WIDTHS", TINY)
    training = {"epochs": 1, "batch_size": 4, "device": "cpu"}
    monkeypatch.setattr(widths, "RECIPES", {"mnist": Recipe({"preset": "fast"}, training)})
    trained = []

    def here(arguments):
        trained.append(arguments[arguments.index("--one") + 1])
        return widths.main(arguments)

    monkeypatch.setattr(widths, "_apart", here)
    return tmp_path, trained


def test_each_network_is_trained_once_and_drawn(small, capsys) -> None:
    folder, trained = small
    options = ["--classes", "3", "2", "--root", str(folder), "--widths", "tiny", "wider"]
    figure = folder / "widths.svg"
    assert widths.main([*options, "--figure", str(figure)]) == 0
    assert trained == ["tiny", "wider"] * 2
    assert widths.main(options) == 0
    assert len(trained) == 4
    rows = widths._found("mnist", [3, 2])
    assert rows["wider"]["both"] > rows["tiny"]["both"] > rows["tiny"]["normal"] > 0
    records = [
        json.loads((folder / f"results/mnist-{c}-tiny.json").read_text(encoding="utf-8"))
        for c in (3, 2)
    ]
    areas = [record["metrics"]["auroc"]["normal"] for record in records]
    assert rows["tiny"]["auroc"]["normal"] == pytest.approx(50 * sum(areas))
    assert figure.read_text(encoding="utf-8").count("wider") >= 1
    printed = capsys.readouterr().out
    assert "tiny" in printed and "MFLOP" in printed


def test_bad_options_are_one_line(small, capsys) -> None:
    folder, _ = small
    with pytest.raises(SystemExit) as stopped:
        widths.main(["--widths", "huge"])
    assert stopped.value.code == 2
    assert widths.main(["--root", str(folder / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
