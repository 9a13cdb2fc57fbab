"""Networks as `torch.fx` graphs: captured without touching the model, and cut into segments."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from clafusion.errors import FusionError
from clafusion.tracing.execution import GraphRunner, tensor_nodes
from clafusion.tracing.operations import OUT_OF_PLACE


def shell(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares the tensors of `model` but none of its hooks.

    Running it changes nothing in `model`: no mode, no running statistics (eval), no activation in place.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = strip_hooks(copy.deepcopy(model, shared)).eval()
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return copied


def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without hooks and with gradients switched on."""
    return strip_hooks(copy.deepcopy(model)).eval().requires_grad_(True)


def strip_hooks(model: nn.Module) -> nn.Module:
    """Drop every hook of `model` (a copy of the user's): a hook of the user's must not fire while we measure."""
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    return model


def capture(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Any]:
    """Trace `model` symbolically and run it once: every node's `meta["shape"]` is its output's shape, or None.

    Args:
        model: a network whose forward takes one tensor; left as it is.
        example: a batch that it accepts, [samples, ...].

    Returns:
        A graph module that shares the tensors of `model`, in eval mode, with every operation out of place; and what it
        gives for the example.

    Raises:
        FusionError: if torch.fx cannot trace the network, a parameter is not used, or it does not accept the example.
    """
    copied = shell(model)
    try:
        module = fx.symbolic_trace(copied)
    except Exception as error:  # torch.fx raises many types; each means the same to the user
        raise FusionError(
            f"Expected a network that torch.fx can trace, got {type(model).__name__}: {_first_line(error)}"
        ) from error
    _check_all_run(copied, module)
    for node in module.graph.nodes:
        node.target = OUT_OF_PLACE.get(node.target, node.target)
        if node.op == "call_function" and "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
    module.recompile()
    return module, _record_shapes(module, example, type(model).__name__)


def segments(module: fx.GraphModule) -> Iterator[Sequence[fx.Node]]:
    """Split the tensor nodes at the cut points: after the last node of each segment it alone is alive."""
    nodes = tensor_nodes(module.graph)
    position = {node: index for index, node in enumerate(nodes)}
    reach = [max((_position(user, position) for user in node.users), default=index) for index, node in enumerate(nodes)]
    segment: list[fx.Node] = []
    furthest = 0  # the last position at which anything before the current node is still needed
    for index, node in enumerate(nodes):
        segment.append(node)
        if furthest <= index:
            yield segment
            segment = []
        furthest = max(furthest, reach[index])


def _position(user: fx.Node, position: dict[fx.Node, int]) -> int:
    """Return the place of a user among the tensor nodes; the graph's output comes after all; a size is read at once."""
    if user.op == "output":
        return len(position)
    return position.get(user, -1)


def _check_all_run(model: nn.Module, module: fx.GraphModule) -> None:
    """Refuse parameters that the traced graph leaves out: nothing says how to fuse them."""
    run = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in run:
            raise FusionError(
                f"Expected every parameter to belong to a layer that is run, got {name!r}; remove it from the network"
            )


def _record_shapes(module: fx.GraphModule, example: Tensor, name: str) -> Any:
    """Run the network once and note the shape of every tensor on its node; returns its output."""
    for node in module.graph.nodes:
        node.meta["shape"] = None
    by_name = {node.name: node for node in module.graph.nodes}
    value: Any = None
    try:
        with torch.no_grad():
            for node_name, value in GraphRunner(module).observe(example, by_name):
                is_tensor = isinstance(value, Tensor) and by_name[node_name].op != "output"
                by_name[node_name].meta["shape"] = tuple(value.shape) if is_tensor else None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise FusionError(
            f"Expected samples that {name} accepts, got a batch of shape {list(example.shape)}: {_first_line(error)}"
        ) from error
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
