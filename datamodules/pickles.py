"""A reader of CIFAR's pickled batches that runs nothing of what a pickle names.

An unpickler calls what the file names. This one notes the calls; those that make byte strings and arrays of integers
are carried out afterwards, and all others are refused.
"""

import io
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clafusion.errors import FusionError

_RECONSTRUCT = "numpy.core.multiarray._reconstruct"
_FROMBUFFER = "numpy.core.numeric._frombuffer"
_NAMES = {_RECONSTRUCT, _FROMBUFFER, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}
#: The instructions that make sets, which no such file holds.
_SETS = pickle.EMPTY_SET + pickle.ADDITEMS + pickle.FROZENSET


class _Call:
    """A call that a pickle asks for, with the state that its result is to have."""

    state: Any = None

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments


class _Entries(list[tuple[Any, Any]]):
    """The entries of a dictionary; a real one can be made to look up a key for ever (tuples of tuples of tuples)."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))


def _load_empty_dict(unpickler: Any) -> None:
    unpickler.append(_Entries())


def _load_dict(unpickler: Any) -> None:
    items = unpickler.pop_mark()
    unpickler.append(_Entries(zip(items[::2], items[1::2], strict=True)))


def _load_build(unpickler: Any) -> None:
    state, call = unpickler.stack.pop(), unpickler.stack[-1]
    if not isinstance(call, _Call):
        raise pickle.UnpicklingError("it changes the meaning of a name")
    call.state = state


class _PlainUnpickler(pickle._Unpickler):
    """Python's unpickler as written in Python: a number in a file tells the one in C how much memory to fill."""

    dispatch = {
        **{code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _SETS},
        pickle.EMPTY_DICT[0]: _load_empty_dict,
        pickle.DICT[0]: _load_dict,
        pickle.BUILD[0]: _load_build,
        # Mutable bytes would take the memory that the file claims before they are read.
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which such a file does not need")
        return partial(_Call, full)


def _value(value: Any) -> Any:
    """Carry out a call that makes a byte string, an integer type or an array of integers; refuse any other."""
    if not isinstance(value, _Call):
        return value
    match value.name, value.arguments, value.state:
        case "_codecs.encode", (str(text), "latin1"), None:
            return text.encode("latin1")
        case "_codecs.encode", (_, str(encoding), *_), _:
            raise pickle.UnpicklingError(f"it encodes text as {encoding}")
        case "numpy.dtype", (code, *_), state:
            name = _text(code)
            if not re.fullmatch(r"[iu][1248]", name):
                raise pickle.UnpicklingError(f"its arrays are of type {name}")
            order: Any = _text(state[1])
            return np.dtype(name).newbyteorder(order)
        case name, _, (_, shape, _Call(name="numpy.dtype") as dtype, fortran, content) if name == _RECONSTRUCT:
            return np.frombuffer(_value(content), _value(dtype)).reshape(shape, order="F" if fortran else "C")
        case name, (content, _Call(name="numpy.dtype") as dtype, shape, order), None if name == _FROMBUFFER:
            return np.frombuffer(content, _value(dtype)).reshape(shape, order=order)
    raise pickle.UnpicklingError("it builds an array in an unusual way")


def _text(value: Any) -> str:
    """Return a text, which Python 2 wrote as bytes."""
    return value if isinstance(value, str) else bytes.decode(value, "ascii")


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
        if not isinstance(content, _Entries):
            raise pickle.UnpicklingError(f"it holds a {type(_value(content)).__name__}")
        return {_text(_value(key)): _value(value) for key, value in content}
    # A damaged pickle may raise nearly anything, from IndexError to MemoryError.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FusionError(
            f"Expected an intact file of plain images and labels, got {path} that cannot be used "
            f"({type(error).__name__}: {reason}); fetch it again from where you trust it"
        ) from error
