"""Class paths of version 0.1, such as `datamodules.MNISTDataModule`: they are ours unless the user has such a class."""

from collections.abc import Callable
from enum import Enum
from importlib import import_module
from inspect import isclass
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from clafusion.old_names import NEW_NAMES

#: The parser mode of every command: YAML in which old class paths have become present ones.
MODE = "clafusion"


def present_name(name: str) -> str:
    """Return the present path of a class that version 0.1 knew by another one; any other text as it is.

    Example:
        >>> present_name("callbacks.FusionCallback"), present_name("callbacks.MyCallback")
        ('clafusion.callbacks.FusionCallback', 'callbacks.MyCallback')
    """
    package, _, attribute = name.partition(".")
    if package not in NEW_NAMES:
        return name
    present = f"{NEW_NAMES[package]}.{attribute}"
    return present if isclass(_imported(present)) and _imported(name) is None else name


def _imported(path: str) -> Any:
    """Return the object of that path; None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _with_present_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_present_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_present_names(item) for item in value]
    return present_name(value) if isinstance(value, str) else value


def _loader(load: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: _with_present_names(load(text))


# Lightning has such values as defaults, and PyYAML does not know them.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(str(value.value)))
set_loader(MODE, _loader(get_loader("yaml")), (yaml.YAMLError,))
