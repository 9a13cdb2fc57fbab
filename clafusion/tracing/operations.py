"""The operations that the trace understands, by what they do to the neurons of their input.

Anything that is in none of these tables is refused by name: guessing would give a wrong network without a sign.
"""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

WEIGHTED = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# torchvision's depth-wise and ordinary blocks use nothing beyond these.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
)
# They act on every channel alone: what they return indexes the same neurons as what they are given.
CHANNELWISE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
ACTIVATION_CALLS: dict[Any, str] = {
    functional.relu: "ReLU",
    torch.relu: "ReLU",
    "relu": "ReLU",
    functional.relu6: "ReLU6",
    functional.leaky_relu: "LeakyReLU",
    functional.gelu: "GELU",
    functional.silu: "SiLU",
    functional.elu: "ELU",
    functional.hardswish: "Hardswish",
    functional.hardtanh: "Hardtanh",
    torch.tanh: "Tanh",
    "tanh": "Tanh",
    torch.sigmoid: "Sigmoid",
    "sigmoid": "Sigmoid",
}
CHANNELWISE_CALLS = {
    functional.dropout,
    functional.dropout2d,
    functional.max_pool2d,
    torch.max_pool2d,
    functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_max_pool2d,
    "contiguous",
}
FLATTEN_CALLS = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
MEAN_CALLS = {torch.mean, "mean"}
ADD_CALLS = {operator.add, torch.add, "add"}
# An operation that overwrites its input would change what another observer of that input sees.
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    torch.relu_: torch.relu,
    "add_": "add",
    "relu_": "relu",
}


def operation_name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Return the everyday name of the operation of a node: `Conv2d`, `torch.cat`, `.permute()`."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    if node.op == "call_method":
        return f".{node.target}()"
    if node.op == "get_attr":
        return f"the parameter {node.target!r} used directly"
    return getattr(node.target, "__name__", str(node.target))


def activation_name(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the activation that a node applies, or None."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module).__name__ if isinstance(module, ACTIVATIONS) else None
    return ACTIVATION_CALLS.get(node.target)


def is_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a BatchNorm."""
    return node.op == "call_module" and isinstance(modules[str(node.target)], NORMS)


def is_weighted(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a Linear or a Conv2d."""
    return node.op == "call_module" and isinstance(modules[str(node.target)], WEIGHTED)
