"""Networks in files of the first version: graphs of torch.fx over modules and functions of torch.nn. Only read.

torch.fx generates Python code from a graph, so such a graph is code. That is why every name must be a plain
identifier, every operation and every module class comes from a table below, and every argument is a number, a flag,
`None`, or one of a few words.
"""

import copy
import math
import operator
import re
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from clafusion.errors import FusionError

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "builtins.getattr": getattr,  # only of "shape": see _check_getattr
    **{f"operator.{name}": getattr(operator, name) for name in ("add", "iadd", "getitem")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("add", "flatten", "max_pool2d", "mean", "relu", "relu_", "reshape", "sigmoid", "tanh")
    },
    **{
        f"torch.nn.functional.{name}": getattr(F, name)
        for name in (
            *("relu", "relu6", "leaky_relu", "gelu", "silu", "hardswish", "hardtanh", "elu"),
            *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
        )
    },
}
_METHODS = frozenset(
    ("add", "add_", "contiguous", "flatten", "mean", "relu", "relu_", "reshape", "sigmoid", "size", "tanh", "view")
)
_WORDS = frozenset(("shape", "none", "tanh", "zeros", "reflect", "replicate", "circular", "same", "valid"))

_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_WINDOW = ("kernel_size", "stride", "padding")
_MODULES: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv2d: ("in_channels", "out_channels", *_WINDOW, "dilation", "groups", "bias", "padding_mode"),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.SiLU: ("inplace",),
    nn.Hardswish: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.GELU: ("approximate",),
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.Identity: (),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.MaxPool2d: (*_WINDOW, "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.Flatten: ("start_dim", "end_dim"),
}
"""The modules a stored graph may call, and the constructor arguments that make one again."""
_CLASSES = {kind.__name__: kind for kind in _MODULES}

# Far more than any network needs; a forged list of empty modules would otherwise grow a small file into gigabytes.
_MOST_NODES = 20_000
_RESERVED = frozenset(dir(fx.GraphModule)) | frozenset(vars(nn.Module()))
#: Of what a graph module is made from, in its `meta`, which copies of it keep.
_KEY = "clafusion"
_SHADOWING = frozenset(("self", "torch", "operator", "getattr", "device"))


def decode(data: Mapping[str, Any]) -> fx.GraphModule:
    """Rebuild a network from its description, with fresh random weights.

    Args:
        data: `{"name": "graph", "nodes": [...], "modules": {...}}`, possibly from a file, possibly forged.

    Returns:
        A graph module in training mode whose parameters have the names and the order of the described network's;
        `description_of` knows what it was made from.

    Raises:
        FusionError: The data holds a name, operation or argument that the first version would not have written.
    """
    if len(data["nodes"]) + len(data["modules"]) > _MOST_NODES:
        raise FusionError(f"Expected at most {_MOST_NODES} nodes and modules, got more; save a smaller network")
    network = fx.GraphModule({}, fx.Graph())  # filled below in the order of the modules, which optimisers rely on
    for path, settings in data["modules"].items():
        _check_path(path)
        network.add_submodule(path, _decode_module(path, settings))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        _decode_node(entry, graph, nodes, data["modules"])
    if not nodes or entry["op"] != "output":
        raise FusionError("Expected a graph that ends in an output, got none; save the network again")
    graph.lint()
    network.graph = graph
    network.meta[_KEY] = copy.deepcopy(dict(data))
    return network


def description_of(model: nn.Module) -> dict[str, Any] | None:
    """The description that a network was decoded from; None for another network."""
    described: dict[str, Any] | None = model.meta.get(_KEY) if isinstance(model, fx.GraphModule) else None
    return copy.deepcopy(described)


def _decode_module(path: str, settings: Mapping[str, Any]) -> nn.Module:
    kind = _CLASSES.get(settings["type"])
    if kind is None:
        raise FusionError(
            f"Expected modules among {', '.join(_CLASSES)}, got {settings['type']!r} at {path!r}; remove it"
        )
    arguments = {name: _check_setting(value, path) for name, value in settings.items() if name != "type"}
    if set(arguments) != set(_MODULES[kind]):
        raise FusionError(f"Expected {path!r} to have {sorted(_MODULES[kind])}, got {sorted(arguments)}; save it again")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()})


def _decode_node(
    entry: Mapping[str, Any], graph: fx.Graph, nodes: dict[str, fx.Node], modules: Mapping[str, Any]
) -> None:
    """Append one node to the graph and to `nodes`."""
    op, name, target = entry["op"], _check_name(entry["name"]), entry["target"]
    args = tuple(_decode_value(value, nodes, name) for value in entry["args"])
    kwargs = {_check_name(key): _decode_value(value, nodes, name) for key, value in entry["kwargs"].items()}
    known = {
        "placeholder": isinstance(target, str) and _is_name(target),
        "call_function": target in _FUNCTIONS,
        "call_method": target in _METHODS,
        "call_module": target in modules,
        "output": target == "output",
    }
    if not known.get(op, False):
        raise FusionError(
            f"Expected an operation that can be stored, got {op!r} {target!r} at node {name!r}; remove it"
        )
    if target == "builtins.getattr" and (args[1:] != ("shape",) or kwargs):
        raise FusionError(f"Expected only the attribute 'shape', got {args[1:]} at node {name!r}; remove it")
    node = graph.create_node(op, _FUNCTIONS[target] if op == "call_function" else target, args, kwargs, name)
    if node.name != name:  # taken, or shadowing what the generated code uses
        raise FusionError(f"Expected a free node name, got {name!r}; rename the node")
    nodes[name] = node


def _decode_value(value: Any, nodes: Mapping[str, fx.Node], name: str) -> Any:
    if isinstance(value, list):
        return [_decode_value(part, nodes, name) for part in value]
    if not isinstance(value, dict):
        return _check_plain(value, f"node {name!r}")
    ((kind, content),) = value.items()
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode_value(part, nodes, name) for part in content)
    if kind == "slice" and len(content) == 3:
        return slice(*(_decode_value(part, nodes, name) for part in content))
    raise FusionError(f"Expected an earlier node, a tuple or a slice, got {value!r} at node {name!r}; save it again")


def _check_plain(value: Any, place: str) -> Any:
    """Return a number, flag, None or known word; code is generated from it, so nothing else may pass."""
    known = isinstance(value, str) and value in _WORDS
    if not (known or value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value))):
        raise FusionError(f"Expected plain numbers and flags as arguments, got {value!r} at {place}; replace it")
    return value


def _check_setting(value: Any, path: str) -> Any:
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        _check_plain(part, f"module {path!r}")
    return value


def _is_name(value: Any) -> bool:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is not None
    return plain and not iskeyword(value) and value not in _SHADOWING


def _check_name(value: Any) -> str:
    if not _is_name(value):
        raise FusionError(f"Expected a plain identifier as a name, got {value!r}; rename it")
    return str(value)


def _check_path(path: str) -> None:
    """A dotted module name: each part a plain word that hides nothing of nn.Module or GraphModule."""
    for part in path.split("."):
        if not re.fullmatch(r"[A-Za-z0-9_]+", part) or iskeyword(part) or part in _RESERVED:
            raise FusionError(f"Expected a plain dotted module name, got {path!r}; rename the module")
