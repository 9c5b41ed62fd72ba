"""The networks that exported files hold: pixels to scores in plain PyTorch, no op of ours in them.

They use the formulas of `fastalps.reference` and fold batch norm, so that any runtime that knows
the standard operators can run them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastalps import reference
from fastalps.folding import fold_batch_norm
from fastalps.models import ALPS
from fastalps.smoothing import smooth


class ImageGraph(nn.Module):
    """Pixels to scores: ``images`` (N, C, H, W) to (N,) float32.

    Args:
        model: an ALPS model; copied, to the CPU, in eval mode.
        score: "normal", "perturbed" or "average".
        pixels: dtype of the input: uint8 (0 to 255) or float32 (0 to 1).
    """

    def __init__(self, model: ALPS, score: str, pixels: torch.dtype) -> None:
        super().__init__()
        network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        fold_batch_norm(network)
        # Without a perturbation, or the need of one, the distorter would be dead weight.
        self.score = "normal" if model.config.perturbation == "none" else score
        if self.score == "normal":
            network.distorter = None
        self.network = network
        self.scale = 255.0 if pixels == torch.uint8 else 1.0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.errors(images.to(torch.float32) / self.scale)

    def errors(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N,)."""
        network = self.network
        latent = network.encode(images)
        if self.score == "normal":
            return self._compare(network.decode(latent), images)
        perturbed, _ = reference.perturb_latent(
            latent, network.distort(images), network.config.strength
        )
        if self.score == "perturbed":
            return self._compare(network.decode(perturbed), images)
        both = network.decode(torch.cat([latent, perturbed]))
        return self._compare(both, images).mean(0)

    def _compare(self, logits: Tensor, images: Tensor) -> Tensor:
        """(N,) of N reconstructions; (2, N) of 2N, where the score is the average."""
        paired = self.score == "average"
        size = self.network.config.smoothing
        if size == 1:
            if paired:
                return reference.paired_sigmoid_mse(logits, images)
            return reference.sigmoid_mse(logits, images)
        rebuilt, targets = smooth(logits.sigmoid(), size), smooth(images, size)
        if paired:
            return reference.paired_mse(rebuilt, targets)
        return reference.per_sample_mse(rebuilt, targets)


class FrameGraph(ImageGraph):
    """Whole frames to the scores of their patches.

    ``frames`` (N, H, W), or (N, C, H, W) for a model of several channels, to (N, P) float32, P in
    the order of `fastalps.ops.patch_grid`; with a gate also ``background`` (H, W) uint8: patches
    whose mean absolute difference from it is at most the threshold score 0.

    Args:
        model, score, pixels: as for `ImageGraph`; the patches have the model's image size.
        rows, columns: first rows and columns of the patches.
        gate_threshold: gray levels; None = no gate. Only for uint8 pixels of one channel.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        model: ALPS,
        score: str,
        pixels: torch.dtype,
        rows: Sequence[int],
        columns: Sequence[int],
        gate_threshold: float | None = None,
    ) -> None:
        super().__init__(model, score, pixels)
        height, width = model.config.image_size
        self.grid = (len(rows), len(columns))
        self.patch_size = (height, width)
        # A row and a column index instead of one a pixel of each patch: the file stays small.
        for name, origins, length in (("rows", rows, height), ("columns", columns, width)):
            index = torch.tensor(origins)[:, None] + torch.arange(length)
            self.register_buffer(name, index.flatten())
        self.limit = None
        if gate_threshold is not None:
            # As the motion gate compares: sums of whole gray levels.
            self.limit = math.floor(min(gate_threshold, 255.0) * height * width)

    def forward(self, frames: Tensor, background: Tensor | None = None) -> Tensor:
        count = frames.shape[0]
        patches = self.tile(frames).flatten(0, 1)
        scores = self.errors(patches.to(torch.float32) / self.scale)
        scores = scores.reshape(count, self.grid[0] * self.grid[1])
        if self.limit is None or background is None:
            return scores
        change = (frames.to(torch.int32) - background.to(torch.int32)).abs()
        total = self.tile(change).sum((2, 3, 4), dtype=torch.int32)
        return torch.where(total > self.limit, scores, 0.0)

    def tile(self, frames: Tensor) -> Tensor:
        """(N, H, W) or (N, C, H, W) -> (N, P, C, ph, pw)."""
        if frames.dim() == 3:
            frames = frames.unsqueeze(1)
        count, channels = frames.shape[:2]
        (rows, columns), (height, width) = self.grid, self.patch_size
        cut = frames.index_select(2, self.rows).index_select(3, self.columns)
        cut = cut.reshape(count, channels, rows, height, columns, width)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, channels, height, width)
