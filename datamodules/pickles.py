"""Reads CIFAR's pickled batches without ever running what a pickle asks for.

Unpickling calls whatever the file names. Here every name is looked up in a short table of stand-ins that can build
nothing but byte strings and arrays of integers; numpy's own reconstruction is not exposed to the file either.
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clafusion.errors import FusionError

#: Tuples in each other: the arguments of an array hold its shape.
_DEEPEST = 4


class _StandIn:
    """What a name in a pickle stands for: callable, and nothing else; the file cannot alter it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes the meaning of a name")


class _Integers:
    """Stands in for `numpy.dtype`: an integer type and its byte order."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if not re.fullmatch(r"[iu][1248]", text):
            raise pickle.UnpicklingError(f"its arrays are of type {text}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for `numpy.ndarray`: its value comes with its state."""

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, integers, fortran, content = state
        raw = content.encode("latin1") if isinstance(content, str) else content
        self.value = np.frombuffer(raw, integers.dtype).reshape(shape, order="F" if fortran else "C")


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _filled_array(content: bytes, integers: _Integers, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, integers, order == "F", content))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which protocol 2 spells a byte string."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _no_call(*_: Any) -> None:
    raise pickle.UnpicklingError("it builds an array in an unusual way")


_KNOWN: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Integers,
    "numpy.ndarray": _no_call,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.numeric._frombuffer": _filled_array,
    "numpy._core.numeric._frombuffer": _filled_array,
    "_codecs.encode": _latin1,
}


def _depth(value: Any) -> int:
    """How deep tuples lie in each other, as far as that matters."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, tuple) else 0


def _shallow(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """The instruction that makes a tuple, for tuples that a dict can look up in no time."""

    def loaded(unpickler: Any) -> None:
        load(unpickler)
        if _depth(unpickler.stack[-1]) > _DEEPEST:
            raise pickle.UnpicklingError("it holds tuples in tuples without end")

    return loaded


def _load_bytearray(unpickler: Any) -> None:
    """The instruction for mutable bytes, which otherwise takes the memory that the file claims."""
    unpickler.append(bytearray(unpickler.read(int.from_bytes(unpickler.read(8), "little"))))


def _dispatch() -> dict[int, Callable[[Any], None]]:
    """What is done at each instruction of a pickle."""
    known: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)
    makers = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    return {**known, pickle.BYTEARRAY8[0]: _load_bytearray, **{maker[0]: _shallow(known[maker[0]]) for maker in makers}}


class _PlainUnpickler(pickle._Unpickler):
    """Knows byte strings, numbers, containers and integer arrays; refuses every other name.

    The one that is written in Python: a number in a file tells the other one how much memory to fill.
    """

    dispatch = _dispatch()

    def find_class(self, module: str, name: str) -> _StandIn:
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which such a file does not need")
        return _StandIn(known)


def _text(key: Any) -> str:
    """A key as text: Python 2 wrote its strings as bytes."""
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _bare(value: Any) -> Any:
    """The array in its stand-in; anything else as it is."""
    return value.value if isinstance(value, _Array) else value


def read_pickle(path: Path) -> dict[str, Any]:
    """Reads a pickled dictionary of plain values and integer arrays; runs no code of the file.

    Both what Python 2 wrote (protocol 2, as CIFAR is published) and what today's Python and numpy write is understood.

    Args:
        path: The file.

    Returns:
        The dictionary, its keys as text, its arrays as numpy arrays.

    Raises:
        FusionError: The file cannot be read, is truncated, or holds or names anything else; the message names it.
    """
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        entries = {_text(key): _bare(value) for key, value in content.items()}
    # A damaged pickle may raise nearly anything, from IndexError to MemoryError.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FusionError(
            f"Expected an intact file of plain images and labels, got {path} that cannot be used "
            f"({type(error).__name__}: {reason}); fetch it again from where you trust it"
        ) from error
    return entries
