"""The training images, resident on their device, in shuffled batches of one size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastalps import distributed
from fastalps.inputs import unit_pixels


class Batches:
    """Shuffled batches of images that stay on one device.

    Every batch has the same size, so that a step can be one CUDA graph: the images that fill no
    batch are left out, other ones in each epoch.

    Args:
        images: uint8 (0 to 255) or floating (0 to 1), (N, C, H, W), N >= 1.
        batch_size: images a batch; N where that is less.
        device: to keep them on.
        memory_format: of the batches.
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        # Without the graph that they came from: every step has one of its own.
        self.images = images.detach().to(device)
        self.size = min(batch_size, len(images))
        self.memory_format = memory_format

    def __len__(self) -> int:
        return len(self.images) // self.size

    def epoch(self, seed: int, epoch: int) -> Iterator[Tensor]:
        """The batches of one epoch, float32 in [0, 1]; the order follows from seed and epoch.

        Of several processes (`fastalps.distributed`) each gets its share of every batch.
        """
        mine = distributed.share(self.size)
        for chosen in self.order(seed, epoch):
            yield self.take(chosen[mine])

    def order(self, seed: int, epoch: int) -> Tensor:
        """The numbers of the images in an epoch's batches, (batches, images a batch)."""
        # Drawn on the CPU: the same order on every device.
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        return order[: len(self) * self.size].view(-1, self.size)

    def take(self, chosen: Tensor) -> Tensor:
        """The images of these numbers as a batch."""
        batch = unit_pixels(self.images.index_select(0, chosen))
        return batch.contiguous(memory_format=self.memory_format)

    def fingerprint(self) -> str:
        """Tells whether a resumed run trains on the same images: shape and checksum."""
        images = self.images.cpu().contiguous()
        checksum = zlib.crc32(images.view(torch.uint8).numpy().data)
        return f"{tuple(images.shape)} {images.dtype} {checksum:08x}"


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for each epoch of each run: a resumed run draws what an unbroken one would have."""
    return (seed * 1_000_003 + epoch) % 2**63
