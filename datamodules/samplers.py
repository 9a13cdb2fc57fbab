"""Each rank's share of the images: shuffled to train on, in fixed order to evaluate.

The samplers are `DistributedSampler`s in name only: Lightning replaces every other sampler by one that pads.
"""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DistributedSampler

from clafusion.datamodules.image_set import seeded
from clafusion.errors import FusionError


class EpochSampler(DistributedSampler[int]):
    """One rank's share of `range(size)`, in an order that is a pure function of `(seed, epoch)`.

    Rank r of R visits every R-th sample of the order, from the r-th on. Up to R - 1 samples are left out, different
    ones in each epoch, so that all ranks have batches of the same sizes: the mean of their gradients is then that of
    one process with R times the batch size.

    Args:
        size: Number of samples.
        seed: Selects the sequence of orders.
        rank: The number of this share.
        processes: Number of shares.
        epoch: The epoch to begin with; Lightning calls `set_epoch` before every epoch.
        skip: Number of samples of that epoch that this rank has seen already; the next epochs are whole.

    Raises:
        FusionError: There are fewer samples than processes.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, processes: int = 1, epoch: int = 0, skip: int = 0) -> None:
        _check_shares(size, processes, "training")
        self.size = size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = epoch
        self.skip = skip

    def set_epoch(self, epoch: int) -> None:
        """Select the order of the next iteration; another epoch than before skips nothing."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        """The number of samples in a whole epoch, skipped ones included."""
        return self.size // self.processes

    def __iter__(self) -> Iterator[int]:
        """Return the indices in the order of the current epoch."""
        order: list[int] = torch.randperm(self.size, generator=seeded("epoch", self.seed, self.epoch)).tolist()
        share = order[self.rank : len(self) * self.processes : self.processes]
        return iter(share[self.skip :])


class ShardSampler(DistributedSampler[list[int]]):
    """One rank's share of `range(size)` in batches: every sample is visited once, by one rank.

    The shares differ by at most one sample, and all ranks have the same number of batches, whose sizes differ by at
    most one, too. (When DDP validates within a training, it sends the buffers to all ranks before each batch, and would
    wait for ever for a rank without one.)

    Args:
        size: Number of samples.
        batch_size: Samples per batch at most (2 at most for a batch size of 1).
        rank: The number of this share.
        processes: Number of shares.
        part: The purpose of the samples, for the message.

    Raises:
        FusionError: There are fewer samples than processes.

    Example:
        >>> [list(ShardSampler(5, 2, rank, 2)) for rank in (0, 1)]
        [[[0, 2], [4]], [[1], [3]]]
    """

    def __init__(self, size: int, batch_size: int, rank: int, processes: int, part: str = "test") -> None:
        _check_shares(size, processes, part)
        indices = torch.arange(rank, size, processes)
        # A rank with the smaller share has no more batches than samples.
        count = min(math.ceil(math.ceil(size / processes) / batch_size), size // processes)
        self.batches: list[list[int]] = [batch.tolist() for batch in indices.tensor_split(count)]

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is fixed."""

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Return the indices of each batch."""
        return iter(self.batches)


def _check_shares(size: int, processes: int, part: str) -> None:
    if size < processes:
        raise FusionError(
            f"Expected a {part} image for each of the {processes} processes, got {size}; use fewer processes"
        )
