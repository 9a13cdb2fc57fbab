"""The data that checkpoints say they were trained on: what a command takes unless the user names other data."""

from collections.abc import Mapping, Sequence
from typing import Any

from clafusion import datamodules
from clafusion.errors import FusionError
from clafusion.lightning_modules.checkpoints.reading import read_content
from clafusion.lightning_modules.commandline.shorthand import without_details
from clafusion.lightning_modules.commands.naming import file_names

#: The data of a command for which nobody has named any: the base class, which has no images.
NO_DATA = {"class_path": "clafusion.datamodules.ImageDataModule"}
#: Arguments that choose among the images: where parents differ in them, all images are taken.
_CHOICE = frozenset({"limit_train", "skip_train", "split", "label_set", "val_fraction", "split_seed"})
#: Arguments that do not change an image as a network gets it.
_LOADING = frozenset(
    {"batch_size", "eval_batch_size", "num_workers", "augment", "download", "allow_changes", "in_memory", "on_error"}
)
_CLASSES = {f"clafusion.datamodules.{name}": name for name in datamodules.__all__}


def saved_data(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return class and arguments of the data of a training or of a fusion; None if the checkpoint does not say.

    Only data modules of this package are named: the class of a file of somebody else is not imported.

    Args:
        checkpoint: The content of a file.
    """
    for path, name in _CLASSES.items():
        if isinstance(checkpoint.get(name), dict):
            return {"class_path": path, "init_args": dict(checkpoint.get("datamodule_hyper_parameters") or {})}
    data = (checkpoint.get("fusion") or {}).get("data")
    if not isinstance(data, dict) or not isinstance(data.get("init_args"), dict):
        return None
    return dict(data) if data.get("class_path") in _CLASSES else None


def common_data(paths: Sequence[str]) -> dict[str, Any]:
    """Return class and arguments of the data that all of several checkpoints were trained on.

    Args:
        paths: Checkpoints of fit or fuse, or files of save_network, which do not say.

    Raises:
        FusionError: One does not say what it was trained on, or the data differs in more than the choice of images.
    """
    names = file_names(paths)
    found = {name: saved_data(read_content(path)) for name, path in zip(names, paths, strict=True)}
    silent = [name for name, data in found.items() if data is None]
    if silent:
        raise FusionError(
            f"Expected --data, got none, and nothing in {' and '.join(silent)} says which images the training had; "
            "name the data module, with the size, mean and std of that training"
        )
    (first, data), *others = ((name, one) for name, one in found.items() if one is not None)
    arguments, chosen = dict(data["init_args"]), set[str]()
    for name, other in others:
        _check_same(first, data, name, other)
        chosen |= {key for key in _CHOICE if arguments.get(key) != other["init_args"].get(key)}
    return {**data, "init_args": {key: value for key, value in arguments.items() if key not in chosen}}


def image_shape(path: str) -> list[int] | None:
    """Return the shape (C, H, W) of the images that a checkpoint was trained on; None if it does not say.

    Raises:
        FusionError: The file cannot be read, or its data is not there any more.
    """
    data = saved_data(read_content(path))
    if data is None:
        return None
    try:
        return list(getattr(datamodules, _CLASSES[data["class_path"]])(**data["init_args"]).image_shape)
    except TypeError as error:
        raise FusionError(f"Expected arguments of a data module in {path}: {error}; give --shape") from error


def _check_same(first: str, data: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> None:
    """Refuse two kinds of data with different images."""
    ours, theirs = ({"class": one["class_path"].rpartition(".")[2], **one["init_args"]} for one in (data, other))
    for key in (*ours, *theirs):
        mine, its = ours.get(key), theirs.get(key)
        if key not in _CHOICE | _LOADING and mine != its:
            raise FusionError(
                f"Expected parents that were trained on the same kind of images, got {key} {mine} for {first} and "
                f"{its} for {name}; say by --data on which images to fuse and to test"
            )


def without_data_options(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command without the options of its data module, which only a checkpoint may name."""
    return without_details(arguments, ["data"])
