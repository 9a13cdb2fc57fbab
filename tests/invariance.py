"""An oracle for neuron spaces that shares no code with the library's moving of parameters.

All neurons of all free spaces are permuted at once, blocks as a whole and neurons within their blocks; the network must
be the same function, but for the order of its logits.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from clafusion.tracing.exporting import Capture, export_graph
from clafusion.tracing.outputs import logits_in
from clafusion.tracing.spaces import Axis, Spaces, find_spaces
from clafusion.tracing.structure import Structure


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode and float64, with random parameters and statistics, so that no neuron is dead."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.ndim > 1 and min(tensor.shape[0], tensor[0].numel()) > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def random_orders(spaces: Spaces, seed: int = 1) -> dict[str, list[int]]:
    """For every free space the old neuron that comes to each place."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[str, list[int]] = {}
    for name, space in spaces.spaces.items():
        blocks = [0] * space.size if space.block is None else space.block.tolist()
        moved_blocks = range(len(set(blocks))) if space.parent is None else orders[space.parent]
        members = defaultdict(list)
        for neuron, block in enumerate(blocks):
            members[block].append(neuron)
        order = [0] * space.size
        for new, old in enumerate(moved_blocks):
            shuffled = torch.randperm(len(members[old]), generator=generator).tolist()
            for place, choice in zip(members[new], shuffled, strict=True):
                order[place] = members[old][choice]
        orders[name] = order
    return orders


def sources(axis: Axis, orders: Mapping[str, list[int]]) -> list[int]:
    """The old entry of an axis that comes to each place."""
    entries = list(zip(axis.of.tolist(), axis.at.tolist(), axis.turn.tolist(), strict=True))
    place = {entry: number for number, entry in enumerate(entries) if entry[0] >= 0}
    return [
        number if of < 0 else place[of, orders[axis.spaces[of]][at], turn]
        for number, (of, at, turn) in enumerate(entries)
    ]


def permuted(tensor: Tensor, axes: tuple[Axis | None, ...], orders: Mapping[str, list[int]]) -> Tensor:
    """A tensor with its neurons in another order."""
    grouped = None
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        if len(axis.of) == tensor.shape[dim]:
            tensor = tensor[(slice(None),) * dim + (sources(axis, orders),)]
        else:
            grouped = axis
    if grouped is None:
        return tensor
    # The outputs have moved, maybe to another group: each takes the order of the inputs of its own.
    inputs = tensor.shape[1]
    groups, outputs = len(grouped.of) // inputs, tensor.shape[0]
    order = sources(grouped, orders)
    rows = []
    for row in range(outputs):
        start = row // (outputs // groups) * inputs
        rows.append(tensor[row][[order[start + channel] % inputs for channel in range(inputs)]])
    return torch.stack(rows)


def permuted_copy(model: nn.Module, structure: Structure, seed: int = 1) -> nn.Module:
    """A copy of a network with all neurons but the logits in another order."""
    orders, other = random_orders(structure.spaces, seed), copy.deepcopy(model)
    if structure.output is not None:
        orders[structure.output] = list(range(structure.sizes[structure.output]))
    named = (*other.named_buffers(remove_duplicate=False), *other.named_parameters(remove_duplicate=False))
    state = dict(named)  # tied ones under each of their names
    with torch.no_grad():
        for name, axes in structure.axes.items():
            state[name].copy_(permuted(state[name].clone(), axes, orders))
    return other


def in_double(graph: fx.Graph) -> None:
    """Let a graph that computes a part in float32 whatever it is given do that in float64, too."""

    def wider(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    for node in graph.nodes:
        node.args = tuple(map(wider, node.args))
        node.kwargs = {name: wider(argument) for name, argument in node.kwargs.items()}


def run(capture: Capture, tensors: Mapping[str, Tensor], samples: Tensor) -> Tensor:
    """The logits of a graph with other tensors."""
    entries = [node for node in capture.graph.nodes if node.op == "placeholder"]
    inputs = [tensors[capture.names[node.name]] if node.name in capture.names else samples for node in entries]
    module = fx.GraphModule(nn.Module(), capture.graph)
    return logits_in(fx.Interpreter(module).run(*inputs))


def check(
    make: Callable[[], nn.Module], shape: tuple[int, ...], leave: str | None = None
) -> tuple[float, Spaces, dict[str, Any]]:
    """The relative error after a permutation of all free spaces, and the spaces.

    Args:
        make: a function that makes the network.
        shape: the shape of one sample.
        leave: the name of one parameter that is left as it is.
    """
    torch.manual_seed(0)
    model = enliven(make())
    samples = torch.randn(3, *shape, dtype=torch.float64)
    capture = export_graph(model, samples)
    spaces = find_spaces(capture)
    orders = random_orders(spaces)
    in_double(capture.graph)
    tensors = {
        name: permuted(tensor.detach(), spaces.axes[name], orders) if name in spaces.axes and name != leave else tensor
        for name, tensor in capture.tensors.items()
    }
    with torch.no_grad():
        expected = run(capture, capture.tensors, samples)
        got = run(capture, tensors, samples)
    axes = spaces.of_node(capture.logits)
    assert axes is not None
    expected = permuted(expected, axes, orders)
    facts = {"axes": axes, "orders": orders, "capture": capture}
    return float((got - expected).abs().max() / expected.abs().max()), spaces, facts


def share_of_free_entries(spaces: Spaces, tensors: Mapping[str, Tensor]) -> float:
    """The share of the entries of all parameter axes longer than 1 that are free."""
    free = total = 0
    for name, axes in spaces.axes.items():
        for dim, axis in enumerate(axes):
            size = tensors[name].shape[dim]
            total += (size if axis is None else len(axis.of)) if size > 1 else 0
            free += 0 if axis is None else int((axis.of >= 0).sum())
    return free / max(total, 1)
