"""What checkpoints say of a command, where the user does not: module, data, seed, optimizer and schedule."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from clafusion.lightning_modules import Distiller, ImageClassifier, read_checkpoint
from clafusion.lightning_modules.commandline.checkpoint_data import NO_DATA, common_data, image_shape, saved_data
from clafusion.lightning_modules.commandline.parser import DEFAULTS
from clafusion.lightning_modules.commandline.training import saved_training

#: The commands that take the data of the checkpoints that they read.
WITH_DATA = ("validate", "test", "predict", "fuse", "transfer")
_RECIPE = signature(ImageClassifier).parameters


def saved_defaults(command: str, config: Any, path: str | None) -> dict[str, Any]:
    """Return what the checkpoints of a command say, where the user has not: module, data, seed.

    Args:
        command: Of the command line.
        config: Its parsed arguments.
        path: Its `ckpt_path`.
    """
    checkpoint = {} if path is None else read_checkpoint(path)
    defaults = _interrupted_run(checkpoint) if command == "fit" else {}
    if checkpoint:
        defaults["model"] = _saved_module(checkpoint["hyper_parameters"], config["model"])
    if checkpoint and command == "fit":
        defaults |= saved_training(checkpoint["hyper_parameters"], config)
    if command in WITH_DATA and config["data"]["class_path"] == NO_DATA["class_path"]:
        given = {"fuse": config.get("parents"), "transfer": [config.get("source"), config.get("target")]}
        files = [file for file in given.get(command, [path]) if file is not None]
        # Too few of them are refused by the command itself.
        defaults["data"] = common_data(files) if len(files) > (command == "fuse") else DEFAULTS["data"]
    if command == "export" and config["shape"] is None:
        defaults["shape"] = image_shape(config["input"])
    return defaults


def _saved_module(saved: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
    """Return the module that a checkpoint describes.

    Args:
        saved: Its hyperparameters.
        chosen: The module of the command line so far: a class of the user's own knows which of them are its arguments.
    """
    if chosen["class_path"] != DEFAULTS["model"]["class_path"]:
        path, names = chosen["class_path"], set(vars(chosen["init_args"]))
    else:
        # A distillation goes on as one, unless the user names another class, which takes over what it knows.
        kind = Distiller if "teachers" in saved else ImageClassifier
        path, names = f"clafusion.lightning_modules.{kind.__name__}", {*_RECIPE, *signature(kind).parameters}
    # Those have options of their own.
    names -= {"optimizer", "lr_scheduler"}
    return {"class_path": path, "init_args": {name: value for name, value in saved.items() if name in names}}


def _interrupted_run(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a checkpoint and, if that is one of a training, its seed."""
    data = saved_data(checkpoint)
    if data is None:
        return {}
    state = checkpoint.get(data["class_path"].rpartition(".")[2]) or {}
    seed = state.get("seed")
    # PyTorch seeds itself with more bits than a seed on the command line may have.
    return {"data": data, **({"seed_everything": seed} if type(seed) is int and seed < 2**32 else {})}
