"""What tests/test_distributed.py runs in several processes: trains, scores, and writes what it got.

Arguments: folder, perturbation, batch norm (0 or 1).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import fastalps
from fastalps import distributed
from fastalps.training.validation import score_all


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    level = torch.rand(90, 1, 1, 1, generator=generator)
    noise = torch.rand(90, 1, 9, 11, generator=generator)
    return (255 * (0.7 * level + 0.3 * noise)).to(torch.uint8)


def run(folder: Path, perturbation: str, batch_norm: bool) -> None:
    torch.set_num_threads(1)
    with distributed.launched("cpu") as device:
        # Weights of its own in each process: the first one's are taken.
        torch.manual_seed(distributed.rank())
        model = fastalps.ALPS(
            (9, 11), 1, "fast", latent=5, perturbation=perturbation, batch_norm=batch_norm
        )
        config = fastalps.TrainConfig(
            epochs=3, batch_size=16, distorter_every=2, device=device, seed=2, average_decay=0.9
        )
        run_dir = folder / "run"
        fitted = fastalps.Trainer(config, run_dir, progress=False).fit(model, images())
        mine = images()[distributed.share(len(images()))]
        parts = distributed.gather({"scores": score_all(model, mine).normal})
        if parts is not None:
            scores = torch.cat([part["scores"] for part in parts])
            state = {n: v.contiguous() for n, v in fitted.last_weights.items()}
            history = [[row["normal_error"], row["perturbed_error"]] for row in fitted.history]
            state |= {"scores": scores, "history": torch.tensor(history, dtype=torch.float64)}
            save_file(state, folder / "result.safetensors")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
