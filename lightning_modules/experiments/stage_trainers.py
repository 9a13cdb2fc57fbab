"""The arguments that the trainers of stages take over from the trainer that the user configured."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import Callback, ModelCheckpoint, Strategy

#: Arguments that the experiment decides on, and what they are when nobody has given them.
_DECIDED: dict[str, Any] = {
    "max_epochs": (None,), "min_epochs": (None,), "max_steps": (None, -1), "min_steps": (None,), "max_time": (None,),
    "fast_dev_run": (None, False), "barebones": (None, False), "limit_test_batches": (None, 1.0),
}  # fmt: skip


def stage_arguments(
    given: Mapping[str, Any], folder: str | os.PathLike[str], more: list[Callback] | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a stage's trainer.

    Args:
        given: The arguments of the trainer that the user configured.
        folder: The folder of the stage.
        more: Callbacks besides copies of the user's; None: no callbacks at all.
        changes: Other arguments that differ.
    """
    # Copies: a callback remembers one training, and stages are several.
    callbacks = [] if more is None else [*copy.deepcopy(given["callbacks"]), *more]
    return {**given, "default_root_dir": os.fspath(folder), "callbacks": callbacks, **changes}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments that stages cannot share, or that the experiment decides on.

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
