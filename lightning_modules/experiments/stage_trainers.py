"""What the trainers of an experiment's stages have from the one that the user configured, and what they may not."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import Callback, ModelCheckpoint, Strategy, Trainer

#: Arguments that the experiment decides on, and what they are when nobody has given them.
_DECIDED: dict[str, Any] = {
    "max_epochs": (None,), "min_epochs": (None,), "max_steps": (None, -1), "min_steps": (None,), "max_time": (None,),
    "fast_dev_run": (None, False), "barebones": (None, False), "limit_test_batches": (None, 1.0),
}  # fmt: skip
#: Settings of a trainer that change what is learnt.
_INFLUENCES = (
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches"),
    *("limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch"),
)


def stage_arguments(
    given: Mapping[str, Any], folder: str | os.PathLike[str], more: list[Callback] | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a stage's trainer.

    Args:
        given: Those of the trainer that the user configured.
        folder: Of the stage.
        more: Callbacks besides copies of the user's; None: no callbacks at all.
        changes: What else is different.
    """
    # Copies: what a callback remembers of one training is not about another one.
    callbacks = [] if more is None else [*copy.deepcopy(given["callbacks"]), *more]
    return {**given, "default_root_dir": os.fspath(folder), "callbacks": callbacks, **changes}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuses what stages cannot share, or what the experiment says already.

    Raises:
        FusionError: Names the argument.
    """
    for name, absent in _DECIDED.items():
        if given.get(name) not in absent:
            raise FusionError(
                f"Expected the experiment to decide on {name}, got {given[name]}; leave out trainer.{name}"
            )
    if not isinstance(given["logger"], bool | None):
        raise FusionError("Expected a logger for each stage, got one for all; give trainer.logger true or false")
    if isinstance(given.get("strategy"), Strategy):
        raise FusionError(
            "Expected a strategy by its name, which every stage can make for itself, got an object; name it"
        )
    if any(isinstance(callback, ModelCheckpoint) for callback in given["callbacks"]):
        raise FusionError("Expected each stage to keep its best checkpoint, got a ModelCheckpoint; leave it out")


def influences(trainer: Trainer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer that change what is learnt, as plain values by name."""
    found = {name: getattr(trainer, name) for name in _INFLUENCES}
    plain = {
        name: value if isinstance(value, bool | int | float | None) else str(value) for name, value in found.items()
    }
    return {**plain, "sync_batchnorm": bool(given.get("sync_batchnorm")), "processes": trainer.world_size}
