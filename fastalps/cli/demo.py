"""``make demo``: ALPS trained and tested on real digits that are there on every machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fastalps
from fastalps.cli import command, run_folder
from fastalps.cli.options import make_parser, parse
from fastalps.cli.train import train
from fastalps.data import load_images

NAME = "fastalps-demo"
NORMAL_CLASS = "8"
USAGE = "python -m fastalps.cli.demo [--out RUN]"
DESCRIPTION = """Trains and tests ALPS on scikit-learn's digits (1,797 real images of 8x8 pixels):
one digit is normal, the others are not. `make demo` runs it."""
SHADES = " .:-=+*#%@"
SCORED_IMAGES = 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code, see `fastalps.cli.command.run`."""
    return command.run(NAME, demo, arguments)


def demo(arguments: Sequence[str]) -> None:
    """Trains into a new folder, shows what the errors look like, and times scoring."""
    parser = make_parser(NAME, DESCRIPTION, USAGE)
    parser.add_argument(
        "--out",
        default="runs/demo",
        help="the run's folder; another number is added where it is taken",
    )
    out = _unused(Path(parse(parser, arguments).out))
    print(f"One digit, {NORMAL_CLASS}, is normal: the model sees no other in training.\n")
    train(
        [
            *("--dataset", "digits", "--normal-class", NORMAL_CLASS, "--out", str(out)),
            *("--preset", "fast", "--epochs", "60", "--batch-size", "32"),
            *("--average-decay", "0.98", "--checkpoint-every", "20"),
            *("--target-fpr", "0.05", "--protocol", "strict"),
        ]
    )
    model = fastalps.load(out / run_folder.MODEL)
    assert model.calibration is not None
    scorer = fastalps.Scorer(model, model.calibration.score)
    data = load_images("digits", normal_class=NORMAL_CLASS)
    scores = scorer.score_images(data.test)
    _show(model, data.test, data.test_labels, scores, model.calibration.threshold)

    repeats = -(-SCORED_IMAGES // len(data.test))
    many = data.test.repeat(repeats, 1, 1, 1)
    begin = time.perf_counter()
    scorer.score_images(many)
    rate = len(many) / (time.perf_counter() - begin)
    how = {"engine": "whole-network engine", "layers": "layer by layer"}[scorer.method]
    record = json.loads((out / run_folder.METRICS).read_text(encoding="utf-8"))
    print(
        f"\nAUROC {100 * record['metrics']['reported']['auroc']:.2f}%: a random other digit scores "
        f"above a random {NORMAL_CLASS} that often."
        f"\nSpeed: {rate:,.0f} images/s, uint8 pixels to scores ({how}, {scorer.precision}, "
        f"{torch.get_num_threads()} threads, {len(many):,} images)."
        f"\nPictures: {out / run_folder.FIGURES} (roc, histogram, reconstructions, losses)."
    )


def _unused(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that holds nothing: no run is lost."""
    number, free = 1, folder
    while free.exists() and any(path.name != run_folder.LOCK for path in free.iterdir()):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _show(
    model: fastalps.ALPS,
    images: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor,
    threshold: float,
) -> None:
    """A normal and an anomalous test image with their reconstructions, as text."""
    middle = [
        int(index[scores[index].argsort()[len(index) // 2]])
        for index in ((~labels).nonzero().flatten(), labels.nonzero().flatten())
    ]
    pixels = images[middle].float() / 255
    rebuilt = model(pixels).perturbed_reconstruction.detach()
    print("\nA typical normal and a typical anomalous test image, each beside its reconstruction")
    print("from the perturbed latent:\n")
    for row in range(pixels.shape[2]):
        parts = [_line(picture[i, 0, row]) for i in (0, 1) for picture in (pixels, rebuilt)]
        print("    " + "   ".join(parts[:2]) + "          " + "   ".join(parts[2:]))
    texts = [
        f"score {float(scores[i]):.4f} ({'flagged' if scores[i] > threshold else 'not flagged'})"
        for i in middle
    ]
    print(f"    {texts[0]:<45}{texts[1]}")


def _line(values: torch.Tensor) -> str:
    steps = (values * (len(SHADES) - 1)).round().long().clamp(0, len(SHADES) - 1)
    return "".join(2 * SHADES[step] for step in steps)


if __name__ == "__main__":
    sys.exit(main())
