"""The map of every set of neurons of every parent onto the anchor's."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.naming import parent_name
from clafusion.options import FusionOptions
from clafusion.statistics.moments import Moments, Observation, paired_moments
from clafusion.statistics.samples import batch_size
from clafusion.tracing.parameters import places
from clafusion.tracing.structure import Layer, Structure, Unit
from clafusion.tracking import tracked
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.blocks import solve_in_blocks
from clafusion.transport.moving import incoming_weights, parameter_of
from clafusion.transport.solvers import as_map, gromov_plan, ground_cost, transport_plan


@dataclass(frozen=True)
class TransportProblem:
    """One set of neurons of a parent, to be carried onto the neurons that the result has.

    Attributes:
        key: the neuron space, or with one map per layer the layer.
        space: the neuron space.
        layers: the layers that write the space, in forward order, each with its unit.
        parent: the parent that has the neurons.
        reference: the parent whose neurons the result has.
    """

    key: str
    space: str
    layers: tuple[tuple[Layer, Unit], ...]
    parent: int
    reference: int


#: A node, a space of neurons, and two networks.
_Key = tuple[str, str, int, int]
#: The moments of the two networks of a problem at every node to compare; for Gromov of each network with itself.
Sides = Sequence[Sequence[Moments]]


def transport_problems(balanced: Balanced, options: FusionOptions) -> list[TransportProblem]:
    """Everything that needs a map and is written by a layer, in forward order."""
    shared = options.streams == "shared"
    structure = balanced.structure
    if not shared:
        _check_one_map_per_layer(structure)
    grouped: dict[tuple[str, str], list[tuple[Layer, Unit]]] = {}
    for unit in structure.units:
        for layer in (*unit.layers, *unit.beside):
            axis = structure.written(layer)
            for space in () if axis is None or (not shared and layer.kind == "depthwise") else axis.spaces:
                grouped.setdefault((space if shared else layer.name, space), []).append((layer, unit))
    problems = []
    for (key, space), layers in grouped.items():
        if space == structure.output and options.head != "transport":
            continue
        owners = [k for k, parent in enumerate(balanced.parents) if space in parent.spaces]
        if not shared and space not in balanced.parents[balanced.anchor].spaces:
            continue  # see `_add_maps_of_zeros`
        reference = balanced.reference(space)
        problems += [TransportProblem(key, space, tuple(layers), k, reference) for k in owners if k != reference]
    return problems


def _check_one_map_per_layer(structure: Structure) -> None:
    """Refuse a network in which a layer writes neurons of several kinds, or neurons in blocks."""
    for layer in structure.layers:
        axis = structure.written(layer)
        if axis is not None and (len(axis.spaces) > 1 or structure.spaces.spaces[axis.spaces[0]].parent is not None):
            raise FusionError(
                f"Expected layers with neurons of one kind for streams=per_layer, got {layer.name!r}, which writes "
                "heads, groups or several kinds; use streams=shared"
            )


def neuron_maps(
    balanced: Balanced, samples: Tensor, options: FusionOptions
) -> tuple[tuple[Maps, ...], tuple[dict[str, float], ...]]:
    """Solve the transport problem of every set of neurons of every parent.

    Neurons in blocks (attention heads, groups) are carried block by block: the blocks first, then what is in them.

    Returns:
        Per parent the maps [its neurons, the result's neurons] and the transport costs, by neuron space or layer; both
        are empty for the parent whose neurons the result has, and for all where neurons are averaged as they are.

    Raises:
        FusionError: if a problem has no solution, or parents to be averaged as they are differ in width.
    """
    maps: tuple[Maps, ...] = tuple({} for _ in balanced.parents)
    costs: tuple[dict[str, float], ...] = tuple({} for _ in balanced.parents)
    if options.combine == "average":
        _check_equal_widths(balanced)
        return maps, costs
    if options.streams == "per_layer":
        _add_maps_of_zeros(balanced, maps)
    problems, by_weights = transport_problems(balanced, options), options.features == "weights"
    problems = [problem for problem in problems if _is_known(balanced, problem, options)]
    sides_of: Callable[[TransportProblem], Sides]
    if by_weights:
        sides_of = partial(_incoming_moments, balanced, maps, options)
    else:
        sides_of = _activation_moments(balanced, problems, samples, options)

    def solve(group: Sequence[TransportProblem]) -> dict[str, tuple[Tensor, float]]:
        return _solve(balanced, group, sides_of, options)

    groups = _by_blocks(balanced.structure, problems)
    # The solvers let other threads run; but weights are compared once the maps of earlier layers have aligned them.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        solutions: Iterable[Mapping[str, tuple[Tensor, float]]] = (map if by_weights else pool.map)(solve, groups)
        pairs = zip(groups, solutions, strict=True)
        for group, found in tracked(pairs, "matching neurons", len(groups)):
            for key, (mapping, cost) in found.items():
                maps[group[0].parent][key], costs[group[0].parent][key] = mapping, cost
    return maps, costs


def _add_maps_of_zeros(balanced: Balanced, maps: tuple[Maps, ...]) -> None:
    """With a map per layer: the maps onto the neurons of blocks that the anchor lacks, where its features are zeros.

    All neurons are equally far from zeros, so that any plan is optimal.
    """
    anchor = balanced.parents[balanced.anchor]
    for layer in balanced.structure.layers:
        axis = balanced.structure.written(layer)
        if axis is None or layer.weight is None or axis.spaces[0] in anchor.spaces:
            continue
        new = balanced.layout[layer.weight][0]
        for k, parent in enumerate(balanced.parents):
            if new is not None and (own := parent.spaces.get(axis.spaces[0])) is not None:
                cost = torch.zeros(parent.structure.sizes[own], len(new.of), dtype=torch.float64)
                maps[k][layer.name] = as_map(transport_plan(cost))


def _is_known(balanced: Balanced, problem: TransportProblem, options: FusionOptions) -> bool:
    """Whether anything is known by which the neurons of a problem could be compared."""
    if options.features != "weights":
        return bool(_observed(balanced, problem, options))
    return _compared_layer(balanced, problem) is not None


def _compared_layer(balanced: Balanced, problem: TransportProblem) -> Layer | None:
    """The first layer whose incoming weights both networks have, or an identity stands in for."""
    both = (problem.parent, problem.reference)
    layers = [layer for layer, _ in problem.layers if layer.weight is not None]
    return next(
        (one for one in layers if all(parameter_of(balanced, k, str(one.weight)) is not None for k in both)), None
    )


def _check_equal_widths(balanced: Balanced) -> None:
    own = balanced.structure.sizes
    for parent in balanced.parents:
        if any(own[space] != parent.structure.sizes[theirs] for space, theirs in parent.spaces.items()):
            raise FusionError("Expected parents of equal widths for combine=average, got different ones; use transport")


def _by_blocks(structure: Structure, problems: Sequence[TransportProblem]) -> list[list[TransportProblem]]:
    """The problems that are solved together: those of the neurons in the same blocks."""
    groups: dict[tuple[int, str], list[TransportProblem]] = {}
    for problem in problems:
        groups.setdefault((problem.parent, outermost(structure, problem.space) or problem.key), []).append(problem)
    return list(groups.values())


def outermost(structure: Structure, space: str) -> str | None:
    """The outermost blocks that the neurons of a space are in."""
    parent = structure.spaces.spaces[space].parent
    return None if parent is None else outermost(structure, parent) or parent


def _activation_moments(
    balanced: Balanced, problems: Sequence[TransportProblem], samples: Tensor, options: FusionOptions
) -> Callable[[TransportProblem], Sides]:
    """Measure what neurons compute for the samples; gives the moments of each problem."""
    nodes = {problem: _observed(balanced, problem, options) for problem in problems}
    wanted: dict[_Key, tuple[Observation, Observation]] = {}
    for problem, names in nodes.items():
        for name in names:
            for one, other in _pairs(problem, options):
                wanted[name, problem.space, one, other] = (
                    observation(balanced, one, name, problem.space),
                    observation(balanced, other, name, problem.space),
                )
    runners = balanced.runners
    size = batch_size(runners, options.memory_budget)
    moments = paired_moments(runners, wanted, samples, size)
    if options.cost == "correlation" and options.features == "activations" and options.solver != "gromov":
        moments |= _moments_of_silent(balanced, problems, nodes, moments, samples, size)
    return lambda problem: [
        [moments[name, problem.space, one, other] for name in nodes[problem]] for one, other in _pairs(problem, options)
    ]


def _moments_of_silent(
    balanced: Balanced,
    problems: Sequence[TransportProblem],
    nodes: Mapping[TransportProblem, Sequence[str]],
    moments: Mapping[_Key, Moments],
    samples: Tensor,
    size: int,
) -> dict[_Key, Moments]:
    """Moments by which neurons that do not vary are told apart: those before their activation function."""
    before = {layer.post: layer.pre for layer in balanced.structure.layers if layer.post != layer.pre}
    wanted: dict[_Key, tuple[Observation, Observation]] = {}
    for problem in problems:
        one, other = problem.parent, problem.reference
        for name in nodes[problem]:
            key = name, problem.space, one, other
            silent = [int(side.sum()) for side in moments[key].silent()]
            if min(silent) > 0 and max(silent) > 1 and name in before:
                earlier = before[name]
                if all(is_observable(balanced, node, problem.space, (one, other)) for node in (name, earlier)):
                    wanted[key] = (
                        observation(balanced, one, earlier, problem.space),
                        observation(balanced, other, earlier, problem.space),
                    )
    found = paired_moments(balanced.runners, wanted, samples, size) if wanted else {}
    return {key: replace(moments[key], before=one) for key, one in found.items()}


def observation(balanced: Balanced, k: int, node: str, space: str) -> Observation:
    """The places of the neurons of a space of a parent in the output of one of its nodes."""
    parent = balanced.parents[k]
    own = parent.nodes[node]
    axes = parent.structure.spaces.of_node(own)
    assert axes is not None
    dim, axis = next((d, one) for d, one in enumerate(axes) if one is not None and parent.spaces[space] in one.spaces)
    entries = places(axis, axis.spaces.index(parent.spaces[space]))
    whole = len(entries) == 1 and torch.equal(entries[0], torch.arange(len(axis.of)))
    others = tuple(d for d, one in enumerate(axes) if one is not None and d != dim)
    return Observation(k, own, dim, None if whole else entries, others)


def _pairs(problem: TransportProblem, options: FusionOptions) -> list[tuple[int, int]]:
    """The networks to be related in a problem."""
    one, other = problem.parent, problem.reference
    return [(one, one), (other, other)] if options.solver == "gromov" else [(one, other)]


def _observed(balanced: Balanced, problem: TransportProblem, options: FusionOptions) -> list[str]:
    """The nodes at which neurons are observed: after each layer that both parents really have."""
    both = {problem.parent, problem.reference}
    layers = [(layer, unit) for layer, unit in problem.layers if options.streams == "per_layer" or not layer.shortcut]
    common = [layer for layer, unit in layers or problem.layers if both <= balanced.owners[unit.name].keys()]
    result: dict[str, None] = {}
    for layer in common or [layer for layer, _ in layers or problem.layers]:
        # Behind the layer its neurons may be spread over several dimensions, as heads are.
        names = (layer.post if options.features == "activations" else layer.pre, layer.norm or layer.node, layer.node)
        found = next((name for name in names if is_observable(balanced, name, problem.space, both)), None)
        if found is not None:
            result[found] = None
    return list(result)


def is_observable(balanced: Balanced, node: str, space: str, parents: Collection[int]) -> bool:
    """Whether some parents have a node, with the neurons of a space along one dimension of its output."""
    for k in parents:
        parent = balanced.parents[k]
        axes = parent.structure.spaces.of_node(parent.nodes[node]) if node in parent.nodes else None
        if sum(axis is not None and parent.spaces.get(space) in axis.spaces for axis in axes or ()) != 1:
            return False
    return True


def _incoming_moments(
    balanced: Balanced, maps: Sequence[Maps], options: FusionOptions, problem: TransportProblem
) -> Sides:
    """Compare neurons by their incoming weights, whose inputs the maps that there are already have aligned."""
    both = (problem.parent, problem.reference)
    layer = _compared_layer(balanced, problem)
    assert layer is not None
    features = {k: incoming_weights(balanced, k, layer, problem.space, maps[k], options).T for k in both}
    return [[Moments.of(features[one], features[other])] for one, other in _pairs(problem, options)]


def _solve(
    balanced: Balanced,
    group: Sequence[TransportProblem],
    sides_of: Callable[[TransportProblem], Sides],
    options: FusionOptions,
) -> dict[str, tuple[Tensor, float]]:
    """The maps of problems that are solved together, and their costs; an error says of which neurons it speaks."""
    first = group[0]
    structure = balanced.structure
    try:
        in_blocks = any(outermost(structure, problem.space) is not None for problem in group)
        if not in_blocks or options.streams != "shared":
            return {first.key: _solve_one(balanced, first, sides_of(first), options)}
        if options.solver == "gromov":
            raise FusionError("Expected another solver than gromov for neurons in blocks (heads or groups), got it")
        grounds = {problem.key: _ground(sides_of(problem)[0], options) for problem in group}
        parent, reference = (balanced.parents[k] for k in (first.parent, first.reference))
        blocks = {
            name: (parent.structure.spaces.spaces[own].block, reference.structure.spaces.spaces[other].block)
            for name, own, other in (
                (name, parent.spaces[name], reference.spaces[name]) for name in _tree(structure, grounds)
            )
        }
        tops = {name: structure.spaces.spaces[name].parent for name in blocks}
        sizes = {
            name: (parent.structure.sizes[parent.spaces[name]], reference.structure.sizes[reference.spaces[name]])
            for name in blocks
        }
        plan = partial(
            transport_plan,
            solver=options.solver,
            regularization=options.regularization,
            marginal_regularization=options.marginal_regularization,
        )
        return solve_in_blocks(grounds, tops, blocks, sizes, plan)
    except FusionError as error:
        raise FusionError(f"{parent_name(first.parent)}, neuron space {first.space!r}: {error}") from error


def _tree(structure: Structure, names: Iterable[str]) -> list[str]:
    """Spaces and all the blocks that they are in, the outermost first."""
    found: dict[str, None] = {}

    def add(name: str) -> None:
        parent = structure.spaces.spaces[name].parent
        if parent is not None:
            add(parent)
        found[name] = None

    for name in names:
        add(name)
    return list(found)


def _ground(side: Sequence[Moments], options: FusionOptions) -> Tensor:
    """The cost between the neurons of two networks, the mean over the places at which they were compared."""
    return torch.stack([ground_cost(part, options.cost, options.squared, options.normalize) for part in side]).mean(0)


def _solve_one(
    balanced: Balanced, problem: TransportProblem, sides: Sides, options: FusionOptions
) -> tuple[Tensor, float]:
    """The map of one set of neurons, and its cost."""
    mass = _mass(balanced, problem, options)
    costs = [_ground(side, options) for side in sides]
    if options.solver == "gromov":
        plan = gromov_plan(costs[0], costs[1], mass)
        square = (costs[0].square() @ plan.sum(1)) @ plan.sum(1) + (costs[1].square() @ plan.sum(0)) @ plan.sum(0)
        return as_map(plan), float(square - 2 * (plan * (costs[0] @ plan @ costs[1].T)).sum())
    plan = transport_plan(costs[0], options.solver, mass, options.regularization, options.marginal_regularization)
    return as_map(plan), float((plan * costs[0]).sum())


def _mass(balanced: Balanced, problem: TransportProblem, options: FusionOptions) -> tuple[Tensor, Tensor] | None:
    """The masses of the neurons of both sides; None: uniform."""
    if options.mass == "uniform":
        return None
    order = 1 if options.mass == "l1" else 2
    layer = problem.layers[0][0]
    norms = [
        incoming_weights(balanced, k, layer, problem.space).norm(order, dim=1)
        for k in (problem.parent, problem.reference)
    ]
    # A silent neuron keeps a little mass, or its map would not be defined.
    floors = [norm.clamp_min(1e-6 * max(float(norm.max()), 1e-12)) for norm in norms]
    return floors[0] / floors[0].sum(), floors[1] / floors[1].sum()
