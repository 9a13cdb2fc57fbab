"""The options of `fit` for the optimizer and for the schedule of its learning rate, as Lightning's command line has them.

`--optimizer AdamW --optimizer.lr 0.001 --lr_scheduler CosineAnnealingLR --lr_scheduler.T_max 20`
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import PACKAGE, LightningArgumentParser
from clafusion.lightning_modules.optimizers.descriptions import OPTIMIZER, SCHEDULE, Kind

_KINDS = {kind.option: kind for kind in (OPTIMIZER, SCHEDULE)}
#: Arguments of the module that one of these takes the place of.
_REPLACED = {"optimizer": ("lr", "momentum", "weight_decay"), "lr_scheduler": ("milestones", "gamma")}


def add_training_arguments(parser: LightningArgumentParser) -> None:
    """Add `--optimizer` and `--lr_scheduler` to the parser of `fit`, and hand their values to the module."""
    parser.add_optimizer_args()
    parser.add_lr_scheduler_args()
    for option in _KINDS:
        parser.link_arguments(option, f"model.init_args.{option}", compute_fn=_plain)


def check_training(arguments: Sequence[str], config: Any) -> None:
    """Refuse arguments that would have no effect.

    Args:
        arguments: Those of the command line.
        config: The parsed ones of `fit`.

    Raises:
        FusionError: An option is given beside the one that takes its place, or the module has no such argument.
    """
    given = {argument.partition("=")[0].removeprefix("--model.") for argument in arguments if "--model." in argument}
    for option, replaced in _REPLACED.items():
        if option in given:
            raise FusionError(f"Expected --{option}, got --model.{option}; leave out model.")
        if config[option] is None:
            continue
        if option not in config["model"]["init_args"]:
            owner = config["model"]["class_path"]
            raise FusionError(f"Expected a module with the argument {option}, got {owner}; leave out --{option}")
        lost = [name for name in replaced if name in given]
        if lost:
            name = config[option]["class_path"].rpartition(".")[2]
            raise FusionError(
                f"Expected the settings of {name} as --{option}.NAME, got --model.{lost[0]}, which it does not read; "
                f"see clafusion fit --{option}.help {name}"
            )


def saved_training(saved: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the optimizer and the schedule of a checkpoint as defaults of the parser.

    Args:
        saved: Its hyperparameters.
        config: The parsed arguments of `fit` so far; a class that they name is not that of the checkpoint.

    Raises:
        FusionError: The checkpoint names a class of the user's own, which only the command line may.
    """
    found: dict[str, Any] = {}
    for option, kind in _KINDS.items():
        description = saved.get(option)
        if not isinstance(description, dict):
            continue
        default = _as_class(kind, description, saved.get("lr"))
        if config[option] is None or config[option]["class_path"] == default["class_path"]:
            if "." in description["name"] and config[option] is None:
                raise FusionError(
                    f"Expected --{option} {description['name']}, with which this training began, got none; give it"
                )
            found[option] = default
    return found


def _as_class(kind: Kind, description: Mapping[str, Any], lr: Any) -> dict[str, Any]:
    """Return a description as the parser takes it."""
    name = str(description.get("name"))
    path = name if "." in name else f"{kind.module.__name__}.{name}"
    if name == "ReduceLROnPlateau":
        # That of Lightning has the argument monitor.
        path = f"{PACKAGE}.cli.ReduceLROnPlateau"
    arguments = {one: value for one, value in description.items() if one != "name"}
    return {"class_path": path, "init_args": arguments | ({"lr": lr} if kind is OPTIMIZER else {})}


def _plain(chosen: Any) -> dict[str, Any] | None:
    """Return the choice of a class as plain containers."""
    return chosen.as_dict() if hasattr(chosen, "as_dict") else chosen
