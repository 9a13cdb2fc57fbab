"""Frozen values from the plain containers of a file; an unknown key or a wrong type is an error that names the key.

jsonargparse, which parses the command line, does not name the key inside a dict of dataclasses ("Not a valid subclass
of Parent"), and answers a wrong value of an optional dataclass with a page: an experiment is made of both.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clafusion.errors import FusionError

T = TypeVar("T")


def from_plain(kind: type[T], values: Any, where: str) -> T:
    """Make a dataclass, and those in it, from plain containers.

    Args:
        kind: A dataclass whose fields are plain values, lists, dicts and dataclasses.
        values: A dict of its fields.
        where: Its name in the message, such as `experiment.finetune`.

    Raises:
        FusionError: A key is unknown or missing, or a value is not of its type; the message names the key.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Point:
        ...     x: float
        >>> from_plain(Point, {"x": 3}, "point").x
        3.0
    """
    if not isinstance(values, Mapping):
        raise FusionError(f"Expected {where} to hold names and values, got {values!r}; change {where}")
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            guess = "".join(f"; did you mean {near}?" for near in get_close_matches(str(name), hints, 1))
            raise FusionError(f"Expected {where} to hold {', '.join(hints)}, got {where}.{name}{guess}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise FusionError(f"Expected {where}.{field.name}, got none; add it")
    found = {name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**found)
    except FusionError as error:
        raise error if where in str(error) else FusionError(f"{error} (in {where})") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the hinted type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) == 1:
            return _value(kinds[0], value, where)
        for kind in kinds:
            with suppress(FusionError):
                return _value(kind, value, where)
        raise FusionError(f"Expected {where} to be {' or '.join(map(_words, kinds))}, got {value!r}; change {where}")
    if is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin in (list, Sequence) and isinstance(value, list | tuple):
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {_value(str, name, where): _value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Any or (origin is Literal and value in arguments) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise FusionError(f"Expected {where} to be {_words(hint)}, got {value!r}; change {where}")


def _words(hint: Any) -> str:
    """Return the words for a type in a message."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return _NAMES.get(get_origin(hint) or hint, str(hint))


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    Sequence: "a list",
    dict: "names and values",
}
