"""Runs a captured network node by node, and holds no output longer than it is needed."""

import math
from collections.abc import Collection, Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor, fx, nn


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


def working_precision(*tensors: Tensor) -> torch.dtype:
    """The precision to compute in: at least single; on an accelerator double, where single may mean much less."""
    wider = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return wider if tensors[0].device.type == "cpu" else torch.float64


def as_input(batch: Tensor, module: nn.Module) -> Tensor:
    """The batch on the device and in the floating dtype of a network."""
    return batch.to(next(module.parameters()))
