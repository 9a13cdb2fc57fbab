"""When two networks have the same graph: equal classes, attributes and shapes, whatever their weights."""

import functools
import hashlib
import pickle
import types
from collections.abc import Hashable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.tracing.example import INPUT_SHAPE

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.Size, Enum, range)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
#: The attributes that every module has, which are accounted for otherwise or are of no account in eval mode.
_COMMON = frozenset(vars(nn.Module())) | {"inplace", INPUT_SHAPE}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: An object whose state takes more bytes than this is not compared.
_LONGEST = 2**20


class _UnknownError(Exception):
    """An attribute that cannot be compared."""


def fingerprint(model: nn.Module, example: Tensor) -> Hashable | None:
    """A value that is equal for networks with the same graph; None for a network of which that cannot be said.

    Args:
        model: a network.
        example: samples [samples, ...] that it is read with.
    """
    try:
        modules = tuple(
            (name, type(module), _attributes(module)) for name, module in model.named_modules(remove_duplicate=False)
        )
        return modules, _tensors(model), tuple(example.shape[1:]), example.dtype, torch.get_default_dtype()
    except _UnknownError:
        return None


def _attributes(module: nn.Module) -> Hashable:
    return tuple((key, _value(value)) for key, value in sorted(vars(module).items()) if key not in _COMMON)


def _value(value: Any) -> Hashable:
    if isinstance(value, _PLAIN) and type(value) is not tuple:
        return type(value), value
    if isinstance(value, _FUNCTIONS):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        items = map(_value, value)
        return type(value), frozenset(items) if isinstance(value, set | frozenset) else tuple(items)
    if isinstance(value, dict):
        return type(value), tuple((_value(key), _value(one)) for key, one in value.items())
    if isinstance(value, functools.partial):
        return functools.partial, _value(value.func), _value(value.args), _value(value.keywords)
    if isinstance(value, nn.Module | Tensor):
        raise _UnknownError
    try:
        state = pickle.dumps(value)
    except Exception as error:  # whatever an object does that cannot be pickled
        raise _UnknownError from error
    if len(state) > _LONGEST:
        raise _UnknownError
    return type(value), state


def _tensors(model: nn.Module) -> Hashable:
    """The shapes of all tensors, which of them are one, and the values of those that are constants."""
    first: dict[int, int] = {}
    found: list[Hashable] = []
    for number, (name, one) in enumerate(model.named_parameters(remove_duplicate=False)):
        found.append((name, tuple(one.shape), one.dtype, one.device, first.setdefault(id(one), number)))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        digest = None if name.rpartition(".")[2] in _STATISTICS else _digest(buffer)
        found.append((name, tuple(buffer.shape), buffer.dtype, buffer.device, digest))
    return tuple(found)


def _digest(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()
