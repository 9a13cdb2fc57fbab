r"""Neurons of all parents in one pool, of which the result keeps those that tell most about all.

Where parents know different things, no neuron of one stands for a neuron of the other. Instead of one neuron of the
result for each of the anchor's, which is to be like its partners, the result then has *chosen* neurons of any parent.
Of each space, with C the covariance of all parents' neurons over unlabelled samples, neurons are chosen one by one so
that as little as possible of C is left once the chosen ones have explained what they can (column subset selection by
pivoted elimination): the next is the one whose column of the rest explains most of the rest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.options import FusionOptions
from clafusion.statistics.moments import Observation, paired_moments
from clafusion.statistics.samples import batch_size
from clafusion.tracing.structure import Layer, Unit
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.neuron_maps import is_observable, observation, outermost

#: Samples that neurons are chosen by, where each is one observation, and where each gives many (positions or tokens).
SAMPLES, SAMPLES_WITH_POSITIONS = 1000, 300
#: Ridge of the reconstruction of the other neurons from the chosen ones, and the least rest that can be chosen, both
#: relative to the variance.
RIDGE, LEAST = 1e-4, 1e-7


@dataclass(frozen=True, eq=False)
class Pool:
    """The neurons that the result has, chosen among those of all parents.

    Attributes:
        places: per parent and space a map [its neurons, the result's neurons] that is one where a neuron is chosen.
        reconstructions: likewise, the weights of the result's neurons in what stands for each neuron of the parent.
        sizes: the number of neurons of the result, by space.
    """

    places: tuple[Maps, ...]
    reconstructions: tuple[Maps, ...]
    sizes: Mapping[str, int]


def pool_neurons(
    balanced: Balanced, samples: Tensor, options: FusionOptions, weights: Sequence[float], width: float
) -> Pool:
    """Choose the neurons of the result.

    Args:
        balanced: the parents.
        samples: unlabelled inputs.
        options: `memory_budget` is read.
        weights: per parent; its neurons count so much.
        width: the number of neurons of every space, as a multiple of that of the parent whose size it would have.

    Raises:
        FusionError: if neurons of several spaces are along several dimensions of one output, or blocks differ in size.
    """
    _check_one_dimension(balanced)
    structure = balanced.structure
    spaces = [name for name in structure.spaces.spaces if name != structure.output]
    covariances = _covariances(balanced, spaces, samples, options)
    places: tuple[Maps, ...] = tuple({} for _ in balanced.parents)
    reconstructions: tuple[Maps, ...] = tuple({} for _ in balanced.parents)
    sizes: dict[str, int] = {}
    done: set[str] = set()
    for space in spaces:
        if space in done:
            continue
        family = _family(balanced, space)
        done.update(family)
        chosen = _choose(balanced, family, covariances, weights, width)
        for name, kept in chosen.items():
            owners = owners_of(balanced, name)
            counts = [_size(balanced, k, name) for k in owners]
            placed, reconstructed = _as_maps(kept, covariances.get(name), sum(counts))
            sizes[name] = len(kept)
            for k, place, back in zip(owners, placed.split(counts), reconstructed.split(counts), strict=True):
                places[k][name], reconstructions[k][name] = place, back
    return Pool(places, reconstructions, sizes)


def owners_of(balanced: Balanced, space: str) -> list[int]:
    """The parents that have neurons of a space."""
    return [k for k, parent in enumerate(balanced.parents) if space in parent.spaces]


def _size(balanced: Balanced, k: int, space: str) -> int:
    parent = balanced.parents[k]
    return parent.structure.sizes[parent.spaces[space]]


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


def _family(balanced: Balanced, space: str) -> list[str]:
    """The space, or, if it is in blocks or one of blocks, all spaces that are chosen together."""
    structure = balanced.structure
    top = outermost(structure, space) or space
    return [top, *(name for name in structure.spaces.spaces if outermost(structure, name) == top)]


def _covariances(
    balanced: Balanced, spaces: Sequence[str], samples: Tensor, options: FusionOptions
) -> dict[str, Tensor]:
    """The covariances of the neurons of all parents, [all, all] float64, averaged over where they are observed."""
    layers: dict[str, list[tuple[Layer, Unit]]] = {}
    for unit in balanced.structure.units:
        for layer in (*unit.layers, *unit.beside):
            axis = balanced.structure.written(layer)
            for space in () if axis is None else axis.spaces:
                layers.setdefault(space, []).append((layer, unit))
    wanted: dict[tuple[str, str, int, int], tuple[Observation, Observation]] = {}
    nodes: dict[str, list[str]] = {}
    for space in spaces:
        owners = owners_of(balanced, space)
        nodes[space] = _nodes(balanced, space, owners, layers.get(space, []))
        for node in nodes[space]:
            seen = {k: observation(balanced, k, node, space) for k in owners}
            for i, j in combinations_with_replacement(owners, 2):
                wanted[node, space, i, j] = (seen[i], seen[j])
    shapes = [balanced.structure.nodes[node].meta["shape"] for names in nodes.values() for node in names]
    most = SAMPLES if all(len(shape) <= 2 for shape in shapes) else SAMPLES_WITH_POSITIONS
    runners = balanced.runners
    moments = paired_moments(runners, wanted, samples[:most], batch_size(runners, options.memory_budget))
    found: dict[str, Tensor] = {}
    for space in spaces:
        owners = owners_of(balanced, space)
        total: Tensor | None = None
        for node in nodes[space]:
            rows = []
            for i in owners:
                row = []
                for j in owners:
                    one = moments[node, space, min(i, j), max(i, j)]
                    covariance = one.xy / one.count - torch.outer(one.x, one.y) / one.count**2
                    row.append(covariance if i <= j else covariance.T)
                rows.append(torch.cat(row, 1))
            whole = torch.cat(rows)
            total = whole if total is None else total + whole
        if total is not None:
            found[space] = total / len(nodes[space])
    return found


def _nodes(balanced: Balanced, space: str, owners: Sequence[int], layers: Sequence[tuple[Layer, Unit]]) -> list[str]:
    """The nodes at which the neurons of a space are observed in all parents: behind the layers that write them."""
    main = [pair for pair in layers if not pair[0].shortcut] or list(layers)
    common = [layer for layer, unit in main if set(owners) <= balanced.owners[unit.name].keys()]
    result: dict[str, None] = {}
    for layer in common or [layer for layer, _ in main]:
        for name in (layer.post, layer.norm or layer.node, layer.node):
            if is_observable(balanced, name, space, owners):
                result[name] = None
                break
    return list(result)


def _choose(
    balanced: Balanced,
    family: Sequence[str],
    covariances: Mapping[str, Tensor],
    weights: Sequence[float],
    width: float,
) -> dict[str, Tensor]:
    """The neurons of spaces that are chosen together, as places among those of all parents."""
    spaces = balanced.structure.spaces.spaces
    if len(family) == 1:
        name = family[0]
        owners = owners_of(balanced, name)
        counts = [_size(balanced, k, name) for k in owners]
        size = max(2, min(round(width * _size(balanced, balanced.reference(name), name)), sum(counts)))
        known = covariances.get(name)
        if known is None:
            raise FusionError(f"Expected to observe the neurons of {name!r} for targets=union, got no place where")
        scale = _scales(known, counts, [weights[k] for k in owners])
        return {name: selection(known, scale, torch.arange(sum(counts), device=known.device), size)}
    top = family[0]
    if any(spaces[name].parent not in (None, top) for name in family):
        raise FusionError("Expected blocks of neurons without further blocks inside for targets=union, got them")
    owners = owners_of(balanced, top)
    heads = [_size(balanced, k, top) for k in owners]
    within = {name: {_size(balanced, k, name) / _size(balanced, k, top) for k in owners} for name in family[1:]}
    uneven = next((name for name, found in within.items() if len(found) > 1), None)
    if uneven is not None:
        raise FusionError(
            f"Expected blocks (heads or groups) of one size in all parents for targets=union, got "
            f"{sorted(within[uneven])} neurons in those of {uneven!r}; use targets=matched"
        )
    count = max(1, min(round(width * _size(balanced, balanced.reference(top), top)), sum(heads)))
    inside: dict[str, Tensor] = {}
    for name in family[1:]:
        blocks, before = [], 0
        for k in owners:
            parent = balanced.parents[k]
            own = parent.structure.spaces.spaces[parent.spaces[name]].block
            assert own is not None
            blocks.append(own + before)
            before += _size(balanced, k, top)
        inside[name] = torch.cat(blocks)
    kept = _select_blocks({name: covariances[name] for name in inside if name in covariances}, inside, count)
    result = {top: kept}
    for name, block in inside.items():
        result[name] = torch.cat([(block == head).nonzero().flatten() for head in kept.tolist()])
    return result


def _scales(covariance: Tensor, counts: Sequence[int], weights: Sequence[float]) -> Tensor:
    """The importance of each neuron: equal for all parents, whatever the scale of their features, times its weight."""
    variances = covariance.diagonal().split(list(counts))
    pairs = zip(variances, weights, strict=True)
    return torch.cat([torch.full_like(one, weight / max(float(one.mean()), 1e-30)) for one, weight in pairs])


def selection(covariance: Tensor, importance: Tensor, groups: Tensor, count: int) -> Tensor:
    r"""Neurons, or groups of them, that explain most of what all neurons do; the first ones explain most.

    With A the covariance and B its columns times the root of the importance, the next neuron is

    .. math:: \arg\max_i \lVert B_i \rVert^2 / A_{ii}, \qquad
        A \leftarrow A - a_i a_i^\top / A_{ii}, \qquad B \leftarrow B - a_i b_i^\top / A_{ii}

    which minimises the importance-weighted trace of what is left of the covariance.

    Args:
        covariance: of all neurons, [n, n].
        importance: of each, at least 0, [n].
        groups: of each neuron; those of a group are chosen together, [n].
        count: how many groups to choose, at most.

    Returns:
        The chosen groups, [count].
    """
    rest = covariance.clone()
    reach = covariance * importance.sqrt()
    before = rest.diagonal().clone()
    floor = RIDGE * 1e-2 * float(before.mean()) + 1e-30
    number = int(groups.max()) + 1
    open_groups = torch.ones(number, dtype=torch.bool, device=rest.device)
    chosen: list[int] = []
    for _ in range(min(count, number)):
        left = rest.diagonal()
        gains = torch.where(left > LEAST * before + 1e-30, reach.square().sum(1) / (left + floor), -1.0)
        score = gains.new_zeros(number).index_add_(0, groups, gains)
        score[~open_groups] = -math.inf
        if float(score.max()) <= 0:  # nothing is left to explain: the liveliest of the others
            score = before.new_zeros(number).index_add_(0, groups, before)
            score[~open_groups] = -math.inf
        best = int(score.argmax())
        chosen.append(best)
        open_groups[best] = False
        for i in (groups == best).nonzero().flatten().tolist():
            column, row, pivot = rest[:, i].clone(), reach[i].clone(), float(rest[i, i])
            if pivot > LEAST * float(before[i]) + 1e-30:
                rest.addr_(column, column, alpha=-1 / (pivot + floor))
                reach.addr_(column, row, alpha=-1 / (pivot + floor))
    return torch.tensor(chosen, device=covariance.device)


def _select_blocks(covariances: Mapping[str, Tensor], inside: Mapping[str, Tensor], count: int) -> Tensor:
    """Blocks that explain most of what the neurons in all of them do."""
    if not covariances:
        return torch.arange(count)
    parts, blocks = [], []
    for name, covariance in covariances.items():
        parts.append(covariance / covariance.diagonal().mean().clamp_min(1e-30))
        blocks.append(inside[name].to(covariance.device))
    whole = torch.block_diag(*parts)
    return selection(whole, torch.ones(len(whole), dtype=whole.dtype), torch.cat(blocks), count).cpu()


def _as_maps(kept: Tensor, covariance: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """The places of chosen neurons, and what stands for every neuron once only they are there, both [all, chosen]."""
    placed = torch.zeros(total, len(kept), dtype=torch.float64)
    placed[kept, torch.arange(len(kept))] = 1
    if covariance is None:
        return placed, placed
    of_chosen = covariance[kept][:, kept]
    penalty = RIDGE * of_chosen.diagonal().mean().clamp_min(1e-30)
    identity = torch.eye(len(kept), dtype=of_chosen.dtype, device=of_chosen.device)
    back = torch.linalg.solve(of_chosen + penalty * identity, covariance[kept]).T
    back[kept] = identity
    return placed, back
