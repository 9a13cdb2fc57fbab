"""Optimizers and schedules of the learning rate as plain data.

A description is `{"name": "AdamW", "weight_decay": 0.05}`: the name of a class of `torch.optim`, and those of its
arguments that differ from the class's own. A class of the user's own has its import path as its name. Nothing is
imported because a description says so: such a class is used only if the program has it already.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import Parameter, isclass, signature
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from clafusion.errors import FusionError

Description = dict[str, Any]
#: What a metric has to be called for `ReduceLROnPlateau` to follow it.
METRICS = ("train_loss", "val_loss", "val_acc")


@dataclass(frozen=True)
class Kind:
    """What is described.

    Attributes:
        option: the argument that names it.
        base: the class that all of them have.
        module: where PyTorch has them.
        given: arguments that the trainer fills in itself.
    """

    option: str
    base: type
    module: ModuleType
    given: frozenset[str]

    def names(self) -> list[str]:
        """Return the names of PyTorch's classes."""
        found = {name: value for name, value in vars(self.module).items() if isclass(value)}
        return sorted(
            name
            for name, value in found.items()
            if issubclass(value, self.base) and value is not self.base and not name.startswith("_")
        )


OPTIMIZER = Kind("optimizer", Optimizer, torch.optim, frozenset({"params"}))
SCHEDULE = Kind("lr_scheduler", LRScheduler, lr_scheduler, frozenset({"optimizer"}))


def describe(kind: Kind, given: Mapping[str, Any]) -> Description:
    """Return the canonical description of an optimizer or a schedule.

    Args:
        kind: Which of the two.
        given: A description, or `{"class_path": "torch.optim.AdamW", "init_args": {...}}`.

    Raises:
        FusionError: There is no such class, or it does not have such arguments, or they are not plain values.

    Example:
        >>> describe(OPTIMIZER, {"class_path": "torch.optim.AdamW", "init_args": {"eps": 1e-8, "weight_decay": 0.05}})
        {'name': 'AdamW', 'weight_decay': 0.05}
    """
    name: Any
    if "class_path" in given:
        name = _imported(kind, given["class_path"])
        arguments = {**(given.get("init_args") or {})}
        unknown = given.keys() - {"class_path", "init_args"}
    else:
        name, arguments, unknown = given.get("name"), {**given}, set()
        arguments.pop("name", None)
    if unknown or not isinstance(name, str):
        raise FusionError(f"Expected {kind.option} as {{name: ..., arguments}}, got {dict(given)}; name a class")
    owner = class_of(kind, name)
    if owner is None:
        # A class that the program does not know cannot be asked for its arguments; it cannot be used either.
        return {"name": name, **arguments}
    known = _arguments_of_class(kind, owner)
    for argument in arguments:
        if argument not in known:
            close = did_you_mean(argument, known)
            raise FusionError(f"Expected an argument of {name}, got {argument}; {close}there are {', '.join(known)}")
    plain = {argument: _plain(value, kind, argument) for argument, value in arguments.items()}
    missing = [one for one, default in known.items() if default is Parameter.empty and one not in plain]
    if missing:
        raise FusionError(f"Expected {' and '.join(missing)} for {name}, got none; give --{kind.option}.{missing[0]}")
    # The learning rate stays, since it takes the place of the one that the module has an argument for.
    changed = {one: value for one, value in plain.items() if one == "lr" or value != _as_lists(known[one])}
    return {"name": name, **changed}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the question whether one of the known words was meant; nothing if none is like it."""
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


def default_lr(description: Description) -> float:
    """Return the learning rate that an optimizer has if none is given.

    Raises:
        FusionError: It has none.
    """
    owner = class_of(OPTIMIZER, description["name"])
    default = None if owner is None else signature(owner).parameters.get("lr")
    if default is None or not isinstance(default.default, float | int):
        raise FusionError(f"Expected a learning rate for {description['name']}, got none; give --optimizer.lr")
    return float(default.default)


def arguments_of(kind: Kind, name: str) -> dict[str, Any]:
    """Return the arguments that a description of one of PyTorch's classes may have, with their defaults."""
    return _arguments_of_class(kind, class_of(kind, name))


def _imported(kind: Kind, path: Any) -> str:
    """Return the name of the class that a path of the user leads to."""
    module, _, last = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module or kind.module.__name__), last, None)
    except ImportError:
        found = None
    own = getattr(kind.module, last, None)
    if found is not None and (found is own or (own is ReduceLROnPlateau and issubclass(found, own))):
        # Lightning has a class of that name that adds the metric to follow.
        return last
    if not isclass(found) or not issubclass(found, kind.base):
        raise unknown_class(kind, str(path))
    return f"{found.__module__}.{found.__qualname__}"


def unknown_class(kind: Kind, path: str) -> FusionError:
    """Return the error for a path that leads to no such class."""
    names = kind.names()
    return FusionError(
        f"Expected --{kind.option} to name a class of {kind.module.__name__}, got {path}; "
        f"{did_you_mean(path.rpartition('.')[2], names)}there are {', '.join(names)}"
    )


def class_of(kind: Kind, name: str) -> Any:
    """Return the class of a name; None for one of the user's own that the program does not have yet."""
    module, _, last = name.rpartition(".")
    if not module:
        if name not in kind.names():
            raise unknown_class(kind, name)
        return getattr(kind.module, name)
    found = getattr(sys.modules.get(module), last, None)
    return found if isclass(found) and issubclass(found, kind.base) else None


def _arguments_of_class(kind: Kind, owner: Any) -> dict[str, Any]:
    """Return the arguments that a description may have, with their defaults."""
    parameters = signature(owner).parameters.items()
    found = {name: one.default for name, one in parameters if name not in kind.given}
    return found | ({"monitor": Parameter.empty} if owner is ReduceLROnPlateau else {})


def _plain(value: Any, kind: Kind, name: str) -> Any:
    """Return a value with lists for tuples, if it is plain."""
    value = _as_lists(value)
    if name == "monitor" and value not in METRICS:
        raise FusionError(f"Expected --{kind.option}.monitor as one of {', '.join(METRICS)}, got {value}; choose one")
    if isinstance(value, list):
        return [_plain(item, kind, "") for item in value]
    if not isinstance(value, bool | int | float | str | None):
        raise FusionError(
            f"Expected plain values in {kind.option}, got {name or 'a value'} of type {type(value).__name__}; "
            f"choose another {kind.option}"
        )
    return value


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple | list) else value
