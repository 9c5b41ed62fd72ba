"""The paper's Figures 2 to 4: what models make of normal and anomalous test data.

Each cell of ALPS keeps its examples beside its checkpoint; a figure collects those of one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastalps.checkpoint import VERSION, read_tensors, save_tensors
from fastalps.cli.plots import ANOMALOUS, NORMAL
from fastalps.files import atomic_path
from fastalps.inputs import unit_pixels
from fastalps.models import ALPS

EXAMPLES = "examples.safetensors"
FORMAT = "fastalps-examples"
# Examples of each class in a figure.
SHOWN = 5


@torch.no_grad()
def keep_examples(path: Path, model: ALPS, images: Tensor, labels: Tensor) -> None:
    """Writes images (N, 1, H, W) and the reconstructions of their perturbed latents."""
    out = model(unit_pixels(images)).perturbed_reconstruction.float()
    pixels = (unit_pixels(images) * 255).round().to(torch.uint8)
    tensors = {"images": pixels, "labels": labels.to(torch.uint8)}
    tensors["perturbed"] = (out * 255).round().clamp(0, 255).to(torch.uint8)
    save_tensors(path, tensors, {"format": FORMAT, "version": VERSION})


def figure(path: Path, folders: Sequence[Path], names: Sequence[str], title: str) -> list[str]:
    """Draws the examples of the cells in `folders`, a row each: inputs left, reconstructions right.

    Returns the names of the cells whose examples are missing; draws what is there, and nothing
    where nothing is.
    """
    from matplotlib.figure import Figure

    found = []
    missing = []
    for folder, name in zip(folders, names, strict=True):
        if (folder / EXAMPLES).is_file():
            found.append((name, read_tensors(folder / EXAMPLES, FORMAT)[0]))
        else:
            missing.append(folder.name)
    if not found:
        return missing
    wide = 0.55 * 4 * SHOWN + 1.5
    sheet = Figure(figsize=(wide, 0.6 * len(found) + 0.7), dpi=80, layout="constrained")
    grid = sheet.subplots(len(found), 4 * SHOWN, squeeze=False)
    for (name, tensors), line in zip(found, grid, strict=True):
        labels = tensors["labels"].bool()
        picks = torch.cat([(labels == odd).nonzero().flatten()[:SHOWN] for odd in (False, True)])
        for half, kind in enumerate(("images", "perturbed")):
            for i, axes in enumerate(line[2 * SHOWN * half : 2 * SHOWN * (half + 1)]):
                axes.set(xticks=[], yticks=[])
                if i >= len(picks):
                    axes.set_axis_off()
                    continue
                axes.imshow(tensors[kind][picks[i], 0].numpy(), cmap="gray", vmin=0, vmax=255)
                for spine in axes.spines.values():
                    spine.set_color(ANOMALOUS if labels[picks[i]] else NORMAL)
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    sheet.suptitle(
        f"{title}: test data (left), reconstructions of the perturbed latents (right); "
        "normal blue, anomalous red",
        fontsize=8,
    )
    with atomic_path(path) as temporary:
        sheet.savefig(temporary)
    return missing
