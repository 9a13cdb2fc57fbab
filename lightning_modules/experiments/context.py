"""The trainer and the data that the stages of an experiment run with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import LightningDataModule
from clafusion.lightning_modules.experiments.schema import Recipe
from clafusion.lightning_modules.trainer import FusionTrainer


@dataclass(frozen=True)
class RunContext:
    """What all stages run with.

    Attributes:
        trainer: the one that the user configured, which makes those of the stages.
        data: images; a recipe says what is different for its training.
        module: arguments of every module that do not change the result.
        report: whether fusions are measured for the report.
        quiet: whether to show no progress.
    """

    trainer: FusionTrainer
    data: LightningDataModule
    module: dict[str, Any] = field(default_factory=dict)
    report: bool = True
    quiet: bool = False

    def data_for(self, recipe: Recipe) -> LightningDataModule:
        """Return a data module for a training, whose batches are shared by the processes.

        Raises:
            FusionError: There is no such argument, or the batch size cannot be shared.
        """
        total = recipe.batch_size
        assert total is not None  # the plan has filled it in
        size, rest = divmod(total, self.trainer.world_size)
        if rest:
            raise FusionError(
                f"Expected a batch_size that {self.trainer.world_size} processes can share, got {total}; change it"
            )
        return changed(self.data, {**recipe.data, "batch_size": size})


def changed(data: LightningDataModule, changes: Mapping[str, Any]) -> LightningDataModule:
    """Return a new data module of the same class, with some arguments changed.

    Raises:
        FusionError: There is no such argument, or a value does not fit it.
    """
    try:
        return type(data)(**{**data.hparams, **changes})
    except TypeError as error:
        raise FusionError(
            f"Expected data to be arguments of {type(data).__name__}, got {dict(changes)}: {error}; change them"
        ) from error
