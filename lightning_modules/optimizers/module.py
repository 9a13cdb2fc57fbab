"""A Lightning module that is trained by a recipe."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from clafusion.errors import FusionError
from clafusion.lightning import LightningModule, OptimizerLRScheduler
from clafusion.lightning_modules.optimizers.building import (
    Optimization,
    make_optimizer,
    make_schedule,
    rehearse,
)


class RecipeModule(LightningModule):
    """A module whose optimizer, schedule and warm-up follow from its hyperparameters.

    Attributes:
        lr: the learning rate, which `LearningRateFinder` may change.
    """

    lr: float
    _fused: bool

    def trained_weights(self) -> Iterator[nn.Parameter]:
        """Return the weights that are trained."""
        return self.parameters()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and, if there is one, the schedule of the recipe.

        Raises:
            FusionError: The optimizer does not take such weights.
        """
        recipe = self._optimization()
        optimizer = make_optimizer(recipe.optimizer, self.trained_weights(), recipe.lr, self._fused)
        if recipe.schedule is None:
            return optimizer
        schedule = make_schedule(recipe.schedule, optimizer)
        if isinstance(schedule, ReduceLROnPlateau):
            # Lightning would step it after the checkpoint of the epoch was written; `on_train_epoch_end` does before.
            never: Any = {"scheduler": schedule, "monitor": self._monitor(), "frequency": sys.maxsize}
            return {"optimizer": optimizer, "lr_scheduler": never}
        return [optimizer], [schedule]

    def check_length(self, epochs: int | None) -> None:
        """Refuse a schedule that ends before the training.

        Args:
            epochs: Length of the training; None or negative: not known.

        Raises:
            FusionError: It does.
        """
        if epochs is not None and epochs > 0:
            rehearse(self._optimization(), epochs=epochs)

    def on_train_epoch_end(self) -> None:
        """Step a schedule that follows a metric, before the checkpoint of the epoch is written."""
        trainer = self.trainer
        validated = (self.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        if not trainer.is_last_batch or not (validated or self._monitor() == "train_loss"):
            return
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(trainer.callback_metrics[str(self._monitor())])

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimizer, while warming up with a part of the learning rate."""
        with _scaled(optimizer, self._warm()):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def _warm(self) -> float:
        """Return the part of the learning rate that the next step has; a function of its number, so nothing to save."""
        epochs: float = self.hparams["warmup_epochs"]
        if epochs == 0:
            return 1.0
        trainer = self.trainer
        if trainer.num_training_batches == math.inf:
            raise FusionError("Expected data of known length to warm up in epochs, got others; leave out warmup_epochs")
        steps = epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return min(1.0, float(trainer.global_step + 1) / max(steps, 1))

    def _optimization(self) -> Optimization:
        return Optimization.of({**self.hparams, "lr": self.lr})

    def _monitor(self) -> str | None:
        return (self.hparams["lr_scheduler"] or {}).get("monitor")


@contextmanager
def _scaled(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rates for the time of one step: the schedule does not notice."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if factor != 1:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
