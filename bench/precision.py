"""What bf16 and int8 do to scores, on trained weights.

Trains a network for a few epochs on one class of MNIST, and one on what moves in UCSD Ped2 (patches
of change since the frame before), then scores the test images, or every patch of every 20th test
frame, in each precision: the relative error against float64, the AUROC and how far it moved from
fp32. Errors do not depend on which instructions compute them but for rounding.

With --device cuda it trains nothing: the pretrained networks score MNIST's test images and every
patch of every 20th test frame of Ped2 on the GPU, in fp32 layer by layer and in bf16 as the scorer
has it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A checkout needs no installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import fastalps
from bench.command_line import Parser, guarded
from bench.data import DATA, HELP
from fastalps import metrics, ops, protocols
from fastalps.data import load_images, load_ucsd, motion_frames, moving_patches
from fastalps.data.idx import read_idx
from fastalps.engine import Engine
from fastalps.environment import result_record
from fastalps.errors import UserError
from fastalps.files import write_json
from fastalps.models import PRESETS
from fastalps.quantization import quantize

PATCH = 30
EVERY = 20  # frames: neighbours are almost the same
QUANTILES = (0.5, 0.99, 1.0)
SCORES = ("normal", "perturbed", "average")


def _mnist(root: Path, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """(normal training images, test images, labels)."""
    data = load_images("mnist", root, normal_class=2, protocol="strict")
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:images]
    return data.train, data.test[order], data.test_labels[order]


def _ped2(root: Path, images: int) -> tuple[Tensor, Tensor, Tensor]:
    folder = root / "UCSDped2"
    gate = fastalps.MotionGate(3.0, torch.zeros(240, 360, dtype=torch.uint8))
    normal = [
        fastalps.data.Clip(clip.name, motion_frames(clip.frames), None, None)
        for clip in load_ucsd(folder, "ped2", "train")
    ]
    return moving_patches(normal, PATCH, gate), *ped2_test(root)


def ped2_test(root: Path) -> tuple[Tensor, Tensor]:
    """(patches of change, labels), of every EVERYth frame."""
    patches, labels = [], []
    for clip in load_ucsd(root / "UCSDped2", "ped2", "test"):
        part = slice(1, None, EVERY)
        tiles = ops.tile_patches(motion_frames(clip.frames)[part], PATCH, scale=1.0)
        patches.append(tiles.to(torch.uint8).flatten(0, 1))
        labels.append(protocols.patch_labels(clip.masks[part], PATCH).flatten())
    images, marks = torch.cat(patches), torch.cat(labels)
    sure = marks >= 0
    return images[sure], marks[sure] == 1


def mnist_test(root: Path) -> tuple[Tensor, Tensor]:
    """(test images, which are not zeros)."""
    images, digits = (
        torch.from_numpy(read_idx(root / "mnist" / f"t10k-{name}-ubyte.gz", dimensions))
        for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1))
    )
    return images[:, None], digits != 0


# Data of each pretrained network: the root of the data sets to (images, labels).
PRETRAINED = {"mnist-0": mnist_test, "ucsd-ped2-motion": ped2_test}


def exact_errors(model: fastalps.ALPS, images: Tensor) -> Tensor:
    """(2, N) float64: normal and perturbed, of uint8 images."""
    # Smoothing is the model's, not the peer's.
    network = copy.deepcopy(model).double().eval()
    with torch.inference_mode():
        return torch.cat(
            [torch.stack(network.score(part.double() / 255)[:2]) for part in images.split(256)], 1
        )


def _compare(model: fastalps.ALPS, train: Tensor, images: Tensor, labels: Tensor) -> dict[str, Any]:
    exact = exact_errors(model, images)
    model.quantization = quantize(model, train)
    rows: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "int8"):
        engine = Engine(model, precision=precision, ranges=model.quantization.ranges)
        rows[precision] = row(engine.errors(images, "both"), exact, labels, rows.get("fp32"))
        if precision != "fp32":
            agreement = model.quantization.agreement[precision]
            rows[precision]["normal_images"] = vars(agreement) | {"close": agreement.close}
    return rows


def compare_pretrained(
    device: str, model: fastalps.ALPS, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Each precision that the device has: `relative_error` to float64 by quantile, `auroc` of each
    score, how far it `moved` from fp32, and the scorer's `method`."""
    exact = exact_errors(model, images)
    rows: dict[str, Any] = {}
    for precision in ("fp32", "bf16", "int8")[: 3 if device == "cpu" else 2]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of emulated instructions
            scorer = fastalps.Scorer(model, precision=precision, device=device)
        errors = torch.stack(scorer.scores_images(images)[:2])
        rows[precision] = row(errors, exact, labels, rows.get("fp32"))
        rows[precision]["method"] = scorer.method
    return rows


def row(
    errors: Tensor, exact: Tensor, labels: Tensor, whole: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Of (2, N) errors: `relative_error` to the `exact` ones by quantile, `auroc` of each score,
    and how far it `moved` from `whole`, the row of fp32 (None for that itself)."""
    away = ((errors.double() - exact).abs() / exact).flatten()
    kinds = dict(zip(SCORES, (*errors, errors.mean(0)), strict=True))
    found: dict[str, Any] = {
        "relative_error": {str(q): _quantile(away, q) for q in QUANTILES},
        "auroc": {kind: metrics.auroc(values, labels) for kind, values in kinds.items()},
    }
    if whole is not None:
        found["moved"] = {kind: found["auroc"][kind] - whole["auroc"][kind] for kind in SCORES}
    return found


def _quantile(values: Tensor, q: float) -> float:
    # torch.quantile refuses more than 16 million values.
    return float(values.sort().values[round(q * (len(values) - 1))])


def print_rows(name: str, rows: dict[str, Any]) -> None:
    """A line for each precision."""
    print(
        f"{name}: relative error against float64 (median, 99%, largest); AUROC in %, points moved"
    )
    for precision, found in rows.items():
        errors = ", ".join(f"{value:.1e}" for value in found["relative_error"].values())
        areas = ", ".join(f"{kind} {100 * found['auroc'][kind]:.2f}" for kind in SCORES)
        text = f"  {precision}: {errors}; {areas}"
        if "moved" in found:
            moved = ", ".join(f"{100 * found['moved'][kind]:+.3f}" for kind in SCORES)
            text += f" ({moved})"
        if "method" in found:
            text += f"; {found['method']}"
        if "normal_images" in found:
            images = found["normal_images"]
            text += "; held-out normal images: rank correlation "
            text += f"{images['correlation']:.5f}, median difference {images['difference']:.1e}, "
            text += f'{"" if images["close"] else "not "}near enough for precision="auto"'
        print(text, flush=True)


def _pretrained(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use cpu")
    results = {}
    for name, load in PRETRAINED.items():
        model = fastalps.load_pretrained(name)
        results[name] = compare_pretrained(options.device, model, *load(options.root))
        print_rows(name, results[name])
    if options.out is not None:
        write_json(options.out, result_record("precision", results, seed=None, device="cuda"))
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        return _pretrained(options)
    torch.set_num_threads(options.threads)
    results = {}
    for name, load in (("MNIST, class 2", _mnist), ("UCSD Ped2, change", _ped2)):
        train, images, labels = load(options.root, options.images)
        size = (int(train.shape[2]), int(train.shape[3]))
        torch.manual_seed(0)
        model = fastalps.ALPS(size, preset=options.preset)
        config = fastalps.TrainConfig(
            epochs=options.epochs, batch_size=32, schedule="cosine", average_decay=0.998,
            distorter_every=2, device="cpu", seed=0,
        )  # fmt: skip
        begin = time.perf_counter()
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        fitted = fastalps.Trainer(config, progress=False).fit(model, train[order[:6000]])
        print(f"trained in {time.perf_counter() - begin:.0f} s; {len(images)} test images")
        results[name] = _compare(fitted.model, train, images, labels)
        print_rows(name, results[name])
    if options.out is not None:
        record = result_record(
            "precision", results, seed=0, preset=options.preset, epochs=options.epochs
        )
        write_json(options.out, record)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = Parser(
        prog="bench/precision.py",
        description=__doc__,
    )
    parser.add_argument(
        "--preset", default="fast", choices=tuple(PRESETS), help="the network (default: fast)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of the trainings (default: 3)")
    parser.add_argument("--images", type=int, default=4000, help="of MNIST's test (default: 4000)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where scores are computed"
    )
    parser.add_argument("--threads", type=int, default=1, help="of this process (default: 1)")
    parser.add_argument("--root", type=Path, default=DATA, help=HELP)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there")
    return guarded(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
