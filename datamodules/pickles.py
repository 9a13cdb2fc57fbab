"""A reader of CIFAR's pickled batches that runs nothing of what a pickle names.

An unpickler calls what the file names. This one looks every name up in a short table of stand-ins, which make byte
strings and arrays of integers; numpy's own functions are out of the file's reach.
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from clafusion.errors import FusionError


class _Integers:
    """Stand-in for `numpy.dtype`: an integer type, whose byte order comes as its state."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        name = _text(code)
        if not re.fullmatch(r"[iu][1248]", name):
            raise pickle.UnpicklingError(f"its arrays are of type {name}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = _text(state[1])
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for an array, whose shape, type and content come as its state."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, integers, fortran, content = state
        self.value = _filled_array(content, integers, shape, "F" if fortran else "C")


def _filled_array(content: bytes, integers: _Integers, shape: tuple[int, ...], order: Any) -> "np.ndarray[Any, Any]":
    return np.frombuffer(content, integers.dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, by which protocol 2 spells a byte string."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _no_call(*_: Any) -> NoReturn:
    """Stand-in for `numpy.ndarray`, which a pickle names but does not call."""
    raise pickle.UnpicklingError("it builds an array in an unusual way")


_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Integers,
    "numpy.ndarray": _no_call,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _filled_array,
    "numpy._core.numeric._frombuffer": _filled_array,
    "_codecs.encode": _latin1,
}

#: The instructions that look things up by their hash, and where those lie on the stack then.
_HASHED = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.DICT: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
_LOAD: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)


def _with_text_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Refuse keys that can take for ever to look up: tuples of tuples, sets of sets, numbers of equal hashes."""

    def checked(unpickler: Any) -> None:
        if not all(isinstance(key, bytes | str) for key in unpickler.stack[keys]):
            raise pickle.UnpicklingError("it looks up other things than text")
        load(unpickler)

    return checked


def _build(unpickler: Any) -> None:
    target, state = unpickler.stack[-2:]
    if not isinstance(target, _Array | _Integers):
        raise pickle.UnpicklingError("it changes the meaning of a name")
    target.__setstate__(state)
    unpickler.stack.pop()


class _PlainUnpickler(pickle._Unpickler):
    """Python's unpickler as written in Python: a number in a file tells the one in C how much memory to fill."""

    dispatch = {
        **_LOAD,
        **{code[0]: _with_text_keys(_LOAD[code[0]], keys) for code, keys in _HASHED.items()},
        pickle.BUILD[0]: _build,
        # Mutable bytes would take the memory that the file claims before they are read.
        pickle.BYTEARRAY8[0]: _LOAD[pickle.BINBYTES8[0]],
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        stand_in = _STAND_INS.get(f"{module}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which such a file does not need")
        return stand_in


def _text(value: str | bytes) -> str:
    """Python 2 wrote its text as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else value


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of plain values and integer arrays; run no code of the file.

    The file may be of Python 2 (protocol 2, as CIFAR is published) or of today's Python and numpy (any protocol).

    Args:
        path: The file.

    Returns:
        The dictionary, its keys as text, its arrays as numpy arrays.

    Raises:
        FusionError: The file cannot be read, is truncated, or holds or names anything else; the message names it.
    """
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {_text(key): value.value if isinstance(value, _Array) else value for key, value in content.items()}
    # A damaged pickle may raise nearly anything, from IndexError to MemoryError.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FusionError(
            f"Expected an intact file of plain images and labels, got {path} that cannot be used "
            f"({type(error).__name__}: {reason}); fetch it again from where you trust it"
        ) from error
