"""Table II: UCSD Ped2. One cell a variant and seed, tested beside a baseline that learns nothing.

Variants: `gray`, the plain method as we read the paper (patches of pixels), and `motion` (patches
of change since the frame before, `fastalps.data.motion_frames`). What the paper does not have is
on in the row `ours` only, and named there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastalps
from bench.quality import pictures, rehearsal
from bench.quality.recipes import QUICK, VIDEO
from fastalps import ops, protocols
from fastalps.cli import plots
from fastalps.cli.run_folder import write_metrics, write_scores
from fastalps.data import Clip, load_ucsd, motion_frames
from fastalps.environment import result_record
from fastalps.files import make_folder
from fastalps.frame_scores import reduce_patches
from fastalps.gate import MotionGate, clip_background
from fastalps.models import Scores
from fastalps.relative import patch_energies, relative_errors
from fastalps.training.run import CHECKPOINT

PROTOCOL = "strict"
VARIANTS = ("gray", "motion")
# The rule of the protocol: three gray levels from the clip's median background.
GATE = MotionGate(3.0)
PATCH = 30
# Training clips held out, on which anomalies are rehearsed.
HELD_OUT = 2
SMOOTH = 21
# The rehearsal by which each cell chooses its own kind of score, stride and top patches.
SPEEDS = (2, 3)
STRIDES = (PATCH, PATCH // 2)
# Frames at a time.
CHUNK = 32


@dataclass(frozen=True)
class VideoCell:
    """What is trained and tested."""

    variant: str
    seed: int
    dataset: str = "ucsd-ped2"

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.variant}-{self.seed}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a process that runs this cell alone is told."""
        return ("--table", "2", "--cell", self.variant, str(self.seed), "alps")

    def path(self, results: Path, protocol: str = PROTOCOL) -> Path:
        """Where the result is kept; there is one protocol, in which no anomaly is seen."""
        return results / f"{self.dataset}-{PROTOCOL}-{self.variant}-{self.seed}.json"

    def done(self, results: Path) -> bool:
        return self.path(results).is_file()


@dataclass(frozen=True)
class Shown:
    """A clip as a variant shows it.

    Attributes:
        clip: as it was filmed.
        frames: uint8 (T, H, W), what patches are cut from.
        background: uint8 (H, W), of the clip.
    """

    clip: Clip
    frames: Tensor
    background: Tensor

    def kept(self, stride: int) -> Tensor:
        """bool (T, P): the patches in which something moves."""
        gate = dataclasses.replace(GATE, background=self.background)
        return gate.kept(self.clip.frames, PATCH, stride)

    def energies(self, stride: int) -> Tensor:
        return patch_energies(self.clip.frames, self.background, PATCH, stride)

    def patches(self, kept: Tensor, stride: int) -> Iterator[tuple[slice, Tensor]]:
        """The kept patches in order, float32 (K, 1, 30, 30) in [0, 1], some frames at a time."""
        for start in range(0, len(self.frames), CHUNK):
            part = slice(start, start + CHUNK)
            tiles = ops.tile_patches(self.frames[part], PATCH, stride)
            yield part, tiles[kept[part]]


@dataclass(frozen=True)
class Ours:
    """What the row `ours` adds to errors relative to contrast.

    Attributes:
        kind: of score.
        stride: of the patches.
        top_k: patches of a frame whose mean is its score.
        smooth: frames that its scores are averaged over.
    """

    kind: str
    stride: int
    top_k: int
    smooth: int = SMOOTH


def show(clip: Clip, variant: str, background: Tensor | None = None) -> Shown:
    """The clip as `variant` shows it."""
    frames = motion_frames(clip.frames) if variant == "motion" else clip.frames
    if background is None:
        background = clip_background(clip.frames, GATE.samples)
    return Shown(clip, frames, background)


def run(cell: VideoCell, root: Path, results: Path, scratch: Path, quick: bool = False) -> None:
    """Trains and tests a cell and writes its record; goes on where a stopped run was.

    Args:
        root, results, scratch, quick: see `cells.run`.

    The last epoch and the average score are fixed in advance; what `ours` adds was chosen on
    training clips. Test labels and masks are read once, after scoring.
    """
    folder = make_folder(scratch / cell.name)
    cache = folder.parent / "frames"
    train = load_ucsd(root, "ped2", "train", cache=cache)
    test = load_ucsd(root, "ped2", "test", cache=cache)
    if quick:
        train, test = [train[0], *train[-HELD_OUT:]], test[:1]
    begin = time.perf_counter()
    fitted, patches = _train(cell, train[:-HELD_OUT], folder, quick)
    seconds = time.perf_counter() - begin
    model = fitted.model
    model.load_state_dict(fitted.last_weights)
    fastalps.save(model, folder / "model.safetensors")
    scorer = fastalps.Scorer(model, "average")
    rehearsed = _rehearse(scorer, train[-HELD_OUT:], cell.variant)
    ours = _choose(rehearsed)
    begin = time.perf_counter()
    figures_found = _test(cell, scorer, test, folder, ours)
    scoring = time.perf_counter() - begin
    config = RECIPE_FIELDS | {"training_patches": patches, "held_out_clips": HELD_OUT}
    record = result_record(
        PROTOCOL,
        figures_found,
        seed=cell.seed,
        dataset=cell.dataset,
        variant=cell.variant,
        method="alps",
        score="average",
        ours=dataclasses.asdict(ours),
        rehearsal=rehearsed,
        seconds=round(seconds, 1),
        scoring_seconds=round(scoring, 1),
        threads=torch.get_num_threads(),
        quick=quick,
        model=dataclasses.asdict(model.config),
        flops_per_patch=model.flops(),
        chosen_by="fixed: the last epoch",
        **config,
    )
    make_folder(results)
    write_metrics(cell.path(results), record)


RECIPE_FIELDS: dict[str, Any] = {"training": VIDEO.training, "gate_threshold": GATE.threshold}


def _train(
    cell: VideoCell, clips: Sequence[Clip], folder: Path, quick: bool
) -> tuple[fastalps.training.FitResult, int]:
    parts = []
    for clip in clips:
        shown = show(clip, cell.variant)
        kept = shown.kept(PATCH)
        # Neighbouring frames are nearly the same: every second one trains as well.
        kept[1::2] = False
        for _, patches in shown.patches(kept, PATCH):
            parts.append((patches * 255).round().to(torch.uint8))
    images = torch.cat(parts)
    training = {**VIDEO.training, **(QUICK if quick else {}), "seed": cell.seed}
    config = fastalps.TrainConfig(**training, protocol=PROTOCOL)
    torch.manual_seed(cell.seed)
    model = fastalps.ALPS(PATCH, 1, **VIDEO.model)
    resume = (folder / CHECKPOINT).is_file()
    fitted = fastalps.Trainer(config, folder, progress=False).fit(model, images, resume)
    return fitted, len(images)


def _scores(scorer: fastalps.Scorer, shown: Shown, kept: Tensor, stride: int) -> Scores:
    """(T, P) of each kind; 0 where not kept."""
    result = Scores(*(torch.zeros(kept.shape) for _ in Scores._fields))
    for part, patches in shown.patches(kept, stride):
        found = scorer.scores_images(patches)
        for whole, values in zip(result, found, strict=True):
            whole[part][kept[part]] = values
    return result


def _test(
    cell: VideoCell, scorer: fastalps.Scorer, test: Sequence[Clip], folder: Path, chosen: Ours
) -> dict[str, Any]:
    """Every figure of the cell: of the plain kinds, of ours, and of what learns nothing."""
    shown = [show(clip, cell.variant) for clip in test]
    kept = [one.kept(PATCH) for one in shown]
    plain = [
        _scores(scorer, one, torch.ones_like(keep), PATCH)
        for one, keep in zip(shown, kept, strict=True)
    ]
    options: dict[str, Any] = {
        "patch_size": PATCH,
        "smooth": SMOOTH,
        "kept": kept,
        "dropped": "left out",
    }
    found: dict[str, Any] = {
        kind: protocols.evaluate_video([getattr(s, kind) for s in plain], test, **options)
        for kind in Scores._fields
    }
    motion = protocols.motion_baseline(test, PATCH)
    found["motion_baseline"] = protocols.evaluate_video(motion, test, **options)
    energies = [one.energies(PATCH) for one in shown]
    stride = chosen.stride
    dense = [one.kept(stride) for one in shown]
    dense_energies = [one.energies(stride) for one in shown]
    dense_options = {**options, "kept": dense, "stride": stride, "top_k": chosen.top_k}
    dense_plain = [_scores(scorer, one, k, stride) for one, k in zip(shown, dense, strict=True)]
    curves = []
    for kind in Scores._fields:
        # Patches keep the grid of the protocol, so that they are the same ones in every row.
        ours, frames = (
            [relative_errors(getattr(s, kind), e) for s, e in zip(scores, around, strict=True)]
            for scores, around in ((plain, energies), (dense_plain, dense_energies))
        )
        found[f"ours_{kind}"] = _both(ours, frames, test, options, dense_options)
        if kind == chosen.kind:
            found["ours"], curves = found[f"ours_{kind}"], frames
    # The same additions without a network: what learning adds to them.
    squares = [(values / 255).square() for values in motion]
    ours = [relative_errors(values, e) for values, e in zip(squares, energies, strict=True)]
    squares = [(v / 255).square() for v in protocols.motion_baseline(test, PATCH, stride)]
    baseline = [relative_errors(v, e) for v, e in zip(squares, dense_energies, strict=True)]
    found["motion_baseline_ours"] = _both(ours, baseline, test, options, dense_options)
    _write_frames(folder, test, plain, kept, motion, curves, dense, chosen)
    examples = _examples(shown, test, kept)
    plots.reconstructions(folder / "reconstructions.png", scorer.model, *examples)
    pictures.keep_examples(folder / pictures.EXAMPLES, scorer.model, *examples)
    return found


def _both(
    patches: Sequence[Tensor],
    frames: Sequence[Tensor],
    test: Sequence[Clip],
    options: dict[str, Any],
    dense_options: dict[str, Any],
) -> dict[str, Any]:
    """Patch-level figures of the protocol's grid, frame-level ones of the denser grid."""
    low = protocols.evaluate_video(patches, test, **options)
    high = protocols.evaluate_video(frames, test, **dense_options)
    return {"rules": high["rules"], "patch": low.get("patch"), "frame": high.get("frame")}


def _write_frames(
    folder: Path,
    test: Sequence[Clip],
    plain: Sequence[Scores],
    kept: Sequence[Tensor],
    motion: Sequence[Tensor],
    ours: Sequence[Tensor],
    dense: Sequence[Tensor],
    chosen: Ours,
) -> None:
    """scores.csv: what the frame-level figures are computed from."""
    rows: list[tuple[Any, ...]] = []
    for c, clip in enumerate(test):
        curves = [reduce_patches(getattr(plain[c], k), "max", 1, kept[c]) for k in Scores._fields]
        curves.append(reduce_patches(motion[c], "max"))
        top = reduce_patches(ours[c], "topk", chosen.top_k, dense[c])
        curves.append(protocols.smooth_scores(top, chosen.smooth))
        labels = [None] * len(clip.frames) if clip.labels is None else clip.labels.tolist()
        for t in range(len(clip.frames)):
            rows.append((clip.name, t + 1, labels[t], *(float(curve[t]) for curve in curves)))
    columns = ("clip", "frame", "anomalous", *Scores._fields, "motion_baseline", "ours")
    write_scores(folder / f"scores-{PROTOCOL}.csv", columns, rows)


def _examples(
    shown: Sequence[Shown], test: Sequence[Clip], kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Eight moving patches of each class at even distances, the normal ones first."""
    chosen: list[list[Tensor]] = [[], []]
    for one, clip, keep in zip(shown, test, kept, strict=True):
        if clip.masks is None:
            continue
        labels = protocols.patch_labels(clip.masks, PATCH)
        for wanted in (0, 1):
            mark = keep & (labels == wanted)
            mark[1::5] = mark[2::5] = mark[3::5] = mark[4::5] = False
            chosen[wanted] += [patches for _, patches in one.patches(mark, PATCH)]
    picks, labels_found = [], []
    for wanted in (0, 1):
        images = torch.cat(chosen[wanted]) if chosen[wanted] else torch.empty(0, 1, PATCH, PATCH)
        count = min(8, len(images))
        picks.append(images[torch.arange(count) * len(images) // max(1, count)])
        labels_found += [bool(wanted)] * count
    return torch.cat(picks), torch.tensor(labels_found, dtype=torch.bool)


def _rehearse(
    scorer: fastalps.Scorer, clips: Sequence[Clip], variant: str
) -> dict[str, dict[str, float]]:
    """AUROC of rehearsed anomalies for the options that `ours` was chosen from."""
    held_out = [show(clip, variant) for clip in clips]
    result: dict[str, dict[str, float]] = {}
    for stride in STRIDES:
        for speed in SPEEDS:
            pairs = []
            for one in held_out:
                fast = show(rehearsal.faster(one.clip, speed), variant, one.background)
                pairs.append([_rehearsal_scores(scorer, s, stride) for s in (one, fast)])
            result[f"stride {stride}, {speed}x"] = rehearsal.figures(
                pairs, speed, PATCH, stride, tuple(held_out[0].frames.shape[1:])
            )
    return result


def _choose(rehearsed: dict[str, dict[str, float]]) -> Ours:
    """The option that ranks anomalies of the lowest speed best; of equals the first."""
    best, found = -1.0, Ours("normal", PATCH, 1)
    for stride in STRIDES:
        areas = rehearsed[f"stride {stride}, {SPEEDS[0]}x"]
        for top_k in rehearsal.TOP:
            for kind in Scores._fields:
                area = areas[f"relative_{kind}, top {top_k}"]
                if area > best:
                    best, found = area, Ours(kind, stride, top_k)
    return found


def _rehearsal_scores(
    scorer: fastalps.Scorer, shown: Shown, stride: int
) -> tuple[dict[str, Tensor], Tensor]:
    kept, energies = shown.kept(stride), shown.energies(stride)
    found: dict[str, Tensor] = {}
    for kind, values in _scores(scorer, shown, kept, stride)._asdict().items():
        found[kind] = values
        found[f"relative_{kind}"] = relative_errors(values, energies)
    return found, kept
