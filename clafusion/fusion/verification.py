"""Checks of every fusion while it runs, on a handful of samples, so that none returns a wrong network.

Maps are maps, and everything is finite. A parent whose neurons are permuted is the function that it was, which proves
the trace and the maps. The network that is returned is the function of its graph. An error names the neuron space and
the parameter.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.naming import parent_name
from clafusion.statistics.samples import all_finite
from clafusion.tracing.comparison import TOLERANCE, difference, exact_outputs, few_of, first_wrong, in_words
from clafusion.tracing.execution import GraphRunner, as_input
from clafusion.tracing.outputs import logits_in
from clafusion.tracing.parameters import axis_move, copied_rows, move
from clafusion.tracing.structure import Structure
from clafusion.transport.balanced import Balanced, Correspondence, Maps
from clafusion.transport.moving import dense, grouped

#: The sum of the shares in a column of a map may be so far from one.
SHARE_TOLERANCE = 1e-6


def check_free(structure: Structure, called: str) -> None:
    """Refuse a network in which the neurons behind a unit have a fixed order: there is nothing to align."""
    for unit in structure.units:
        axes = structure.spaces.of_node(unit.output)
        if unit.layers and unit.output != structure.capture.logits and axes is not None and not any(axes):
            names = [name for name in unit.parameters if name in structure.spaces.pinned]
            why = structure.spaces.pinned[names[0]] if names else "what follows it"
            raise FusionError(
                f"Expected neurons of {called} that can be permuted, got those behind {unit.name!r} in a fixed order, "
                f"because of {why}; choose networks without it"
            )


def check_maps(balanced: Balanced, maps: Sequence[Maps]) -> None:
    """Refuse a map that is not finite, has a negative entry, or a column whose shares do not sum to one."""
    for k, its_maps in enumerate(maps):
        for key, mapping in its_maps.items():
            error = float((mapping.sum(0) - 1).abs().max())
            if not (error <= SHARE_TOLERANCE and mapping.min() >= 0):
                raise FusionError(
                    f"Expected maps of neurons with shares that sum to one, got one that is {error:.1e} off, of parent "
                    f"{k} in neuron space {key!r}; report it"
                )


def check_moved(balanced: Balanced, maps: Sequence[Maps], samples: Tensor) -> None:
    """Refuse a parent that is another function once its neurons are permuted.

    They are permuted as its maps say where these are permutations. Where no parent's maps move the neurons of all of
    its spaces, those of the smallest parent are permuted at random as well.

    Args:
        balanced: the parents.
        maps: of each.
        samples: inputs; the first few are run.
    """
    few, thorough = few_of(samples), False
    for k, (parent, its_maps) in enumerate(zip(balanced.parents, maps, strict=True)):
        if orders := _orders(parent, its_maps):
            _check_permuted(parent_name(k), parent.structure, orders, few)
            moved = [not order.diagonal().all() for order in orders.values()]
            thorough = thorough or (all(moved) and len(orders) >= len(parent.structure.free_spaces))
    if not thorough:
        structures = [parent.structure for parent in balanced.parents]
        k, smallest = min(enumerate(structures), key=lambda pair: sum(pair[1].sizes.values()))
        _check_permuted(parent_name(k), smallest, _shuffled(smallest), few)


def _check_permuted(called: str, structure: Structure, orders: Mapping[str, Tensor], few: Tensor) -> None:
    """Compare a network with itself in another order."""
    itself = {name: name for name in structure.spaces.spaces}
    groups = {
        layer.weight: structure.read(layer) for layer in structure.layers if layer.kind == "grouped" and layer.weight
    }

    def change(name: str, tensor: Tensor) -> Tensor:
        axes = structure.axes.get(name, ())
        moves = tuple(axis_move(axis, axis, orders, itself) for axis in axes)
        if (read := groups.get(name)) is None:
            return move(tensor, moves)
        number = len(read.of) // tensor.shape[1]
        return grouped(move(dense(tensor, number), moves), number)

    def permuted(output: Tensor, node: str) -> Tensor:
        axes = structure.spaces.of_node(node) or ()
        return move(output, tuple(axis_move(axis, axis, orders, itself) for axis in axes))

    end = structure.capture.logits
    logits = exact_outputs(structure, few, [end], change)[end]
    error = difference(permuted(exact_outputs(structure, few, [end])[end], end), logits)
    if error <= TOLERANCE[logits.dtype]:
        return
    names = [layer.node for layer in structure.layers]
    expected, got = exact_outputs(structure, few, names), exact_outputs(structure, few, names, change)
    pairs = ((one, permuted(expected[one.node], one.node), got[one.node]) for one in structure.layers)
    raise FusionError(
        f"Expected {called} to be the same function with its neurons permuted, got logits that differ by {error:.1e} "
        f"(relative), first behind {first_wrong(pairs, structure)}; it cannot be fused safely, report it"
    )


def _orders(parent: Correspondence, maps: Maps) -> Maps:
    """The permutations of a parent's own spaces that maps are; none where they disagree or are anything else."""
    orders: Maps = {}
    layers = {layer.name: parent.structure.written(layer) for layer in parent.structure.layers}
    for key, mapping in maps.items():
        axis = layers.get(key)
        own = parent.spaces.get(key) or (axis.spaces[0] if axis is not None else None)
        sources = copied_rows(mapping)
        if own is None or sources is None or not len(sources) == len(mapping) == len(sources.unique()):
            return {}
        if not torch.equal(orders.setdefault(own, mapping), mapping):
            return {}
    return orders


def _shuffled(structure: Structure) -> Maps:
    """A permutation of every free space; they are unlike, so that spaces that belong together show when they do not."""
    generator, orders = torch.Generator().manual_seed(0), dict[str, Tensor]()

    def order_of(name: str) -> Tensor:
        if name not in orders:
            space = structure.spaces.spaces[name]
            if space.parent is None or space.block is None:
                orders[name] = torch.randperm(space.size, generator=generator)
            else:
                blocks, result = order_of(space.parent), torch.empty(space.size, dtype=torch.int64)
                for block, source in enumerate(blocks.tolist()):
                    members = (space.block == source).nonzero().flatten()
                    result[space.block == block] = members[torch.randperm(len(members), generator=generator)]
                orders[name] = result
        return orders[name]

    fixed = structure.output
    for name in structure.free_spaces:
        if name != fixed:
            order_of(name)
    device = structure.capture.reference.device
    return {name: torch.eye(len(order), dtype=torch.float64)[:, order].T.to(device) for name, order in orders.items()}


def check_outputs(model: nn.Module, structure: Structure, samples: Tensor) -> None:
    """Refuse a network that gives NaN or infinity for the first few samples, or is not the function of its graph.

    Args:
        model: the fused network, in eval mode.
        structure: of the network.
        samples: inputs.
    """
    few = as_input(few_of(samples), structure.capture)
    logits, expected = logits_in(model(few)), structure.run(few)
    if not all_finite(logits):
        outputs = dict(GraphRunner(structure.capture).observe(few, [layer.node for layer in structure.layers]))
        layer = next((layer for layer in structure.layers if not all_finite(outputs[layer.node])), structure.layers[-1])
        raise FusionError(
            "Expected finite outputs of the fused network, got NaN or infinity, first behind "
            f"{in_words(layer, structure)}; fuse in a wider dtype"
        )
    error = difference(expected, logits)
    if not error <= TOLERANCE[logits.dtype]:
        raise FusionError(
            f"Expected {type(model).__name__} to compute with its new parameters, got logits that differ by "
            f"{error:.1e} (relative) from those of its graph; it stores results of its parameters: pass fresh copies "
            "of the networks"
        )
