"""A Lightning trainer whose results lie where one expects them, and whose checkpoints are whole."""

import copy
import os
from collections.abc import Iterable
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import (
    Callback,
    CSVLogger,
    HookedTrainer,
    Logger,
    ModelCheckpoint,
    TorchCheckpointIO,
    training_settings,
)
from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.checkpoints.restoring import CheckedConnector
from clafusion.lightning_modules.checkpoints.writing import AtomicCheckpointIO


class FusionTrainer(HookedTrainer):
    """A Lightning `Trainer` whose results lie where one expects them.

    `fit` writes `best.ckpt` (of the highest `val_acc`) and `last.ckpt` into `default_root_dir`, replacing those of an
    earlier run, and `logs/version_N/metrics.csv` below it. A logger of yours takes the place of the latter, a
    `ModelCheckpoint` of yours that of `best.ckpt`. From `last.ckpt` an interrupted run goes on exactly where it was.
    Checkpoints are replaced whole or not at all, and nothing in them is ever run.

    Args:
        logger: Logger, several, false for none; none given: a CSV logger.
        callbacks: Callbacks.
        default_root_dir: Folder of the results.
        enable_checkpointing: False keeps `fit` from writing checkpoints.
        barebones: Lightning's mode for timing; nothing is logged or saved.
        save_every_n_steps: Write `last.ckpt` after every n-th optimizer step, besides after every epoch.
        **kwargs: As for `pytorch_lightning.Trainer`.

    Attributes:
        arguments: what it was made with, so that another one like it can be made.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        default_root_dir: str = "runs",
        enable_checkpointing: bool | None = None,
        barebones: bool = False,
        save_every_n_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks] if callbacks else []
        self.arguments: dict[str, Any] = {
            "logger": logger,
            "callbacks": list(callbacks),
            "default_root_dir": default_root_dir,
            "barebones": barebones,
            "save_every_n_steps": save_every_n_steps,
            **kwargs,
        }
        if not barebones and logger in (None, True):
            logger = CSVLogger(default_root_dir, name="logs")
        if save_every_n_steps is not None and save_every_n_steps < 1:
            raise FusionError(f"Expected save_every_n_steps of at least 1, got {save_every_n_steps}; change it")
        last = None
        if not barebones and enable_checkpointing is not False:
            last = LastCheckpoint(default_root_dir, save_every_n_steps)
            callbacks += [*_best(default_root_dir, callbacks), last]
        super().__init__(
            logger=logger,
            callbacks=callbacks,
            default_root_dir=default_root_dir,
            enable_checkpointing=enable_checkpointing,
            barebones=barebones,
            **kwargs,
        )
        self.use_connector(CheckedConnector)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        if last is not None:
            last.listen(self)

    def clone(
        self, folder: str | os.PathLike[str], more: list[Callback] | None = None, **changes: Any
    ) -> "FusionTrainer":
        """Return a trainer like this one, for another folder.

        Args:
            folder: Its `default_root_dir`.
            more: Callbacks besides copies of this trainer's; None: no callbacks at all.
            **changes: Other arguments that differ.
        """
        # Copies: a callback remembers one training.
        callbacks = [] if more is None else [*copy.deepcopy(self.arguments["callbacks"]), *more]
        return type(self)(
            **{**self.arguments, "default_root_dir": os.fspath(folder), "callbacks": callbacks, **changes}
        )

    def training_settings(self) -> dict[str, Any]:
        """Return the settings that change what a network learns, as plain values by name."""
        synchronized = bool(self.arguments.get("sync_batchnorm"))
        return {**training_settings(self), "sync_batchnorm": synchronized, "processes": self.world_size}


def _best(folder: str, callbacks: list[Callback]) -> list[Callback]:
    """Return what keeps the best checkpoint, unless the user has a `ModelCheckpoint` of their own."""
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        return []
    return [
        ModelCheckpoint(dirpath=folder, filename="best", monitor="val_acc", mode="max", enable_version_counter=False)
    ]
