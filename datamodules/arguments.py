"""Checks of the data modules' plain arguments."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from clafusion.errors import FusionError

T = TypeVar("T")


def check_whole(name: str, value: object, minimum: int) -> None:
    """Refuse anything but a plain integer of at least `minimum`.

    Raises:
        FusionError: The value is of another type (bool and numpy integers included) or too small.
    """
    if type(value) is not int or value < minimum:
        raise FusionError(f"Expected {name} to be an integer of at least {minimum}, got {value!r}; change {name}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        FusionError: The value is of another type.
    """
    if type(value) is not bool:
        raise FusionError(f"Expected {name} to be true or false, got {value!r}; change {name}")


def check_path(name: str, value: object) -> None:
    """Refuse anything but a path as a string that is not empty.

    Raises:
        FusionError: The value is of another type or empty.
    """
    if type(value) is not str or not value:
        raise FusionError(f"Expected {name} to be a string, got {value!r}; write the folder's path")


def check_classes(name: str, labels: object) -> tuple[int, ...]:
    """Return class numbers as a tuple.

    Raises:
        FusionError: The value is no list, is empty, or has a class twice or something that is no class.
    """
    if not isinstance(labels, list | tuple) or not labels or len(set(labels)) < len(labels):
        raise FusionError(f"Expected {name} to be a list of different classes, got {labels!r}; change it")
    for label in labels:
        check_whole(f"each of {name}", label, 0)
    return tuple(labels)


def from_mapping(kind: type[T], value: T | Mapping[str, Any] | None, name: str) -> T | None:
    """Return the frozen value that a dictionary describes; None and such a value stay as they are.

    Args:
        kind: A dataclass with an attribute `kind`.
        value: What the user gave.
        name: What the message calls it.

    Raises:
        FusionError: The value is something else, or has a key that is no attribute.
    """
    if value is None or isinstance(value, kind):
        return value
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping) or "kind" not in value or not set(value) <= set(names):
        raise FusionError(f"Expected a {name} with kind and others of {', '.join(names)}, got {value!r}; change it")
    return kind(**value)
