"""Networks as `torch.fx` graphs: captured without touching the model, cut into segments, run with observers."""

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from clafusion.errors import FusionError
from clafusion.operations import OUT_OF_PLACE


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


def observe(
    module: fx.GraphModule, batch: Tensor, names: Collection[str], interpreter: fx.Interpreter | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Run a captured network and yield (node, output) for the nodes in `names`, in graph order.

    Only what these need is run. Each output is yielded the moment it is computed and dropped when nothing needs it any
    more, so that two networks with the same graph can be run in step, and never hold more than a few activations.

    Args:
        module: the captured network.
        batch: its input.
        names: the nodes to observe.
        interpreter: runs the nodes; None: as the network does.
    """
    interpreter = interpreter or fx.Interpreter(module, garbage_collect_values=False)
    interpreter.args_iter = iter([batch])
    nodes = interpreter.graph.nodes
    steps = needed(nodes, [node for node in nodes if node.name in names])
    last_use = last_uses(steps)
    for node in steps:
        value = interpreter.env[node] = interpreter.run_node(node)
        for used in {node, *node.all_input_nodes}:
            if last_use[used] is node:
                del interpreter.env[used]
        if node.name in names:
            yield node.name, value


def needed(nodes: Iterable[fx.Node], wanted: Iterable[fx.Node], known: Collection[fx.Node] = ()) -> list[fx.Node]:
    """The nodes to run, in the order given, to get from what is known to what is wanted."""
    found: set[fx.Node] = set()
    open_nodes = list(wanted)
    while open_nodes:
        node = open_nodes.pop()
        if node not in known and node not in found:
            found.add(node)
            open_nodes += node.all_input_nodes
    return [node for node in nodes if node in found]


def last_uses(steps: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """After which of the steps each output is not needed any more; what no later one uses, after its own."""
    return {used: node for node in steps for used in (node, *node.all_input_nodes)}


def live_numbers(module: fx.GraphModule) -> int:
    """Numbers of one sample that a captured network holds at once, at most, when each is dropped after its last use."""
    nodes = tensor_nodes(module)
    last_use = last_uses(nodes)
    sizes = {node: math.prod(node.meta["shape"][1:]) for node in nodes}
    alive = most = 0
    for node in nodes:
        alive += sizes[node]
        most = max(most, alive)
        alive -= sum(sizes[used] for used in {node, *node.all_input_nodes} if last_use[used] is node and used in sizes)
    return most


def tensor_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a captured network whose output is a tensor, in graph order."""
    return [node for node in module.graph.nodes if node.op != "output" and node.meta["shape"] is not None]


def segments(module: fx.GraphModule) -> Iterator[Sequence[fx.Node]]:
    """Split the tensor nodes at the cut points: after the last node of each segment it alone is alive."""
    nodes = tensor_nodes(module)
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
    """Where a user stands among the tensor nodes; the graph's output comes after all; a size is read at once."""
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
            for node_name, value in observe(module, example, by_name):
                is_tensor = isinstance(value, Tensor) and by_name[node_name].op != "output"
                by_name[node_name].meta["shape"] = tuple(value.shape) if is_tensor else None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise FusionError(
            f"Expected samples that {name} accepts, got a batch of shape {list(example.shape)}: {_first_line(error)}"
        ) from error
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
