"""Which rank sees which images when: shuffled shards to train on, whole ones to evaluate; both can begin anywhere.

Lightning puts a sampler of its own, which pads, in the place of every sampler that is no `DistributedSampler`. That is
why these are: not for what they would inherit.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from clafusion.datamodules.image_set import seeded
from clafusion.errors import FusionError


class EpochSampler(DistributedSampler[int]):
    """One rank's share of `range(size)`, in an order that is a pure function of `(seed, epoch)`.

    Rank r of R visits every R-th sample of the order, from the r-th on. Up to R - 1 samples are left out, others in
    each epoch, so that all ranks have batches of the same sizes: the mean of their gradients is then that of one
    process with R times the batch size.

    Args:
        size: Number of samples.
        seed: Selects the sequence of orders.
        rank: Which of the shares this is.
        processes: Number of shares.
        epoch: The epoch to begin with; Lightning calls `set_epoch` before every epoch.
        skip: How many samples of that epoch this rank has seen already; the next epochs are whole.

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
        """Selects the order of the next iteration; what was seen of another epoch no longer counts."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        """Number of samples in a whole epoch; where samples are skipped, the iteration is that much shorter."""
        return self.size // self.processes

    def __iter__(self) -> Iterator[int]:
        """The indices in the order of the current epoch."""
        order: list[int] = torch.randperm(self.size, generator=seeded("epoch", self.seed, self.epoch)).tolist()
        share = order[self.rank : len(self) * self.processes : self.processes]
        return iter(share[self.skip :])


class ShardSampler(DistributedSampler[list[int]]):
    """One rank's share of `range(size)` in batches: every sample is visited once, by one rank.

    The shares differ by at most one sample, and all ranks have the same number of batches, which differ by at most one
    sample as well: validating within a training, DDP sends the buffers around before each batch, and would wait for
    ever for a rank that has none left.

    Args:
        size: Number of samples.
        batch_size: Samples per batch at most (2 at most for a batch size of 1).
        rank: Which of the shares this is.
        processes: Number of shares.
        part: What the samples are for, to be named in the message.

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
        """Nothing: the order is fixed."""

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of each batch."""
        return iter(self.batches)


class ResumableLoader(DataLoader):
    """A `DataLoader` that Lightning may interrupt anywhere in an epoch.

    Where to go on is in the state of the data module, which gives it to the sampler. Worker processes are not sent
    for batches before the first one is wanted: Lightning asks for an iterator before it says which epoch it is.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches, in the order that the sampler has when the first of them is asked for."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing; it tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, see `state_dict`."""


def _check_shares(size: int, processes: int, part: str) -> None:
    if size < processes:
        raise FusionError(
            f"Expected a {part} image for each of the {processes} processes, got {size}; use fewer processes"
        )
