"""bench/paper.py: cells are run once, survive being stopped, and become tables."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import paper
from bench.quality import baselines, cells, recipes, rehearsal, tables, video
from bench.quality.cells import Cell
from fastalps import metrics
from fastalps.relative import relative_errors
from tests.commands import rows_of
from tests.images import write_idx_set
from tests.videos import FRAMES, write_street

SIZE = (12, 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder in which two cells were run from a small data set, and the options that did it."""
    folder = tmp_path_factory.mktemp("paper")
    write_idx_set(folder / "data" / "mnist", torch.Generator().manual_seed(1), size=SIZE)
    options = ["--dataset", "mnist", "--classes", "3", "--seeds", "1", "--jobs", "2", "--quick"]
    for name in ("data", "results", "scratch"):
        options += [f"--{name.replace('data', 'root')}", str(folder / name)]
    assert paper.main([*options, "--methods", "alps", "pca"]) == 0
    return folder, options


@pytest.mark.parametrize("protocol", cells.PROTOCOLS)
def test_figures_follow_from_the_scores(finished, protocol) -> None:
    folder, _ = finished
    record = cells.read(Cell("mnist", 3, 0), folder / "results", protocol)
    rows = rows_of(folder / "scratch" / "mnist-3-0" / f"scores-{protocol}.csv")
    labels = [int(row["anomalous"]) for row in rows]
    energies = torch.tensor([float(row["energy"]) for row in rows])
    plain = ("normal", "perturbed", "average")
    for kind in (*plain, *(f"smoothed_{name}" for name in plain)):
        errors = torch.tensor([float(row[kind]) for row in rows])
        assert metrics.auroc(errors, labels) == record["auroc"][kind]
        exponent = record["relative_exponent"]
        relative = metrics.auroc(relative_errors(errors, energies, exponent), labels)
        assert relative == pytest.approx(record["auroc"][f"relative_{kind}"])
    assert record["auroc"]["reported"] == record["auroc"][record["score"]]
    assert record["auroc"]["ours"] == record["auroc"][record["ours"]]
    assert (folder / "results" / "figure-2-mnist.png").is_file()
    assert record["protocol"] == protocol and record["quick"]


def test_strict_is_the_last_epoch_and_one_kind(finished) -> None:
    record = cells.read(Cell("mnist", 3, 0), finished[0] / "results", "strict")
    assert record["score"] == "average"
    assert record["chosen_epoch"] == record["training"]["epochs"] == 2


def test_finished_cells_are_not_run_again(finished, capfd) -> None:
    folder, options = finished
    before = {path: path.read_bytes() for path in (folder / "results").iterdir()}
    # Two cells by two protocols, and the figure.
    assert len(before) == 5
    assert paper.main([*options, "--methods", "alps", "pca"]) == 0
    assert "0 to run" in capfd.readouterr().out
    assert before == {path: path.read_bytes() for path in (folder / "results").iterdir()}


def test_a_stack_leaves_the_same_records(finished, tmp_path, capfd) -> None:
    folder, _ = finished
    options = ["--dataset", "mnist", "--classes", "3", "4", "--seeds", "1", "--quick", "--stack"]
    options += ["--root", str(folder / "data"), "--methods", "fast", "pca"]
    options += ["--results", str(tmp_path / "results"), "--scratch", str(tmp_path / "scratch")]
    assert paper.main(options) == 0
    assert "4 to run" in capfd.readouterr().out
    for protocol in cells.PROTOCOLS:
        alone = cells.read(Cell("mnist", 3, 0), folder / "results", protocol)
        for normal_class in (3, 4):
            cell = Cell("mnist", normal_class, 0, "fast")
            record = cells.read(cell, tmp_path / "results", protocol)
            assert record.pop("stacked") == 2
            assert record.keys() == alone.keys() and record["auroc"].keys() == alone["auroc"].keys()
            assert record["normal_class"] == normal_class
            left = {path.name for path in (tmp_path / "scratch" / cell.name).iterdir()}
            assert left == {path.name for path in (folder / "scratch" / "mnist-3-0").iterdir()}
        # Baselines are trained alone.
        assert "stacked" not in cells.read(
            Cell("mnist", 3, 0, "pca"), tmp_path / "results", protocol
        )
    # A record that is missing is made again from the last checkpoint.
    lost = Cell("mnist", 4, 0, "fast")
    lost.path(tmp_path / "results", "strict").unlink()
    assert paper.main(options) == 0
    assert "1 to run" in capfd.readouterr().out
    assert cells.read(lost, tmp_path / "results", "strict")["stacked"] == 1


def test_what_is_trained_together() -> None:
    options = argparse.Namespace(stack=True)
    missing = [
        Cell("mnist", c, seed, method)
        for seed in (0, 1)
        for method in ("alps", "pca")
        for c in (0, 1, 2)
        if (c, seed) != (1, 1)
    ]
    groups = paper._groups(options, missing)
    assert [[cell.name for cell in group] for group in groups] == [
        ["mnist-0-0", "mnist-1-0", "mnist-2-0"],
        *([f"mnist-{c}-0-pca"] for c in (0, 1, 2)),
        ["mnist-0-1", "mnist-2-1"],
        *([f"mnist-{c}-1-pca"] for c in (0, 2)),
    ]
    told = cells.arguments(groups[-3])
    assert told == ("--dataset", "mnist", "--cell", "0,2", "1", "alps")
    # One stack at a time; what is no stack need not wait for it.
    assert paper._ready(options, groups[1:], {}) is groups[1]
    assert paper._ready(options, groups[4:], {None: groups[0]}) is groups[5]
    assert paper._ready(options, groups[4:5], {None: groups[0]}) is None
    assert paper._groups(argparse.Namespace(stack=False), missing) == [[cell] for cell in missing]


def test_table_names_what_is_missing(finished, capsys) -> None:
    _, options = finished
    assert paper.main([*options, "--print-only", "--classes", "3", "4", "--table", "3"]) == 0
    text = capsys.readouterr().out
    assert "Missing cells: mnist-3-0-none, mnist-4-0-none, mnist-3-0-noise" in text
    plain = next(line for line in text.splitlines() if line.startswith("| plain"))
    assert plain == "| plain autoencoder | - | - | - | - | 0 |"


def test_table_means_and_spread(tmp_path) -> None:
    for c, seed, area in ((0, 0, 0.9), (0, 1, 0.8), (1, 0, 0.7), (1, 1, 0.6)):
        record = {"auroc": dict.fromkeys(("reported", "ours"), area)}
        path = Cell("mnist", c, seed, "none").path(tmp_path, "paper")
        path.write_text(json.dumps(record))
    lines = tables.table("mnist", "paper", ["none"], [0, 1], [0, 1], tmp_path)
    assert lines[2] == "| paper's ALPS | 99.68 | 99.92 | 99.80 |  |  |"
    assert lines[3] == "| plain autoencoder | 85.00 | 65.00 | 75.00 | 7.07 | 2 |"
    lines = tables.table("mnist", "paper", ["none"], range(10), [0, 1], tmp_path)
    assert lines[3] == "| paper's plain autoencoder " + "|  " * 10 + "| 95.42 |  |  |"
    assert lines[4].startswith("| plain autoencoder | 85.00 | 65.00 | - |")


def test_summary_has_both_protocols(tmp_path, capsys) -> None:
    for method, area in (("alps", 0.9), ("pca", 0.5)):
        for protocol, less in (("paper", 0.0), ("strict", 0.2)):
            for c in (0, 1):
                kinds = {"reported": area - less, "normal": area - less - 0.05, "ours": 0.95 - less}
                path = Cell("mnist", c, 0, method).path(tmp_path, protocol)
                path.write_text(json.dumps({"auroc": kinds}))
    options = ["--summary", "--classes", "0", "1", "--seeds", "1", "--results", str(tmp_path)]
    assert paper.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| ALPS, `paper` | 90.00 | 90.00 | 90.00 | 1 |" in lines
    assert "| ours, `strict` | 75.00 | 75.00 | 75.00 | 1 |" in lines
    assert "| ALPS | 97.65 | 90.00 | 95.00 | 65.00 | 75.00 | 1 |" in lines
    assert "| PCA |  | 50.00 | 95.00 | 25.00 | 75.00 | 1 |" in lines
    # No cells, no row.
    assert "OCSVM" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--summary", "--table", "2"], "--summary"),
        (["--classes", "10"], "expected 0 to 9"),
        (["--seeds", "0"], "from 1 up"),
        (["--table", "7"], "--table"),
        (["--dataset", "cats"], "--dataset"),
        (["--table", "2", "--stack"], "--stack"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    done = subprocess.run(
        [sys.executable, paper.__file__, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def street_cells(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder in which both variants of table II were run on a small street."""
    folder = tmp_path_factory.mktemp("table2")
    write_street(folder, torch.Generator().manual_seed(6))
    options = ["--table", "2", "--seeds", "1", "--quick", "--root", str(folder)]
    options += ["--results", str(folder / "results"), "--scratch", str(folder / "scratch")]
    assert paper.main(options) == 0
    return folder, options


@pytest.mark.parametrize("variant", video.VARIANTS)
def test_video_figures_follow_from_the_scores(street_cells, variant) -> None:
    folder, _ = street_cells
    record = cells.read(video.VideoCell(variant, 0), folder / "results", "strict")
    rows = rows_of(folder / "scratch" / f"ucsd-ped2-{variant}-0" / "scores-strict.csv")
    # The quick run tests the first clip only.
    assert len(rows) == FRAMES
    labels = [int(row["anomalous"]) for row in rows]
    figures = record["metrics"]
    for entry, level, reduce in (
        ("normal", "micro", "max"),
        ("average", "micro", "max"),
        ("motion_baseline", "micro", "max"),
        ("ours", "micro_smooth21", "topk"),
    ):
        kept = "all" if entry == "motion_baseline" else "gated"
        expected = figures[entry]["frame"][level][reduce][kept]["auroc"]
        assert metrics.auroc([float(row[entry]) for row in rows], labels) == expected, entry
    ours = record["ours"]
    assert figures["ours"]["rules"]["stride"] == [ours["stride"]] * 2
    assert figures["ours"]["rules"]["top_k"] == ours["top_k"]
    assert figures["ours"] == figures[f"ours_{ours['kind']}"]
    # What is chosen ranks rehearsed anomalies best.
    options = {
        (stride, name): area
        for stride in video.STRIDES
        for name, area in record["rehearsal"][f"stride {stride}, 2x"].items()
        if name.startswith("relative_")
    }
    chosen = (ours["stride"], f"relative_{ours['kind']}, top {ours['top_k']}")
    assert options[chosen] == max(options.values())
    assert figures["average"]["rules"]["stride"] == [30, 30]


def test_video_table_and_figure(street_cells, capfd) -> None:
    folder, options = street_cells
    assert paper.main([*options, "--seeds", "2", "--print-only"]) == 0
    text = capfd.readouterr().out
    assert "Missing cells: ucsd-ped2-gray-1, ucsd-ped2-motion-1." in text
    picture = folder / "results" / "figure-4-ucsd-ped2.png"
    assert str(picture) in text and picture.read_bytes().startswith(b"\x89PNG")


def test_rehearsal_ranks_what_sees_speed(rng) -> None:
    shape = (12, 96)
    kept = torch.rand(shape, generator=rng) < 0.3
    kept[:, 0] = True
    slow = torch.rand(shape, generator=rng) * kept
    fast_kept = kept[::2]
    seen = (slow[::2] + 5) * fast_kept
    blind = torch.rand(fast_kept.shape, generator=rng) * fast_kept
    pairs = [
        [
            ({"sees": slow, "blind": slow}, kept),
            ({"sees": seen, "blind": blind}, fast_kept),
        ]
    ]
    found = rehearsal.figures(pairs, 2, 30, 30, (240, 360))
    assert found["sees, top 1"] == found["sees, top 3"] == 1
    assert found["blind, top 1"] < 0.8


def test_a_failed_cell_is_told(tmp_path, capfd) -> None:
    options = ["--classes", "1", "--seeds", "1", "--methods", "pca", "--root", str(tmp_path)]
    options += ["--results", str(tmp_path / "r"), "--scratch", str(tmp_path / "s")]
    assert paper.main(options) == 1
    captured = capfd.readouterr()
    assert "mnist-1-0-pca: failed" in captured.out
    assert "Traceback" not in captured.err and "needs the file" in captured.err


@pytest.mark.parametrize("method", recipes.BASELINES)
def test_baselines_rank_what_is_far_from_training_highest(rng, method) -> None:
    train = torch.randint(0, 20, (200, 1, 8, 8), generator=rng, dtype=torch.uint8)
    near = torch.randint(0, 20, (50, 1, 8, 8), generator=rng, dtype=torch.uint8)
    far = torch.randint(0, 256, (50, 1, 8, 8), generator=rng, dtype=torch.uint8)
    found = baselines.scores(method, train, torch.cat([near, far]), seed=0)
    assert {"normal"} <= set(found) <= {"normal", "smoothed_normal"}
    for scores in found.values():
        assert scores.shape == (100,) and scores.dtype == torch.float32
        assert scores[50:].min() > scores[:50].max()
