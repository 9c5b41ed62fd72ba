"""The commands on images: what they write, how they resume, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastalps
from fastalps import metrics
from fastalps.cli import command, demo, export, run_folder, score, train
from fastalps.training.trainer import CHECKPOINT
from tests.commands import error_of, rows_of
from tests.images import bytes_of, save

QUICK = ["--preset", "fast", "--latent", "4", "--epochs", "3", "--batch-size", "32"]
DIGITS = ["--dataset", "digits", "--normal-class", "3", *QUICK]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "three"
    assert train.main([*DIGITS, "--out", str(folder)]) == 0
    return folder


def test_run_folder(run) -> None:
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    pictures = {f"figures/{n}.png" for n in ("losses", "roc", "histogram", "reconstructions")}
    files = {"model.safetensors", "config.yaml", "history.csv", "metrics.json", "scores.csv"}
    assert names == files | pictures | {CHECKPOINT}
    for name in pictures:
        with Image.open(run / name) as picture:
            assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 5


def test_figures_follow_from_the_scores(run) -> None:
    record = json.loads((run / "metrics.json").read_text())
    rows = rows_of(run / "scores.csv")
    labels = np.array([int(row["anomalous"]) for row in rows])
    assert len(rows) == record["metrics"]["average"]["count"] > 300
    for kind in ("normal", "perturbed", "average"):
        scores = np.array([float(row[kind]) for row in rows])
        assert metrics.auroc(scores, labels) == record["metrics"][kind]["auroc"]
    calibration = record["calibration"]
    chosen = np.array([float(row[calibration["score"]]) for row in rows])
    flagged = np.array([int(row["flagged"]) for row in rows])
    np.testing.assert_array_equal(flagged, chosen > calibration["threshold"])
    assert record["chosen_score"] == calibration["score"]
    assert record["environment"]["libraries"]["torch"] == torch.__version__
    assert fastalps.load(run / "model.safetensors").calibration.threshold == pytest.approx(
        calibration["threshold"]
    )


def test_same_configuration_same_run(run, tmp_path) -> None:
    again = tmp_path / "again"
    assert train.main(["--config", str(run / "config.yaml"), "--out", str(again)]) == 0
    assert (again / "scores.csv").read_text() == (run / "scores.csv").read_text()
    assert (again / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_resume_is_bit_for_bit(run, tmp_path) -> None:
    short = tmp_path / "short"
    begun = [*DIGITS, "--epochs", "2", "--out", str(short)]
    assert train.main(begun) == 0
    assert train.main(["--resume", "--out", str(short), "--epochs", "3"]) == 0
    assert (short / "scores.csv").read_text() == (run / "scores.csv").read_text()


def test_a_run_is_never_overwritten(run, capsys) -> None:
    before = (run / "metrics.json").read_bytes()
    assert train.main([*DIGITS, "--out", str(run)]) == 2
    assert "already holds a run" in error_of(capsys)
    assert (run / "metrics.json").read_bytes() == before


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(run, tmp_path, capsys) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    assert train.main([*DIGITS, "--resume", "--out", str(folder)]) == 2
    assert "leave --resume out" in error_of(capsys)
    assert train.main([*DIGITS, "--out", str(folder)]) == 0
    assert (folder / "scores.csv").read_text() == (run / "scores.csv").read_text()


@pytest.mark.skipif(os.name == "nt", reason="there is no flock")
def test_a_run_in_use_is_left_alone(run, tmp_path, capsys) -> None:
    folder = tmp_path / "used"
    shutil.copytree(run, folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with run_folder.locked(folder):
        assert train.main(["--resume", "--out", str(folder), "--epochs", "4"]) == 2
        assert f"{folder} is in use by another process" in error_of(capsys)
    after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before
    with run_folder.locked(tmp_path / "new"):
        assert train.main([*DIGITS, "--out", str(tmp_path / "new")]) == 2
        assert "is in use by another process" in error_of(capsys)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="there is no flock")
def test_of_two_runs_started_together_one_goes_on(run, tmp_path) -> None:
    folder = tmp_path / "one"
    command = [sys.executable, "-m", "fastalps.cli.train", *DIGITS, "--out", str(folder)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2]
    (error,) = [line for text in said for line in text.splitlines() if ": error: " in line]
    assert "is in use by another process" in error or "already holds a run" in error
    # Other processes may have other numbers of threads, and last digits.
    found, expected = (
        [line.split(",") for line in (path / "scores.csv").read_text().splitlines()[1:]]
        for path in (folder, run)
    )
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert [float(x) for x in row[2:5]] == pytest.approx(
            [float(x) for x in other[2:5]], rel=1e-4
        )


def test_a_run_that_came_meanwhile_is_not_overwritten(run, tmp_path, capsys, monkeypatch) -> None:
    load = train._load

    def slow(*options):
        (tmp_path / CHECKPOINT).write_bytes((run / CHECKPOINT).read_bytes())
        return load(*options)

    monkeypatch.setattr(train, "_load", slow)
    assert train.main([*DIGITS, "--out", str(tmp_path)]) == 2
    assert "already holds a run" in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_lock_that_a_crash_left_is_none(tmp_path) -> None:
    (tmp_path / ".lock").touch()
    assert train.main([*DIGITS, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / ".lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_interrupt_while_importing_ends_with_130(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", "from fastalps.cli import entry; exit(entry.score())"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "fastalps-score: stopped\n"


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_interrupt_ends_with_130_and_a_run_that_resumes(run, tmp_path) -> None:
    folder = tmp_path / "cut"
    options = [*DIGITS, "--epochs", "100000", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastalps.cli.train", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A test run in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    history = folder / "history.csv"
    deadline = time.monotonic() + 120
    while not history.exists() or len(rows_of(history)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == command.INTERRUPTED
    assert "stopped" in errors and "--resume" in errors and "Traceback" not in errors
    # Nothing unfinished lies about, under a final name or another.
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "history.csv", CHECKPOINT}
    epochs = len(rows_of(history))
    assert train.main(["--resume", "--out", str(folder), "--epochs", str(epochs + 1)]) == 0
    assert len(rows_of(history)) == epochs + 1


def test_score_images(run, tmp_path, capsys) -> None:
    data = fastalps.data.load_images("digits", normal_class=3)
    images = tmp_path / "images"
    for i in range(12):
        save(images / f"{i}.png", data.test[i, 0].numpy())
    (images / ".DS_Store").write_bytes(b"x")
    out = tmp_path / "scored"
    # Where a processor has the instructions, auto is int8 or bf16.
    assert score.main([str(run), str(images), "--out", str(out), "--precision", "fp32"]) == 0
    expected = rows_of(run / "scores.csv")
    kind = json.loads((run / "metrics.json").read_text())["chosen_score"]
    for row, wanted in zip(rows_of(out / "scores.csv"), expected, strict=False):
        assert float(row["score"]) == pytest.approx(float(wanted[kind]), rel=1e-4)
        assert row["flagged"] == wanted["flagged"]
    assert {p.name for p in out.iterdir()} == {"scores.csv", "timeline.png", "summary.json"}
    summary = json.loads((out / "summary.json").read_text())["metrics"]
    assert summary["images"] == 12 and "held-out normal images" in summary["threshold_means"]
    assert "images/s" in capsys.readouterr().out
    # In the folder of results of a video, none of them stays; inside of the input they would be
    # taken for images.
    for name in ("report.html", "scores.jsonl", "annotated.partial.mp4", "mine.html"):
        (out / name).write_text("x")
    assert score.main([str(run), str(images), "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        *("scores.csv", "timeline.png", "summary.json", "mine.html")
    }
    for inside in (images, images / "scored"):
        assert score.main([str(run), str(images), "--out", str(inside)]) == 2
        assert "--out must lie outside of the input" in error_of(capsys)
    assert len(list(images.iterdir())) == 13
    # One image, by the file of the model, with a threshold of one's own.
    lone = [str(run / "model.safetensors"), str(images / "3.png"), "--out", str(tmp_path / "one")]
    assert score.main([*lone, "--threshold", "0"]) == 0
    assert [row["flagged"] for row in rows_of(tmp_path / "one" / "scores.csv")] == ["1"]


def test_folder_of_images(tmp_path, rng) -> None:
    for name, low in (("good", 0), ("bad", 180)):
        for i, image in enumerate(bytes_of((30, 12, 10), rng, 70)):
            save(tmp_path / name / f"{i}.png", image + np.uint8(low))
    base = ["--dataset", "folder", "--root", str(tmp_path), *QUICK, "--target-fpr", "0.2"]
    assert train.main([*base, "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["model"]["image_size"] == [12, 10]
    assert record["metrics"]["reported"]["auroc"] > 0.9
    # Without anomalies there is nothing to compare with, yet a model and a threshold.
    for path in (tmp_path / "bad").iterdir():
        path.unlink()
    (tmp_path / "bad").rmdir()
    alone = [*base, "--protocol", "strict", "--image-size", "8", "--out", str(tmp_path / "alone")]
    assert train.main(alone) == 0
    record = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert record["metrics"]["reported"]["auroc"] is None
    assert record["metrics"]["threshold"]["false_positive_rate"] is not None


def test_images_that_the_memory_cannot_hold(tmp_path, rng, capsys) -> None:
    for name in ("good", "bad"):
        for i, image in enumerate(bytes_of((6, 8, 8), rng)):
            save(tmp_path / name / f"{i}.png", image)
    out = tmp_path / "run"
    base = ["--dataset", "folder", "--root", str(tmp_path), "--out", str(out)]
    for size in ("1000000", "9" * 400):
        assert train.main([*base, "--image-size", size]) == 2
        assert "decoded, the 12 images take" in error_of(capsys) and not out.exists()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(2**60, dtype=np.uint8),
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: bytearray(2**60),
    ],
)
def test_too_little_memory_is_told_in_one_line(capsys, allocate) -> None:
    assert command.run("x", lambda _: allocate(), []) == 2
    assert "the machine has too little memory" in error_of(capsys)


def test_demo(tmp_path, capsys, monkeypatch) -> None:
    def brief(arguments):
        train.train([*arguments, "--epochs", "2"])

    monkeypatch.setattr(demo, "train", brief)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".lock").touch()  # Of a crash before the first checkpoint.
    monkeypatch.setattr(demo, "SCORED_IMAGES", 400)
    for _ in range(2):
        assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    assert "AUROC" in capsys.readouterr().out
    assert (tmp_path / "demo-2" / "figures" / "roc.png").exists()
    assert not (tmp_path / "demo-3").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digits"], "choose the normal class"),
        (["--dataset", "digits", "--normal-class", "ten"], "has no class 'ten'"),
        (["--dataset", "cats"], "dataset must be one of digits"),
        (["--dataset", "mnist"], "needs root"),
        (["--dataset", "ucsd-ped2"], "needs --root"),
        (["--dataset", "mnist", "--normal-class", "1", "--root", "nowhere"], "needs the file"),
        ([*DIGITS, "--preset", "huge"], "preset: expected one of paper"),
        ([*DIGITS, "--epochs", "none"], "epochs"),
        ([*DIGITS, "--epochs", "0"], "epochs: expected an integer of at least 1"),
        ([*DIGITS, "--batch-size", "1"], "batch_size: expected at least 2, which batch norm needs"),
        ([*DIGITS, "--epoch", "1"], "--epoch"),
        ([*DIGITS, "--latent", "100000000000"], "latent must be at most 65536, got 100000000000"),
        ([*DIGITS, "--encoder", "[8,8,1000000]"], "encoder must be at most 65536, got 1000000"),
        ([*DIGITS, "--target-fpr", "2"], "target_fpr must be between 0 and 1"),
        ([*DIGITS, "--frame-reduce", "median"], "frame_reduce must be one of max, mean, topk"),
        ([*DIGITS, "--top-k", "0"], "top_k must be a number of patches from 1 up, got 0"),
        ([*DIGITS, "--device", "cuda:99"], "device: cuda:99 is not here"),
        ([*DIGITS, "--select", "auroc", "--protocol", "strict"], "needs anomalies"),
        ([*DIGITS, "--resume"], "holds no run to resume"),
        ([*DIGITS, "--config", "absent.yaml"], "absent.yaml"),
        (["--dataset", "folder", "--root", "nowhere"], "nowhere"),
        (["--dataset", "folder", "--root", ".", "--normal-class", "1"], "does not apply"),
    ],
)
def test_bad_training(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, "--out", "run"]) == 2
    assert message in error_of(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--print-config", "--print_config", "--print-config="])
def test_print_config(capsys, flag: str) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([*DIGITS, flag])
    assert stop.value.code == 0
    assert "latent: 4\n" in capsys.readouterr().out


def test_names_of_files_are_no_formulas_and_any_bytes(run, tmp_path, rng) -> None:
    names = ["a$_$b.png", "$\\bad$.png", os.fsdecode(b"caf\xe9.png")]
    folder = tmp_path / "in $_$"
    folder.mkdir()
    for name in names:
        try:
            save(folder / name, bytes_of((8, 8), rng))
        except OSError:  # A file system that wants UTF-8.
            names.remove(name)
    out = tmp_path / "out"
    assert score.main([str(run), str(folder), "--out", str(out)]) == 0
    written = {row["image"] for row in rows_of(out / "scores.csv")}
    assert {"a$_$b.png", "$\\bad$.png"} <= written and len(written) == len(names)


def test_only_files_are_replaced(run, tmp_path, capsys) -> None:
    fifo = tmp_path / "out.pt2"
    os.mkfifo(fifo)
    assert export.main([str(run), "--format", "pt2", "--out", str(fifo)]) == 2
    assert "it is no ordinary file; give another name" in error_of(capsys)
    assert fifo.is_fifo()


def test_unknown_devices(run, tmp_path, capsys) -> None:
    for name in ("gpu", "mps", "cuda:x"):
        arguments = [str(run), str(tmp_path), "--out", str(tmp_path / "out"), "--device", name]
        assert score.main(arguments) == 2
        assert f"expected auto, cpu or cuda[:n], got '{name}'" in error_of(capsys)


def test_no_output_folder(tmp_path, capsys) -> None:
    assert train.main(DIGITS) == 2
    assert "out" in error_of(capsys)
    (tmp_path / "file").write_text("x")
    assert train.main([*DIGITS, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot create the folder" in error_of(capsys)


def test_broken_configuration(tmp_path, capsys) -> None:
    for content, message in (
        (b"epochs: [1\n", "config"),
        (b"epoch: 1\n", "'epoch' is not accepted"),
        (b"root: \xc1\n", f"expected YAML in UTF-8, but {tmp_path / 'bad.yaml'} holds other bytes"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        arguments = ["--config", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "run")]
        assert train.main(arguments) == 2
        assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, run: ["absent", "x"], "there is no run absent"),
        (lambda folder, run: [str(folder), "x"], "holds no model.safetensors"),
        (lambda folder, run: [str(run), "absent"], "does not exist"),
        (lambda folder, run: [str(run), str(folder)], "no images"),
        (lambda folder, run: [str(foreign(folder)), "x"], "not a readable safetensors file"),
        (lambda folder, run: [str(run / CHECKPOINT), "x"], "expected a fastalps-model file"),
        (lambda folder, run: [str(run), str(truncated(folder))], "cut.png"),
        (lambda folder, run: [str(run), "x", "--precision", "fp7"], "precision must be one of"),
        (lambda folder, run: [str(run), "x", "--device", "cuda:99"], "cuda:99"),
        (
            lambda folder, run: [str(run), "x", "--threshold", "nan"],
            "threshold: Expected a <class 'float'> or null. Got value: nan",
        ),
    ],
)
def test_bad_scoring(run, tmp_path, capsys, make, message) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    assert score.main([*make(source, run), "--out", str(out)]) == 2
    assert message in error_of(capsys)
    assert not out.exists() or not list(out.iterdir())


def foreign(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(b"\x80\x04not a model")
    return path


def truncated(folder: Path) -> Path:
    save(folder / "whole.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    content = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write")
def test_read_only_folder(tmp_path, capsys) -> None:
    tmp_path.chmod(0o500)
    assert train.main([*DIGITS, "--out", str(tmp_path / "run")]) == 2
    assert "cannot create the folder" in error_of(capsys)


def test_full_disk(tmp_path, capsys, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert train.main([*DIGITS, "--out", str(tmp_path / "run")]) == 2
    assert "No space left on device" in error_of(capsys)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("module", ["train", "score", "demo"])
def test_help_teaches(module) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"fastalps.cli.{module}", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--out" in done.stdout and not done.stderr
