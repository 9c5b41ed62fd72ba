"""The pictures of a run, drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastalps import metrics
from fastalps.calibration import Calibration
from fastalps.files import atomic_path
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NORMAL, ANOMALOUS, ACCENT, THIRD = "#2b6cb0", "#c53030", "#2f855a", "#805ad5"
COLOURS = (NORMAL, ANOMALOUS, ACCENT, "#718096", THIRD)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _shown(name: str) -> str:
    """A name of a file or data set as text of a picture: no formula, however many $ it has, and no
    bytes that are no UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace").replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def losses(path: Path, history: Sequence[Mapping[str, Any]], best_epoch: int) -> None:
    """Training and validation errors, and the validation AUROC where there is one, by epoch."""
    has_auroc = any("validation_auroc_average" in row for row in history)
    figure = _figure(10 if has_auroc else 6, 4)
    panels = figure.subplots(1, 2 if has_auroc else 1, squeeze=False)[0]
    names = (
        ("normal_error", "normal, training", "-"),
        ("perturbed_error", "perturbed, training", "-"),
        ("validation_normal", "normal, held out", ":"),
        ("validation_perturbed", "perturbed, held out", ":"),
    )
    colours = (NORMAL, ANOMALOUS, NORMAL, ANOMALOUS)
    for (name, label, style), colour in zip(names, colours, strict=True):
        _curve(panels[0], history, name, label, style, colour)
    adversary = [
        (row["epoch"], row["distorter_error"]) for row in history if "distorter_error" in row
    ]
    if adversary:
        panels[0].plot(*zip(*adversary, strict=True), "^", color=THIRD, label="distorter's steps")
    panels[0].set(yscale="log", xlabel="epoch", ylabel="mean squared error")
    panels[0].set_title("Reconstruction errors")
    if has_auroc:
        for kind, colour in zip(("normal", "perturbed", "average"), COLOURS, strict=False):
            _curve(panels[1], history, f"validation_auroc_{kind}", f"{kind} score", "-", colour)
        panels[1].set(xlabel="epoch", ylabel="AUROC", title="Validation")
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.axvline(best_epoch, color="black", alpha=0.4, linestyle="--", label="epoch kept")
        axes.legend(frameon=False, fontsize=8)
        _tidy(axes)
    _save(figure, path)


def _curve(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    name: str,
    label: str,
    style: str,
    colour: str,
) -> None:
    points = [(row["epoch"], row[name]) for row in history if name in row]
    if points:
        # A single epoch is a point, which a line would not show.
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=marker)


def roc(path: Path, curves: Mapping[str, tuple[Tensor, Tensor]], title: str) -> None:
    """ROC curves of (scores, anomalous) pairs by name; those of one class only are left out."""
    drawable = {
        name: pair for name, pair in curves.items() if 0 < int(pair[1].sum()) < len(pair[1])
    }
    if not drawable:
        return
    figure = _figure(5.5, 5)
    axes = figure.subplots()
    for (name, (scores, labels)), colour in zip(drawable.items(), COLOURS, strict=False):
        curve = metrics.roc(scores, labels)
        area, equal = metrics.auroc(scores, labels), metrics.eer(scores, labels)
        axes.plot(
            curve.false_positive_rate,
            curve.true_positive_rate,
            color=colour,
            label=f"{_shown(name)}: AUROC {100 * area:.2f}%, EER {100 * equal:.1f}%",
        )
    axes.plot([0, 1], [0, 1], color="black", alpha=0.3, linestyle="--", label="chance")
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", title=_shown(title))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _tidy(axes)
    _save(figure, path)


def histogram(
    path: Path, scores: Tensor, labels: Tensor, calibration: Calibration, title: str
) -> None:
    """Scores of normal and anomalous data, and the threshold."""
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    values = scores.float()
    # A few extreme scores must not squeeze all others into one bin.
    top = max(float(values.quantile(0.995)), 1.2 * calibration.threshold) if len(values) else 1.0
    for wanted, colour, name in ((False, NORMAL, "normal"), (True, ANOMALOUS, "anomalous")):
        chosen = values[labels == wanted]
        if len(chosen):
            axes.hist(
                chosen.clamp(max=top).numpy(),
                bins=60,
                range=(0, top),
                density=True,
                color=colour,
                alpha=0.55,
                label=f"{name} ({len(chosen)})",
            )
    axes.axvline(
        calibration.threshold,
        color="black",
        linestyle="--",
        label=f"threshold {calibration.threshold:.4g}",
    )
    axes.set(xlabel="mean squared error (the last bin holds all above)", ylabel="density")
    axes.set_title(_shown(title))
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    _save(figure, path)


@torch.no_grad()
def reconstructions(path: Path, model: ALPS, images: Tensor, labels: Tensor) -> None:
    """Images, their normal and perturbed reconstructions and the squared error of the latter.

    Args:
        images: uint8 (N, C, H, W), the normal ones first.
        labels: bool (N,).

    Source: ALPS, Figures 2 to 4.
    """
    if not len(images):
        return
    device = next(model.parameters()).device
    pixels = unit_pixels(images)
    out = model(pixels.to(device))
    error = (out.perturbed_reconstruction.float().cpu() - pixels).square().mean(1, keepdim=True)
    rows = (
        ("image", pixels),
        ("reconstruction", out.reconstruction.float().cpu()),
        ("perturbed", out.perturbed_reconstruction.float().cpu()),
        ("squared error", error),
    )
    count = len(images)
    figure = _figure(1.0 + 0.75 * count, 0.8 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for (name, values), line in zip(rows, grid, strict=True):
        heat = name == "squared error"
        for i, axes in enumerate(line):
            picture = values[i].permute(1, 2, 0).clamp(0, 1).numpy()
            axes.imshow(
                picture.squeeze(-1) if picture.shape[2] == 1 else picture,
                cmap="inferno" if heat else "gray",
                vmin=0,
                vmax=float(error.max()) if heat else 1,
            )
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color(ANOMALOUS if labels[i] else NORMAL)
        line[0].set_ylabel(_shown(name), fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle("normal (blue frames) and anomalous (red) test data", fontsize=9)
    _save(figure, path)


def timelines(
    path: Path,
    names: Sequence[str],
    curves: Sequence[Tensor],
    labels: Sequence[Tensor],
    calibration: Calibration,
) -> None:
    """Frame scores of clips over time, the threshold, and where the labels say anomalous."""
    figure = _figure(12, 1.1 + 1.1 * len(names))
    panels = figure.subplots(len(names), 1, sharey=True, squeeze=False)[:, 0]
    for axes, name, curve, label in zip(panels, names, curves, labels, strict=True):
        _timeline(axes, curve, calibration.threshold, label)
        axes.set_ylabel(_shown(name), fontsize=8, rotation=0, ha="right", va="center")
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel("frame")
    figure.suptitle("frame scores; red: labelled anomalous; dashed: threshold", fontsize=10)
    _save(figure, path)


def timeline(
    path: Path, curve: Tensor, calibration: Calibration, threshold: float, title: str
) -> None:
    """The frame (or image) scores of one input, the threshold, what is flagged."""
    figure = _figure(10, 3.2)
    axes = figure.subplots()
    _timeline(axes, curve, threshold, None)
    axes.set(xlabel="frame" if calibration.level != "image" else "image", title=_shown(title))
    axes.set_ylabel(f"{calibration.score} score (mean squared error)")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _save(figure, path)


def trace(
    path: Path,
    points: Tensor,
    step: int,
    calibration: Calibration,
    threshold: float,
    title: str,
) -> None:
    """`timeline` of an input of any length: each point is the highest score of `step` frames."""
    figure = _figure(10, 3.2)
    axes = figure.subplots()
    _timeline(axes, points, threshold, None, step)
    axes.set(
        xlabel="frame" if step == 1 else f"frame (highest of each {step})", title=_shown(title)
    )
    axes.set_ylabel(f"{calibration.score} score (mean squared error)")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    _save(figure, path)


def _timeline(
    axes: Axes, curve: Tensor, threshold: float, label: Tensor | None, step: int = 1
) -> None:
    values = curve.float().numpy()
    frames = np.arange(len(values)) * step + 1
    if label is not None and len(values):
        axes.fill_between(
            frames,
            0,
            1,
            where=label.numpy(),
            transform=axes.get_xaxis_transform(),
            color=ANOMALOUS,
            alpha=0.15,
            step="mid",
        )
    axes.plot(frames, values, color=NORMAL, linewidth=1, label="score")
    flagged = values > threshold
    axes.plot(
        frames[flagged],
        values[flagged],
        ".",
        color=ANOMALOUS,
        markersize=4,
        label=f"flagged ({flagged.sum()})" if step == 1 else "flagged",
    )
    axes.axhline(threshold, color="black", linestyle="--", linewidth=0.8, label="threshold")
    axes.set_xlim(1, max(2, len(values) * step))
    _tidy(axes)
