"""The one exception that says: this input cannot be used, and here is what to do about it."""

from collections.abc import Mapping
from typing import Any


class FusionError(ValueError):
    """An input that CLAFusion cannot use.

    The message is one line: what was expected, what came, and what to do next. The command line prints it and exits
    with code 2; a library caller may catch it as a `ValueError`.
    """


def in_words(value: Any) -> str:
    """A value in a few words, for messages: its type, and what is in it or its shape."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"{name} with {', '.join(repr(key) for key in value) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"{name} of {', '.join(type(one).__name__ for one in value) or 'nothing'}"
    shape = getattr(value, "shape", None)
    return name if shape is None else f"{name} of shape {list(shape)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
