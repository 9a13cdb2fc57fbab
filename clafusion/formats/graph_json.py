"""A captured network as plain JSON data, and back: operations of a table on tensors by name. No code, no pickle.

A node is its operation and its arguments: `["aten.linear.default", [{"node": 3}, {"tensor": "fc.weight"}], {}]`. An
argument is a number, a flag, `None`, a known word, a list, or one of the references and types of `_encode_value`.
The data type of the network is written as `"float"`, so that a graph follows its network into another precision.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from clafusion.errors import FusionError
from clafusion.formats.stored_operations import CREATIONS, FUNCTIONS, NAMES, OPERATIONS, overload_of
from clafusion.tracing.exporting import Capture, module_path

FORMAT = {"name": "aten", "version": 1}
#: The data types by the names in a description; "float" is that of the network.
DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}
_MEMORY = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}
_MEMORY = {**_MEMORY, "channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
_WORDS = frozenset(
    ("none", "tanh", "same", "valid", "constant", "reflect", "replicate", "circular", "floor", "trunc", "ij", "xy")
)
_EQUATION = re.compile(r"[A-Za-z., >-]{1,200}")
#: Far more than any network needs; a forged file would otherwise keep a reader busy for long.
MOST_NODES = 20_000
_DEEPEST = 4
#: Numbers in a tensor that a graph makes out of nothing, at most.
_LARGEST = 2**28
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
#: Says the same as the default, of every operation.
_OMITTED = {"layout": (None, torch.strided), "pin_memory": (None, False), "generator": (None,)}


@dataclass(frozen=True)
class Reference:
    """A value that is known when the graph runs.

    Attributes:
        source: "node", "tensor", "input", or "setting" for the data type and the device of the network.
        key: the number of the node, the name of the tensor, or the word of a setting.
        kind: "tensor", "tensors" or "number"; "dtype" or "device" for a setting.
    """

    source: str
    key: Any
    kind: str


@dataclass(frozen=True)
class Step:
    """A call: the function of a name of the table, and its arguments, in which references stand for values."""

    operation: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kind: str

    @property
    def references(self) -> Iterator[Reference]:
        """All references in the arguments."""
        return _references([*self.args, *self.kwargs.values()])


def check_storable(capture: Capture) -> None:
    """Refuse a network that `save_network` cannot write, before anything is computed.

    Raises:
        FusionError: It has an operation or an argument that is not in the tables; the message names both and the
            module.
    """
    encode_nodes(capture, {name: name for name in capture.names.values()}, torch.float32)


def encode_nodes(capture: Capture, stored: Mapping[str, str], dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """The nodes of a graph as JSON-able data, and the reference to the logits.

    Args:
        capture: the graph.
        stored: the names under which its tensors are stored, by their names in the capture.
        dtype: the type that is written as "float".
    """
    known: dict[fx.Node, dict[str, Any]] = {}
    nodes: list[Any] = []
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            entry = node.name == capture.entry
            known[node] = {"input": 0} if entry else {"tensor": stored[capture.names[node.name]]}
        elif node.op == "call_function":
            nodes.append(_encode_node(node, known, dtype))
            known[node] = {"node": len(nodes) - 1}
    if len(nodes) > MOST_NODES:
        raise FusionError(f"Expected at most {MOST_NODES} operations, got {len(nodes)}; save a smaller network")
    return nodes, next(known[node] for node in known if node.name == capture.logits)


def _encode_node(node: fx.Node, known: Mapping[fx.Node, Any], dtype: torch.dtype) -> list[Any]:
    name = NAMES.get(node.target) or str(node.target)
    place = f"{name} in {module_path(node) or 'the network'}"
    if name not in OPERATIONS and name not in FUNCTIONS:
        own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"
        why = "which PyTorch does not have elsewhere" if own else "which is not among those that are stored"
        remedy = "write it with functions of torch" if own else "replace it, or keep network.state_dict()"
        raise FusionError(f"Expected operations that can be stored, got {place}, {why}; {remedy}")
    kwargs = {
        key: _encode_value(value, known, dtype, place)
        for key, value in node.kwargs.items()
        if value not in _OMITTED.get(key, ())
    }
    return [name, [_encode_value(value, known, dtype, place) for value in node.args], kwargs]


def _encode_value(value: Any, known: Mapping[fx.Node, Any], dtype: torch.dtype, place: str) -> Any:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, list | tuple):
        return [_encode_value(part, known, dtype, place) for part in value]
    if isinstance(value, torch.dtype) and value == dtype:
        return {"dtype": "float"}
    for key, table in (("dtype", DTYPES), ("memory_format", _MEMORY)):
        name = next((name for name, one in table.items() if one is value), None)
        if name is not None:
            return {key: name}
    if isinstance(value, torch.device):
        return {"device": "input"}
    if type(value) is float and not math.isfinite(value):
        return {"number": str(value)}
    return _check_plain(value, place)


def decode_nodes(nodes: Any, tensors: Collection[str]) -> list[Step]:
    """The calls of a graph, checked: each is in the table, and its arguments are what it takes.

    Args:
        nodes: what `encode_nodes` wrote, possibly from a file, possibly forged.
        tensors: the names of the tensors of the network.

    Raises:
        FusionError: The data holds an operation or argument that `encode_nodes` would not have written.
    """
    if not isinstance(nodes, list) or len(nodes) > MOST_NODES:
        raise FusionError(f"Expected a list of at most {MOST_NODES} operations, got another; save a smaller network")
    steps: list[Step] = []
    for number, entry in enumerate(nodes):
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, list, dict]:
            raise FusionError(f"Expected operation {number} as [name, arguments, options]; save the network again")
        steps.append(_decode_node(entry[0], entry[1], entry[2], steps, tensors))
    return steps


def _decode_node(name: str, args: Any, kwargs: Any, steps: Sequence[Step], tensors: Collection[str]) -> Step:
    place = f"{name[:80]!r}, operation {len(steps)}"
    values = tuple(decode_value(value, steps, tensors, place) for value in args)
    options = {key: decode_value(value, steps, tensors, place) for key, value in kwargs.items()}
    if name in FUNCTIONS:
        kind = _check_function(name, values, options, place)
        return Step(name, FUNCTIONS[name], values, options, kind)
    function = overload_of(name)
    if function is None:
        why = "which this PyTorch lacks; install a newer one" if name in OPERATIONS else "which is none; remove it"
        raise FusionError(f"Expected an operation that can be stored, got {place}, {why}")
    if function._schema.is_mutable:
        raise FusionError(f"Expected an operation that writes into nothing, got {place}; install another PyTorch")
    _check_arguments(function._schema, values, options, place)
    if name in CREATIONS and _size_of(name, values) > _LARGEST:
        raise FusionError(f"Expected a tensor of at most {_LARGEST:,} numbers from {place}, got more; remove it")
    return Step(name, function, values, options, _kind_of(function._schema))


def decode_value(value: Any, steps: Sequence[Step], tensors: Collection[str], place: str, depth: int = 0) -> Any:
    """An argument: plain, or a `Reference`."""
    if isinstance(value, list) and depth < _DEEPEST:
        return [decode_value(part, steps, tensors, place, depth + 1) for part in value]
    if not isinstance(value, dict):
        return _check_plain(value, place)
    kind, key = next(iter(value.items())) if len(value) == 1 else (None, None)
    if kind == "node" and type(key) is int and 0 <= key < len(steps):
        return Reference("node", key, steps[key].kind)
    if kind == "tensor" and isinstance(key, str) and key in tensors:
        return Reference("tensor", key, "tensor")
    if kind == "input" and type(key) is int and key == 0:
        return Reference("input", 0, "tensor")
    settings = {("dtype", "float"): "dtype", ("device", "input"): "device"}
    if isinstance(key, str) and (str(kind), key) in settings:
        return Reference("setting", key, settings[str(kind), key])
    table: Mapping[Any, Any] = {"dtype": DTYPES, "memory_format": _MEMORY, "number": _SPECIAL}.get(str(kind), {})
    if isinstance(key, str) and key in table:
        return table[key]
    raise FusionError(f"Expected an earlier operation, a tensor or a type at {place}, got another; save it again")


def _check_plain(value: Any, place: str) -> Any:
    """Return a number, flag, None or known word."""
    known = isinstance(value, str) and (value in _WORDS or ("einsum" in place and _EQUATION.fullmatch(value)))
    number = (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))
    if not (known or number or value is None or type(value) is bool):
        shown = repr(value) if isinstance(value, str | int | torch.dtype) else type(value).__name__
        raise FusionError(f"Expected plain numbers and flags as arguments of {place}, got {shown[:80]}; replace it")
    return value


def _check_function(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], place: str) -> str:
    """Return the kind of what a function of Python gives."""
    if kwargs or len(args) != 2:
        raise FusionError(f"Expected two arguments of {place}, got others; save the network again")
    first = args[0].kind if isinstance(args[0], Reference) else None
    if name == "getitem" and first == "tensors" and type(args[1]) is int:
        return "tensor"
    if name == "getitem" or not all(_fits("number", value) for value in args):
        raise FusionError(f"Expected numbers, or a part of several tensors, at {place}; save the network again")
    return "number"


def _check_arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any], place: str) -> None:
    """Refuse arguments that an operation does not take, before it is called."""
    positional = [one for one in schema.arguments if not one.kwarg_only]
    given = dict(zip([one.name for one in positional], args, strict=False))
    known = {one.name: one for one in schema.arguments}
    if len(args) > len(positional) or given.keys() & kwargs.keys() or not kwargs.keys() <= known.keys():
        raise FusionError(f"Expected arguments that {place} takes, got others; save the network again")
    given.update(kwargs)
    for name, one in known.items():
        if name not in given and not one.has_default_value():
            raise FusionError(f"Expected {name} of {place}, got none; save the network again")
        if name in _OMITTED and given.get(name) is not None:
            raise FusionError(f"Expected no {name} of {place}, got one; save the network again")
        if name in given and not _fits_argument(name, str(one.type), given[name]):
            raise FusionError(f"Expected {name} of {place} as a {one.type}, got another; save the network again")


def _fits_argument(name: str, kind: str, value: Any) -> bool:
    if name in ("dtype", "device", "memory_format"):  # integers, by the schema
        type_of = {"dtype": torch.dtype, "device": torch.device, "memory_format": torch.memory_format}[name]
        setting = isinstance(value, Reference) and value.kind == name
        return setting or isinstance(value, type_of) or (value is None and kind.startswith("Optional"))
    return _fits(kind, value)


def _fits(kind: str, value: Any) -> bool:
    """Whether a value is of a type of the schemas of PyTorch."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value)
    if kind.startswith("List["):
        inner = kind[5:-1]
        if isinstance(value, list):
            return all(_fits(inner, part) for part in value)
        several = isinstance(value, Reference) and value.kind == "tensors" and inner == "Tensor"
        return several or (inner in ("int", "float") and _fits(inner, value))
    if isinstance(value, Reference):
        return value.kind == ("tensor" if kind == "Tensor" else "number") and kind not in ("str", "bool")
    types = {"int": (int,), "bool": (bool, int), "str": (str,)}
    return isinstance(value, types.get(kind, (int, float)) if kind in _PLAIN else ())


_PLAIN = frozenset(("int", "bool", "str", "float", "number", "Tensor"))


def _kind_of(schema: Any) -> str:
    """The kind of what an operation returns."""
    kinds = [str(one.type) for one in schema.returns]
    if len(kinds) > 1 or kinds == ["List[Tensor]"]:
        return "tensors"
    return "tensor" if kinds == ["Tensor"] else "number"


def _size_of(name: str, args: Sequence[Any]) -> float:
    """The number of elements that a creation is asked for, as far as the graph says."""
    if name.startswith("aten.arange"):
        plain = [value for value in args if isinstance(value, int | float)]
        if len(plain) < len(args):
            return 0
        start, end = (0, plain[0]) if len(plain) == 1 else plain[:2]
        return abs(end - start) / (abs(plain[2]) if len(plain) > 2 and plain[2] else 1)
    sizes = args[1 if ".new_" in name else 0]
    return math.prod(value for value in (sizes if isinstance(sizes, list) else [sizes]) if type(value) is int)


def _references(value: Any) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)
