"""The base of the kinds of stages that train a network."""

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clafusion.lightning import Callback, LightningModule, Trainer
from clafusion.lightning_modules.checkpoints.reading import load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.records import peak_memory
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.schema import Recipe
from clafusion.lightning_modules.experiments.stages.base import MakingResult, Stage


class Cost(Callback):
    """Seconds and peak memory of a training, those before an interruption included."""

    def __init__(self) -> None:
        self._before, self._peak = 0.0, 0
        self._started = time.perf_counter()
        self._device = torch.device("cpu")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count."""
        self._device = trainer.strategy.root_device
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return what the training has cost so far."""
        return dict(self.so_far())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what it had cost."""
        self._before, self._peak = state_dict["seconds"], state_dict["peak_memory_bytes"]

    def so_far(self) -> MakingResult:
        """Return what the training has cost so far."""
        seconds = self._before + time.perf_counter() - self._started
        return {"seconds": seconds, "peak_memory_bytes": max(self._peak, peak_memory(self._device))}


@dataclass(frozen=True)
class TrainingStage(Stage):
    """A stage that trains a network, and goes on from where it was interrupted.

    Attributes:
        recipe: how to train.
    """

    recipe: Recipe

    @abstractmethod
    def module(self, inputs: Mapping[str, Path], arguments: dict[str, Any]) -> ImageClassifier:
        """Return the module to train.

        Args:
            inputs: The files of the networks that it needs, by name.
            arguments: Arguments of `ImageClassifier`.
        """

    def run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> MakingResult:
        """Train from the beginning, or from where it was interrupted, to the end."""
        module = self.module(inputs, {**self.recipe.arguments(), **context.module})
        cost, last = Cost(), folder / "last.ckpt"
        data = context.data_for(self.recipe)
        trainer = context.trainer.clone(folder, [cost], max_epochs=self.recipe.epochs, enable_checkpointing=True)
        begun = on_rank_zero(context.trainer.strategy, last.is_file)
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if begun else None, weights_only=True)
        result = cost.so_far()
        # Weights that are not finite are the failure of this stage, not of those that would use them.
        load_parent(folder / "best.ckpt")
        return result
