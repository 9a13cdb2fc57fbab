"""Batches of three parts of images: on one process or several, with workers or without, on the device or beside it."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from clafusion.datamodules.arguments import check_whole
from clafusion.datamodules.image_set import ImageSet, LabelledImages
from clafusion.datamodules.loaders import ResumableLoader
from clafusion.datamodules.resuming import ResumableDataModule
from clafusion.datamodules.samplers import EpochSampler, ShardSampler
from clafusion.errors import FusionError

#: Worker processes that decode images for one loader, at most, unless a number is given.
_WORKERS = 8


def _image_memory(device: torch.device) -> int:
    """The bytes on a GPU that images may take: a quarter of the free ones, the rest is for the network."""
    return torch.cuda.mem_get_info(device)[0] // 4


class LoadingDataModule(ResumableDataModule):
    """Base of data modules whose images are three parts, `train`, `val` and `test`; `setup` defines them.

    Args:
        batch_size: Images per training batch.
        eval_batch_size: Images per batch of validation, test and prediction.
        num_workers: Worker processes per loader; None: see `workers`.
        allow_changes: Whether an interrupted training may go on with other data, seed or number of processes.

    Raises:
        FusionError: An argument is of the wrong type or out of range.
    """

    def __init__(
        self, batch_size: int, eval_batch_size: int, num_workers: int | None = None, allow_changes: bool = False
    ) -> None:
        super().__init__(allow_changes)
        check_whole("batch_size", batch_size, 1)
        check_whole("eval_batch_size", eval_batch_size, 1)
        if num_workers is not None:
            check_whole("num_workers", num_workers, 0)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self._parts: dict[str, LabelledImages] = {}

    def _part(self, name: str) -> LabelledImages:
        if not self._parts:
            raise FusionError("Expected a data module that was set up, got a fresh one; call setup() first")
        return self._parts[name]

    def _at_hand(self, part: str) -> LabelledImages:
        """Return the images of a part as they are now, to fetch a few of them."""
        return self._part(part)

    def _held(self, part: str) -> LabelledImages:
        """Return the images of a part to fetch all of them."""
        return self._part(part)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images in each part, by name; empty before `setup`."""
        return {name: len(part) for name, part in self._parts.items()}

    @property
    def train_size(self) -> int:
        """The number of training images; there is none before `setup`."""
        return len(self._part("train"))

    @property
    def val_size(self) -> int:
        """The number of validation images; there is none before `setup`."""
        return len(self._part("val"))

    @property
    def test_size(self) -> int:
        """The number of test images; there is none before `setup`."""
        return len(self._part("test"))

    @property
    def _neighbours(self) -> int:
        """The number of processes of the run on this machine."""
        return 1 if self.trainer is None else max(1, self.trainer.num_devices)

    def workers(self, images: LabelledImages) -> int:
        """Return the number of worker processes of a loader: as given, or as many as there is use for."""
        if self.num_workers is not None:
            return self.num_workers
        if isinstance(images, ImageSet):
            return 0
        # Not the cores of the machine: a job of a cluster has only some of them.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(_WORKERS, cores // self._neighbours))

    def _loader(self, part: str, batch_size: int | None, sampler: Sampler[Any] | None = None) -> DataLoader[Any]:
        images = self._held(part)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        workers = self.workers(images)
        # CUDA tensors cannot be sent to worker processes.
        if isinstance(images, ImageSet) and device.type == "cuda" and workers == 0:
            images = images.to(device) if images.size_in_bytes <= _image_memory(device) else images
        return self._loader_of(
            images,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available() and not (isinstance(images, ImageSet) and images.images.is_cuda),
            persistent_workers=workers > 0,
        )

    def _loader_of(self, images: LabelledImages, **arguments: Any) -> DataLoader[Any]:
        """Return the loader of a set of images."""
        return ResumableLoader(images, **arguments)

    def _fetch(self, images: LabelledImages, batches: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the batches of the given int64 `[B]` indices, on the CPU."""
        chosen = [batch.tolist() for batch in batches if len(batch)]
        # A generator of its own: otherwise the loader would draw from PyTorch's, and change what is random after it.
        generator = torch.Generator().manual_seed(0)
        workers = 0 if isinstance(images, ImageSet) else self.workers(images)
        return self._loader_of(images, batch_size=None, sampler=chosen, num_workers=workers, generator=generator)

    def _fixed_loader(self, part: str) -> DataLoader[Any]:
        """Return all images of a part in fixed order; on several processes each rank has its own share."""
        size = len(self._part(part))
        rank, processes = self._rank
        if processes == 1 or size == 0:
            return self._loader(part, self.eval_batch_size)
        return self._loader(part, None, ShardSampler(size, self.eval_batch_size, rank, processes, part))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training part, in an order that is a pure function of the run's seed and the epoch.

        The seed is that of `torch.manual_seed` (`seed_everything`). Without one each run has its own order, and a
        resumed run has the order of its checkpoint. On several processes each rank has a share of the same order.

        Raises:
            FusionError: A training goes on from a checkpoint that has no state of this kind of data.
        """
        epoch, batches = self._begin()
        sampler = EpochSampler(self.train_size, self._seed, *self._rank, epoch, batches * self.batch_size)
        if self.allow_changes:
            # An epoch that is shorter than it was ends with its last batch, not with none.
            sampler.skip = min(sampler.skip, (len(sampler) - 1) // self.batch_size * self.batch_size)
        return self._loader("train", self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of the validation part in fixed order: none if `val_fraction` is 0; then Lightning warns."""
        return self._fixed_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of the test part in fixed order."""
        return self._fixed_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches `(images, labels)` of the test part in fixed order."""
        return self.test_dataloader()
