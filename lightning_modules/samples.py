"""Unlabelled samples to fuse on, from whatever data a training was given."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clafusion.errors import FusionError
from clafusion.lightning import (
    CombinedLoader,
    LightningDataModule,
    Trainer,
    isolate_rng,
    to_device,
    training_loader,
)
from clafusion.statistics.batches import Inputs, inputs_of


def training_samples(trainer: Trainer, inputs: Inputs, count: int, seed: int) -> list[Tensor]:
    """Return the first training samples of `fit`, as the network gets them: on the device, after all hooks.

    Args:
        trainer: Runs `fit`; its data has been set up.
        inputs: Which part of a batch the network takes, as for `inputs_of`.
        count: How many samples at least, if there are as many.
        seed: Of the order, where the loader shuffles.

    Returns:
        Batches of samples. The training itself begins as if none had been taken.

    Raises:
        FusionError: There is no training data yet, or no tensor in its batches.
    """
    with _drawing(training_loader(trainer), seed) as batches:
        return _taken((to_device(trainer, batch) for batch in batches), inputs, count)


def module_samples(data: LightningDataModule, trainer: Trainer, inputs: Inputs, count: int, seed: int) -> list[Tensor]:
    """Return the first training samples of a data module outside of `fit`; arguments as for `training_samples`."""
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    device = trainer.strategy.root_device

    def moved(batch: Any) -> Any:
        batch = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), device, 0)
        return data.on_after_batch_transfer(batch, 0)

    with _drawing(CombinedLoader(data.train_dataloader()), seed) as batches:
        return _taken((moved(batch) for batch in batches), inputs, count)


@contextmanager
def _drawing(loader: CombinedLoader, seed: int) -> Iterator[Iterator[Any]]:
    """Yield the batches of a loader; leave it, and all random numbers, as they were."""
    generators = list(_generators(loader.flattened))
    states = [generator.get_state() for generator in generators]
    # Copies, whose workers are not those of the training.
    loader.flattened = [copy.copy(one) if isinstance(one, DataLoader) else one for one in loader.flattened]
    with isolate_rng():
        torch.manual_seed(seed)
        try:
            yield (batch for batch, *_ in loader)
        finally:
            loader.reset()
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _generators(loaders: Iterable[Any]) -> Iterator[torch.Generator]:
    """Yield the generators of random numbers that loaders and their samplers have of their own."""
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator


def _taken(batches: Iterable[Any], inputs: Inputs, count: int) -> list[Tensor]:
    """Return the inputs of batches until there are enough samples."""
    taken: list[Tensor] = []
    for batch in batches:
        taken.append(inputs_of(batch, inputs))
        if sum(map(len, taken)) >= count:
            break
    if not taken:
        raise FusionError("Expected training data to fuse on, got no batch; pass more data, or smaller batches")
    return taken
