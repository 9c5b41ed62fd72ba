"""How much detection the width of each part is worth: AUROC against FLOPs.

Trains networks of several widths by the recipe of bench/paper.py on the training images of one
class but 500, and ranks those 500 among 4,500 training images of other classes, as bench/trial.py
does: no test image is seen. Keeps each network's figures as JSON; runs that were stopped go on.
Draws the AUROC of the normal score, and of the one relative to contrast, over the FLOPs of both
scores and of the normal score alone, which needs neither the distorter nor the second decoding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fastalps
from bench.command_line import Parser, guarded
from bench.data import DATA, HELP
from bench.quality.kinds import all_kinds, measured
from bench.quality.recipes import RECIPES
from bench.trial import trial_data
from fastalps import metrics
from fastalps.environment import result_record
from fastalps.errors import UserError
from fastalps.files import make_folder, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality" / "widths"

PAPER = {"encoder": (32, 64, 128), "decoder": (256, 128, 64, 32, 16, 16)}
FAST = {"encoder": (16, 32, 64), "decoder": (96, 64, 32, 16, 8, 8)}
WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "paper": PAPER,
    "fast": FAST,
    "three quarters": {"encoder": (24, 48, 96), "decoder": (192, 96, 48, 24, 12, 12)},
    "narrow late": {"encoder": (16, 32, 64), "decoder": (160, 80, 40, 16, 4, 4)},
    "narrow late, 16": {"encoder": (16, 32, 64), "decoder": (160, 64, 48, 16, 4, 4)},
    "narrower late": {"encoder": (16, 32, 64), "decoder": (176, 88, 36, 8, 4, 4)},
    "paper, narrow late": {**PAPER, "decoder": (256, 128, 64, 16, 4, 4)},
    "wide distorter": {**FAST, "distorter": PAPER["encoder"]},
    "wide encoders": {**FAST, "encoder": PAPER["encoder"]},
    "wide decoder": {**FAST, "decoder": PAPER["decoder"]},
    "wide distorter, narrow late": {
        "encoder": (24, 48, 96),
        "distorter": PAPER["encoder"],
        "decoder": (160, 96, 48, 24, 8, 8),
    },
    "half of fast": {"encoder": (8, 16, 32), "decoder": (48, 32, 16, 8, 4, 4)},
}


def _path(dataset: str, normal_class: int, name: str) -> Path:
    return RESULTS / f"{dataset}-{normal_class}-{name.replace(', ', '-').replace(' ', '-')}.json"


def _train(dataset: str, normal_class: int, name: str, root: str) -> None:
    torch.set_num_threads(1)
    data, _ = trial_data(dataset, normal_class, root)
    recipe = RECIPES[dataset]
    torch.manual_seed(0)
    model = fastalps.ALPS(28, 1, **{**recipe.model, **WIDTHS[name]})
    config = fastalps.TrainConfig(**{**recipe.training, "seed": 0, "validate_every": 1000})
    fitted = fastalps.Trainer(config, progress=False).fit(model, data)
    model.load_state_dict(fitted.last_weights)
    kinds = all_kinds(measured(model, data.validation), data.validation, recipe.exponent)
    areas = {k: metrics.auroc(v, data.validation_labels) for k, v in kinds.items()}
    record = result_record(
        "held-out training images", {"auroc": areas}, seed=0, dataset=dataset,
        normal_class=normal_class, widths=name, model={k: list(v) for k, v in WIDTHS[name].items()},
        flops={passes: model.flops(passes) for passes in ("both", "normal")},
    )  # fmt: skip
    write_json(_path(dataset, normal_class, name), record)


def _apart(arguments: list[str]) -> int:
    """Runs this program in a process of its own: what one leaves behind does not slow the next."""
    return subprocess.run([sys.executable, __file__, *arguments], check=False).returncode


def _found(dataset: str, classes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Of the widths that all classes have: FLOPs, and mean AUROC of each kind of score in %."""
    rows: dict[str, dict[str, Any]] = {}
    for name in WIDTHS:
        paths = [_path(dataset, c, name) for c in classes]
        if not all(path.is_file() for path in paths):
            continue
        records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        kinds = records[0]["metrics"]["auroc"]
        rows[name] = dict(records[0]["flops"]) | {
            "auroc": {
                kind: 100 * sum(r["metrics"]["auroc"][kind] for r in records) / len(records)
                for kind in kinds
            }
        }
    return rows


def _print(rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"{'widths':<30}{'MFLOP':>8}{'normal only':>13}{'normal':>9}{'average':>9}{'relative':>10}"
    )
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["both"]):
        areas = row["auroc"]
        print(
            f"{name:<30}{row['both'] / 1e6:8.1f}{row['normal'] / 1e6:13.1f}"
            f"{areas['normal']:9.2f}{areas['average']:9.2f}{areas['relative_normal']:10.2f}"
        )


def _draw(rows: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    matplotlib.rcParams["svg.hashsalt"] = "fastalps"
    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    for one, passes in zip(axes, ("both", "normal"), strict=True):
        for kind, marker in (("normal", "o"), ("relative_normal", "s")):
            points = sorted(
                (row[passes] / 1e6, row["auroc"][kind], name) for name, row in rows.items()
            )
            label = "error" if kind == "normal" else "error relative to contrast"
            one.plot([p[0] for p in points], [p[1] for p in points], marker + ":", label=label)
            for x, y, name in points:
                if kind == "normal":
                    one.annotate(name, (x, y), (4, -9), textcoords="offset points", fontsize=6)
        one.margins(x=0.12)
        what = "both scores" if passes == "both" else "the normal score alone"
        one.set(xscale="log", xlabel=f"MFLOP an image, {what}")
        one.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        one.xaxis.set_minor_locator(ticker.NullLocator())
        one.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0].set_ylabel("AUROC of the normal score, %")
    axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _run(options: argparse.Namespace) -> int:
    if options.one is not None:
        _train(options.dataset, options.classes[0], options.one, str(options.root))
        return 0
    make_folder(RESULTS)
    for c in options.classes:
        for name in options.widths:
            if _path(options.dataset, c, name).is_file():
                continue
            command = ["--dataset", options.dataset, "--classes", str(c), "--one", name]
            if _apart([*command, "--root", str(options.root)]):
                raise UserError(f"{name}, class {c}: failed, see above")
            print(f"{options.dataset}[{c}] {name}: done", flush=True)
    rows = _found(options.dataset, options.classes)
    _print(rows)
    if options.figure is not None:
        numbers = ", ".join(map(str, options.classes))
        title = f"{options.dataset}, classes {numbers}: held-out training images, one seed"
        _draw(rows, options.figure, title)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/widths.py",
        description=__doc__,
    )
    parser.add_argument(
        "--dataset", default="mnist", choices=tuple(RECIPES), help="(default: mnist)"
    )
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[8, 2], choices=range(10), metavar="K",
        help="normal classes, averaged (default: 8 2, the hardest)",
    )  # fmt: skip
    parser.add_argument(
        "--widths", nargs="+", default=list(WIDTHS), choices=tuple(WIDTHS), metavar="NAME",
        help=f"of: {', '.join(WIDTHS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--root", type=Path, default=DATA, help=HELP)
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw the figure there")
    parser.add_argument("--one", choices=tuple(WIDTHS), metavar="NAME", help=argparse.SUPPRESS)
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
