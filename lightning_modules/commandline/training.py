"""The options of `fit` that Lightning's command line has for the optimizer and for the schedule of its learning rate.

`--optimizer AdamW --optimizer.lr 0.001 --lr_scheduler CosineAnnealingLR --lr_scheduler.T_max 20`
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import PACKAGE, LightningArgumentParser
from clafusion.lightning_modules.commandline.shorthand import without_details
from clafusion.lightning_modules.optimizers.descriptions import (
    OPTIMIZER,
    SCHEDULE,
    Kind,
    arguments_of,
    did_you_mean,
    unknown_class,
)

KINDS = {kind.option: kind for kind in (OPTIMIZER, SCHEDULE)}
#: Arguments of the module that one of these takes the place of.
_REPLACED = {"optimizer": ("lr", "momentum", "weight_decay"), "lr_scheduler": ("milestones", "gamma")}


def add_training_arguments(parser: LightningArgumentParser) -> None:
    """Add `--overwrite`, and `--optimizer` and `--lr_scheduler`, whose values go to the module."""
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace an earlier run in the same folder.")
    parser.add_optimizer_args()
    parser.add_lr_scheduler_args()
    for option in KINDS:
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


def without_training_details(arguments: Sequence[str]) -> list[str]:
    """Leave out the arguments of an optimizer and a schedule whose classes only the checkpoint names.

    Args:
        arguments: Those of the command line.
    """
    if list(arguments[:1]) != ["fit"] or not any(one.partition("=")[0] == "--ckpt_path" for one in arguments):
        return list(arguments)
    return without_details(arguments, list(KINDS))


def saved_training(saved: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the optimizer and the schedule of a checkpoint as defaults of the parser.

    Args:
        saved: Its hyperparameters.
        config: The parsed arguments of `fit` so far; a class that they name is not that of the checkpoint.

    Raises:
        FusionError: The checkpoint names a class of the user's own, which only the command line may.
    """
    found: dict[str, Any] = {}
    for option, kind in KINDS.items():
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


def about_training(option: str, prose: str) -> str:
    """Return in one line what the parser says about an optimizer or a schedule in many.

    Args:
        option: `optimizer` or `lr_scheduler`.
        prose: The parser's message.
    """
    kind = KINDS[option]
    unknown = re.search(r"Option '([^']+)' is not accepted", prose)
    missing = re.search(r"the following arguments are required: (\w+)", prose)
    typed = re.search(r"Parser key \"(\w+)\":.*?Expected a <class '(\w+)'>.*?Given value: ([^\n]*)", prose, re.DOTALL)
    see = f"see clafusion fit --{option}.help NAME"
    if unknown:
        # The parser does not say of which class.
        known = sorted({argument for name in kind.names() for argument in arguments_of(kind, name)})
        if unknown[1] in known:
            return f"Expected --{option} to name a class that takes {unknown[1]}, got none or another; {see}"
        close = did_you_mean(unknown[1], known)
        return f"Expected an argument of the class that --{option} names, got {unknown[1]}; {close}{see}"
    if missing:
        return f"Expected --{option}.{missing[1]}, got none; give it, {see}"
    if typed:
        return f"Expected --{option}.{typed[1]} as {typed[2]}, got {typed[3]}; change it, {see}"
    return str(unknown_class(kind, prose.rpartition("Given value: ")[2].strip()))


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
    plain: dict[str, Any] | None = chosen.as_dict() if hasattr(chosen, "as_dict") else chosen
    return plain
