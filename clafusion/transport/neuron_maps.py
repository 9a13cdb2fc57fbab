"""The map of every set of neurons of every parent onto the anchor's."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.options import FusionOptions
from clafusion.statistics.moments import Moments, paired_moments
from clafusion.statistics.samples import batch_size
from clafusion.tracing.parameters import move, state_of
from clafusion.tracing.structure import Axis, Layer, Structure, Unit
from clafusion.tracking import tracked
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.solvers import as_map, gromov_plan, ground_cost, transport_plan


@dataclass(frozen=True)
class TransportProblem:
    """One set of neurons of a parent, to be carried onto the neurons that the result has.

    Attributes:
        key: the neuron space, or with one map per layer the layer.
        layers: the layers that write the space, in forward order, each with its unit.
        parent: the parent that has the neurons.
        reference: the parent whose neurons the result has.
    """

    key: str
    layers: tuple[tuple[Layer, Unit], ...]
    parent: int
    reference: int


#: The moments of the two networks of a problem at every node to compare; for Gromov of each network with itself.
Sides = Sequence[Sequence[Moments]]


def transport_problems(balanced: Balanced, options: FusionOptions) -> list[TransportProblem]:
    """Everything that needs a map, in forward order."""
    shared = options.streams == "shared"
    structure = balanced.structure
    grouped: dict[str, list[tuple[Layer, Unit]]] = {}
    for unit in structure.units:
        for layer in unit.layers:
            if layer.weighted and (shared or layer.kind != "depthwise"):
                grouped.setdefault(layer.space if shared else layer.name, []).append((layer, unit))
    problems = []
    for key, layers in grouped.items():
        space = layers[0][0].space
        if space == structure.input or (space == structure.output and options.head != "transport"):
            continue
        owners = frozenset().union(*(balanced.owners_of(layer, unit, shared) for layer, unit in layers))
        reference = balanced.reference(owners)
        problems += [TransportProblem(key, tuple(layers), k, reference) for k in sorted(owners - {reference})]
    return problems


def neuron_maps(
    balanced: Balanced, samples: Tensor, options: FusionOptions
) -> tuple[tuple[Maps, ...], tuple[dict[str, float], ...]]:
    """Solve the transport problem of every set of neurons of every parent.

    Returns:
        Per parent the maps [its neurons, the result's neurons] and the transport costs, by neuron space or layer; both
        are empty for the parent whose neurons the result has, and for all where neurons are averaged as they are.

    Raises:
        FusionError: if a problem has no solution, or parents to be averaged as they are differ in width.
    """
    maps: tuple[Maps, ...] = tuple({} for _ in balanced.parents)
    costs: tuple[dict[str, float], ...] = tuple({} for _ in balanced.parents)
    if options.combine == "average":
        widths = [dict(structure.sizes) for structure in balanced.structures]
        if any(width != widths[0] for width in widths):
            raise FusionError("Expected parents of equal widths for combine=average, got different ones; use transport")
        return maps, costs
    problems, by_weights = transport_problems(balanced, options), options.features == "weights"
    sides_of: Callable[[TransportProblem], Sides]
    if by_weights:
        sides_of = partial(_incoming_moments, balanced, maps, options)
    else:
        sides_of = _activation_moments(balanced, problems, samples, options)

    def solve(problem: TransportProblem) -> tuple[Tensor, float]:
        return _solve(balanced, problem, sides_of(problem), options)

    # The solvers let other threads run; but weights are compared once the maps of earlier layers have aligned them.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        solutions = zip(problems, (map if by_weights else pool.map)(solve, problems), strict=True)
        for problem, (mapping, cost) in tracked(solutions, "matching neurons", len(problems)):
            maps[problem.parent][problem.key], costs[problem.parent][problem.key] = mapping, cost
    return maps, costs


def _activation_moments(
    balanced: Balanced, problems: Sequence[TransportProblem], samples: Tensor, options: FusionOptions
) -> Callable[[TransportProblem], Sides]:
    """Measure what neurons compute for the samples; gives the moments of each problem."""
    nodes = {problem: _observed(balanced, problem, options) for problem in problems}
    pairs: dict[str, list[tuple[int, int]]] = {}
    for problem, names in nodes.items():
        for name in names:
            pairs[name] = list(dict.fromkeys([*pairs.get(name, []), *_pairs(problem, options)]))
    runners = balanced.runners
    moments = paired_moments(runners, pairs, samples, batch_size(runners, options.memory_budget))
    return lambda problem: [
        [moments[name, one, other] for name in nodes[problem]] for one, other in _pairs(problem, options)
    ]


def _pairs(problem: TransportProblem, options: FusionOptions) -> list[tuple[int, int]]:
    """The networks to be related in a problem."""
    one, other = problem.parent, problem.reference
    return [(one, one), (other, other)] if options.solver == "gromov" else [(one, other)]


def _observed(balanced: Balanced, problem: TransportProblem, options: FusionOptions) -> list[str]:
    """The nodes at which neurons are observed: after each layer that both parents really have."""
    both = {problem.parent, problem.reference}
    layers = [(layer, unit) for layer, unit in problem.layers if options.streams == "per_layer" or not layer.shortcut]
    common = [layer for layer, unit in layers if both <= balanced.owners[unit.name].keys()]
    observed = common or [layer for layer, _ in layers]
    return list(dict.fromkeys(layer.post if options.features == "activations" else layer.pre for layer in observed))


def _incoming_moments(
    balanced: Balanced, maps: Sequence[Maps], options: FusionOptions, problem: TransportProblem
) -> Sides:
    """Compare neurons by their incoming weights, whose inputs the maps that there are already have aligned."""
    layer = problem.layers[0][0]
    features = {
        k: _incoming(balanced.structures[k], layer, maps[k], options).T for k in (problem.parent, problem.reference)
    }
    return [[Moments.of(features[one], features[other])] for one, other in _pairs(problem, options)]


def _incoming(structure: Structure, layer: Layer, maps: Maps, options: FusionOptions) -> Tensor:
    """The incoming weights (and bias) of every neuron, [neurons, weights], with aligned inputs."""
    state = state_of(structure.module.get_submodule(layer.name))
    axes = structure.axes[f"{layer.name}.weight"]
    mappings = [None, *axis_maps(axes[1:], maps, options)]
    weight = move(state["weight"].double(), axes, mappings).flatten(1)
    return torch.cat([weight, state["bias"][:, None].to(weight)], 1) if "bias" in state else weight


def _solve(balanced: Balanced, problem: TransportProblem, sides: Sides, options: FusionOptions) -> tuple[Tensor, float]:
    """The map of a problem and its cost; an error says of which neurons it speaks."""
    mass = _mass(balanced, problem, options)
    try:
        costs = [
            torch.stack([ground_cost(part, options.cost, options.squared, options.normalize) for part in side]).mean(0)
            for side in sides
        ]
        if options.solver == "gromov":
            plan = gromov_plan(costs[0], costs[1], mass)
            square = (costs[0].square() @ plan.sum(1)) @ plan.sum(1) + (costs[1].square() @ plan.sum(0)) @ plan.sum(0)
            return as_map(plan), float(square - 2 * (plan * (costs[0] @ plan @ costs[1].T)).sum())
        plan = transport_plan(costs[0], options.solver, mass, options.regularization, options.marginal_regularization)
        return as_map(plan), float((plan * costs[0]).sum())
    except FusionError as error:
        space = problem.layers[0][0].space
        raise FusionError(f"parent {problem.parent}, neuron space {space!r}: {error}") from error


def _mass(balanced: Balanced, problem: TransportProblem, options: FusionOptions) -> tuple[Tensor, Tensor] | None:
    """The masses of the neurons of both sides; None: uniform."""
    if options.mass == "uniform":
        return None
    order = 1 if options.mass == "l1" else 2
    name = problem.layers[0][0].name
    modules = [balanced.structures[k].module.get_submodule(name) for k in (problem.parent, problem.reference)]
    norms = [state_of(module)["weight"].double().flatten(1).norm(order, dim=1) for module in modules]
    # A silent neuron keeps a little mass, or its map would not be defined.
    floors = [norm.clamp_min(1e-6 * max(float(norm.max()), 1e-12)) for norm in norms]
    return floors[0] / floors[0].sum(), floors[1] / floors[1].sum()


def axis_map(axis: Axis | None, maps: Maps, options: FusionOptions) -> Tensor | None:
    """The map that moves one axis of a parameter; None: it stays."""
    if axis is None:
        return None
    if options.streams == "shared":
        return maps.get(axis.space)
    layer_maps = [maps[layer] for layer in axis.layers if layer in maps]
    return torch.stack(layer_maps).mean(0) if layer_maps else None


def axis_maps(axes: Sequence[Axis | None], maps: Maps, options: FusionOptions) -> list[Tensor | None]:
    """The map that moves each axis of a parameter."""
    return [axis_map(axis, maps, options) for axis in axes]


def moved(structure: Structure, name: str, tensor: Tensor, maps: Maps, options: FusionOptions) -> Tensor:
    """A parameter of a balanced parent with all its axes carried onto the anchor's neurons."""
    axes = structure.axes[name]
    return move(tensor, axes, axis_maps(axes, maps, options))
