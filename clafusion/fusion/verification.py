"""Checks of every fusion while it runs, on a handful of samples, so that none returns a wrong network.

Maps are maps, and everything is finite. A parent whose neurons are permuted is the function that it was, which proves
the trace and the maps. An error names the neuron space and the parameter.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.options import FusionOptions
from clafusion.statistics.samples import all_finite
from clafusion.tracing.comparison import TOLERANCE, difference, few_of, first_wrong, in_words, logits_of, outputs_of
from clafusion.tracing.execution import GraphRunner, as_input
from clafusion.tracing.parameters import copied_rows, move
from clafusion.tracing.structure import Axis, Structure, trace
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.neuron_maps import moved

#: The sum of the shares in a column of a map may be so far from one.
SHARE_TOLERANCE = 1e-6


def check_maps(balanced: Balanced, maps: Sequence[Maps]) -> None:
    """Refuse a map that is not finite, has a negative entry, or a column whose shares do not sum to one."""
    for k, (structure, its_maps) in enumerate(zip(balanced.structures, maps, strict=True)):
        for key, mapping in its_maps.items():
            error = float((mapping.sum(0) - 1).abs().max())
            if not (error <= SHARE_TOLERANCE and mapping.min() >= 0):
                layer = next(layer for layer in structure.layers if key in (layer.name, layer.space))
                raise FusionError(
                    f"Expected maps of neurons with shares that sum to one, got one that is {error:.1e} off, of parent "
                    f"{k} behind {in_words(layer)}; report it"
                )


def check_moved(balanced: Balanced, maps: Sequence[Maps], samples: Tensor, options: FusionOptions) -> None:
    """Refuse a parent that is another function once its neurons are permuted.

    They are permuted as its maps say where these are permutations. Where no parent's maps move the neurons of all of
    its spaces, those of the smallest parent are permuted at random as well. One is enough: all share one graph, and the
    check is about how that was read.

    Args:
        balanced: the parents.
        maps: of each.
        samples: inputs; the first few are run.
        options: `streams` is read.
    """
    few, thorough = few_of(samples), False
    for k, (structure, its_maps) in enumerate(zip(balanced.structures, maps, strict=True)):
        if orders := _orders(structure, its_maps, options):
            _check_permuted(f"parent {k}", structure, orders, its_maps, few, options)
            thorough = thorough or not any(order.diagonal().all() for order in orders.values())
    if thorough:
        return
    k, smallest = min(enumerate(balanced.structures), key=lambda pair: sum(pair[1].sizes.values()))
    orders, shared = _shuffled(smallest), replace(options, streams="shared")
    _check_permuted(f"parent {k}", smallest, orders, orders, few, shared)


def _check_permuted(
    called: str, structure: Structure, orders: Maps, maps: Maps, few: Tensor, options: FusionOptions
) -> None:
    """Compare a network with itself in another order: `orders` by space, and as the fusion has it in `maps`."""

    def permuted(output: Tensor, space: str) -> Tensor:
        return move(output, (None, Axis(space)), (None, orders.get(space)))

    def change(name: str, tensor: Tensor) -> Tensor:
        return moved(structure, name, tensor, maps, options)

    logits = logits_of(structure, few, change)
    error = difference(permuted(logits_of(structure, few), structure.output), logits)
    if error <= TOLERANCE[logits.dtype]:
        return
    expected, got = outputs_of(structure, few), outputs_of(structure, few, change=change)
    pairs = ((one, permuted(expected[one.node], one.space), got[one.node]) for one in structure.layers)
    raise FusionError(
        f"Expected {called} to be the same function with its neurons permuted, got logits that differ by {error:.1e} "
        f"(relative), first behind {first_wrong(pairs, structure)}; it cannot be fused safely, report it"
    )


def _orders(structure: Structure, maps: Maps, options: FusionOptions) -> Maps:
    """The permutation of every space that maps are; none where they are anything else."""
    spaces = {layer.name: layer.space for layer in structure.layers}
    orders: Maps = {}
    for key, mapping in maps.items():
        order = orders.setdefault(key if options.streams == "shared" else spaces[key], mapping)
        rows = copied_rows(mapping)
        if not torch.equal(order, mapping) or rows is None or not len(rows) == len(mapping) == len(rows.unique()):
            return {}
    return orders


def _shuffled(structure: Structure) -> Maps:
    """A permutation of every free space; they are unlike, so that spaces that belong together show when they do not."""
    device, generator = next(structure.module.parameters()).device, torch.Generator().manual_seed(0)
    orders = {space: torch.randperm(structure.sizes[space], generator=generator) for space in structure.free_spaces}
    return {space: torch.eye(len(order), dtype=torch.float64)[order].to(device) for space, order in orders.items()}


def check_outputs(model: nn.Module, samples: Tensor) -> None:
    """Refuse a network that gives NaN or infinity for the first few samples.

    Args:
        model: the fused network, in eval mode.
        samples: inputs.
    """
    few = as_input(few_of(samples), model)
    if all_finite(model(few)):
        return
    structure = trace(model, few)
    outputs = dict(GraphRunner(structure.module).observe(few, [layer.node for layer in structure.layers]))
    layer = next((layer for layer in structure.layers if not all_finite(outputs[layer.node])), structure.layers[-1])
    raise FusionError(
        "Expected finite outputs of the fused network, got NaN or infinity, first behind "
        f"{in_words(layer)}; fuse in a wider dtype"
    )
