r"""Neurons of all parents in one pool, of which the result keeps those that tell most about all.

Where parents know different things, no neuron of one stands for a neuron of the other. Instead of one neuron of the
result for each of the anchor's, which is to be like its partners, the result then has *chosen* neurons of any parent.
Of each space, with C the covariance of all parents' neurons over unlabelled samples and G their Fisher information
(how much what the parents say depends on them), neurons are chosen one by one so that tr(G C) of what the chosen ones
do not explain is as small as possible (`selection`); or the result has the means of clusters of them (`centroids`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.options import FusionOptions
from clafusion.teachers.teacher import Teacher
from clafusion.tracing.structure import Structure
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.centroids import centroids
from clafusion.transport.neuron_maps import outermost
from clafusion.transport.pooled_moments import covariances, judged_by, seen_at, sensitivities
from clafusion.transport.selection import as_maps, select_blocks, selection
from clafusion.transport.widths import multiply_adds_of, parameters_of, sizes_within, uniform_sizes

_TOTALS = {"parameters": parameters_of, "macs": multiply_adds_of}
#: How much every neuron counts at least, relative to the mean: what the parents say may depend on few directions.
_FLOOR = 1e-3
#: Kinds of layers in which a neuron reads one neuron, or those of its group, and cannot be a mean of others.
_ONE_BY_ONE = ("depthwise", "grouped")


@dataclass(frozen=True, eq=False)
class Pool:
    """The neurons that the result has, made of those of all parents.

    Attributes:
        places: per parent and space a map [its neurons, the result's neurons] that is one where a neuron is chosen, or
            the weight of a neuron in a centroid.
        reconstructions: likewise, the weights of the result's neurons in what stands for each neuron of the parent.
        sizes: the number of neurons of the result, by space.
    """

    places: tuple[Maps, ...]
    reconstructions: tuple[Maps, ...]
    sizes: Mapping[str, int]


def pool_neurons(balanced: Balanced, samples: Tensor, options: FusionOptions, teacher: Teacher) -> Pool:
    """Choose the neurons of the result.

    Args:
        balanced: the parents.
        samples: unlabelled inputs.
        options: `targets` (whether `centroids` are made), `width`, `budget`, `memory_budget` and `seed` are read.
        teacher: what the parents say together.

    Raises:
        FusionError: if neurons of several spaces are along several dimensions of one output, blocks differ in size, or
            too few neurons would be left.
    """
    _check_one_dimension(balanced)
    structure = balanced.structure
    counts = {name: [balanced.width(k, name) for k in balanced.holders(name)] for name in structure.free_spaces}
    uniform = uniform_sizes(balanced, options.width)
    seen = seen_at(balanced, list(counts))
    judges = judged_by(balanced, seen, samples)
    known = covariances(balanced, seen, judges, options)
    blocks = _blocks(balanced, counts, uniform, known)
    alone = [name for name in counts if name not in blocks]
    unseen = next((name for name in alone if name not in known), None)
    if unseen is not None:
        raise FusionError(f"Expected to observe the neurons of {unseen!r} for targets=union, got no place where")
    sizes = {name: min(uniform[name], sum(counts[name])) for name in counts}
    fisher = sensitivities(balanced, {name: seen[name] for name in alone}, judges, teacher, options)
    floors = {name: _FLOOR * one.diagonal().mean() for name, one in fisher.items()}
    importance = {name: one + floors[name].expand(len(one)).diag() for name, one in fisher.items()}
    clustered = set(alone) - _read_one_by_one(structure) if options.targets == "centroids" else set()
    if options.budget == "none":
        ordered = [name for name in alone if name not in clustered]
        found = {name: selection(known[name], importance[name], sizes[name]) for name in ordered}
    else:
        found = {name: selection(known[name], importance[name], sum(counts[name])) for name in alone}
        total_of = partial(_TOTALS[options.budget], structure)
        sizes = sizes_within(total_of(uniform), total_of, sizes, {name: gains for name, (_, gains) in found.items()})
    maps = {name: as_maps(kept, known.get(name), sum(counts[name])) for name, kept in blocks.items()}
    for name in alone:
        if name in clustered:
            maps[name] = centroids(known[name], importance[name].diagonal(), sizes[name], options.seed)
        else:
            maps[name] = as_maps(found[name][0][: sizes[name]], known[name], sum(counts[name]))
    return _pool_of(balanced, counts, maps)


def _pool_of(balanced: Balanced, counts: Mapping[str, list[int]], maps: Mapping[str, tuple[Tensor, Tensor]]) -> Pool:
    """The maps of all neurons of each space cut into those of every parent's."""
    places: tuple[Maps, ...] = tuple({} for _ in balanced.parents)
    reconstructions: tuple[Maps, ...] = tuple({} for _ in balanced.parents)
    for name, (placed, back) in maps.items():
        pairs = zip(placed.split(counts[name]), back.split(counts[name]), strict=True)
        for k, pair in zip(balanced.holders(name), pairs, strict=True):
            places[k][name], reconstructions[k][name] = pair
    return Pool(places, reconstructions, {name: placed.shape[1] for name, (placed, _) in maps.items()})


def _check_one_dimension(balanced: Balanced) -> None:
    """Refuse networks that mix neurons with neurons, as token-mixing layers do: parents' neurons do not pair there."""
    structure = balanced.structure
    for layer in structure.layers:
        for node in (layer.node, layer.total):
            axes = (structure.spaces.of_node(node) if node is not None else None) or ()
            if sum(axis is not None for axis in axes) > 1:
                raise FusionError(
                    f"Expected neurons along one dimension behind {layer.name!r} for targets=union, got them along "
                    "several; use targets=matched"
                )


def _read_one_by_one(structure: Structure) -> frozenset[str]:
    """The spaces whose neurons are read one by one or in groups."""
    axes = [structure.written(layer) for layer in structure.layers if layer.kind in _ONE_BY_ONE]
    return frozenset(space for axis in axes if axis is not None for space in axis.spaces)


def _blocks(
    balanced: Balanced, counts: Mapping[str, list[int]], sizes: Mapping[str, int], known: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The blocks that are kept, and the neurons in them, as places among those of all."""
    structure, kept = balanced.structure, {}
    for top in counts:
        within = [name for name in counts if outermost(structure, name) == top]
        if not within:
            continue
        inside = {name: _block_of(balanced, top, name) for name in within}
        seen = {name: known[name] for name in within if name in known}
        kept[top] = select_blocks(seen, inside, min(sizes[top], sum(counts[top])))
        for name, block in inside.items():
            kept[name] = torch.cat([(block == one).nonzero().flatten() for one in kept[top].tolist()])
    return kept


def _block_of(balanced: Balanced, top: str, space: str) -> Tensor:
    """The block, among those of all parents, of every neuron of all parents."""
    blocks, before = [], 0
    for k in balanced.holders(top):
        parent = balanced.parents[k]
        own = parent.structure.spaces.spaces[parent.spaces[space]].block
        assert own is not None
        blocks.append(own + before)
        before += balanced.width(k, top)
    return torch.cat(blocks)
