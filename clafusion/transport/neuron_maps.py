"""The map of every set of neurons of every parent onto the anchor's."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
class Site:
    """One set of neurons that gets one map.

    Attributes:
        key: a neuron space, or with one map per layer the layer.
        size_of: the space that it indexes.
        layers: the layers that write it, in forward order, each with its unit.
        owners: the parents that have it.
    """

    key: str
    size_of: str
    layers: tuple[tuple[Layer, Unit], ...]
    owners: frozenset[int]


def sites(balanced: Balanced, options: FusionOptions) -> list[Site]:
    """Everything that needs a map, in forward order."""
    shared = options.streams == "shared"
    structure = balanced.structure
    grouped: dict[str, list[tuple[Layer, Unit]]] = {}
    for unit in structure.units:
        for layer in unit.layers:
            if layer.weighted and (shared or layer.kind != "depthwise"):
                grouped.setdefault(layer.space if shared else layer.name, []).append((layer, unit))
    found = []
    for key, layers in grouped.items():
        space = layers[0][0].space
        if space == structure.input or (space == structure.output and options.head != "transport"):
            continue
        owners = frozenset().union(*(balanced.owners_of(layer, unit, shared) for layer, unit in layers))
        found.append(Site(key, space, tuple(layers), owners))
    return found


def neuron_maps(
    balanced: Balanced, samples: Tensor, options: FusionOptions
) -> tuple[tuple[Maps, ...], tuple[dict[str, float], ...]]:
    """Solve the transport problem of every site for every parent.

    Returns:
        Per parent the maps [its neurons, the result's neurons] and the transport costs, by site; both are empty for the
        parent whose neurons the result has.
    """
    places = sites(balanced, options)
    if options.features == "weights":
        return _weight_maps(balanced, places, options)
    maps: tuple[Maps, ...] = tuple({} for _ in balanced.structures)
    costs: tuple[dict[str, float], ...] = tuple({} for _ in balanced.structures)
    nodes = {(site.key, one): _nodes(balanced, site, one, options) for site, one in _problems(balanced, places)}
    pairs: dict[str, list[tuple[int, int]]] = {}
    for site, one in _problems(balanced, places):
        other = balanced.reference(site.owners)
        relations = [(one, other)] if options.solver != "gromov" else [(one, other), (one, one), (other, other)]
        for node in nodes[site.key, one]:
            pairs[node] = list(dict.fromkeys([*pairs.get(node, []), *relations]))
    size = batch_size(balanced.structures, options.memory_budget)
    moments = paired_moments(balanced.structures, pairs, samples, size)

    def solved(problem: tuple[Site, int]) -> tuple[Tensor, float]:
        site, one = problem
        other = balanced.reference(site.owners)
        sides = [[moments[node, a, b] for node in nodes[site.key, one]] for a, b in _sides(one, other, options)]
        return _solve(site, one, sides, _mass(balanced, site, one, options), options)

    problems = _problems(balanced, places)
    # The solvers let other threads run.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = zip(problems, pool.map(solved, problems), strict=True)
        for (site, one), (mapping, cost) in tracked(found, "matching neurons", len(problems)):
            maps[one][site.key], costs[one][site.key] = mapping, cost
    return maps, costs


def _problems(balanced: Balanced, places: Sequence[Site]) -> list[tuple[Site, int]]:
    return [(site, one) for site in places for one in sorted(site.owners - {balanced.reference(site.owners)})]


def _sides(one: int, other: int, options: FusionOptions) -> list[tuple[int, int]]:
    return [(one, one), (other, other)] if options.solver == "gromov" else [(one, other)]


def _nodes(balanced: Balanced, site: Site, one: int, options: FusionOptions) -> list[str]:
    """Where the neurons of a site are observed: after each layer that both parents really have."""
    both = {one, balanced.reference(site.owners)}
    layers = [(layer, unit) for layer, unit in site.layers if options.streams == "per_layer" or not layer.shortcut]
    common = [layer for layer, unit in layers if both <= balanced.owners[unit.name].keys()]
    chosen = common or [layer for layer, _ in layers]
    names = [layer.post if options.features == "activations" else layer.pre for layer in chosen]
    return list(dict.fromkeys(names))


def _solve(
    site: Site, one: int, sides: Sequence[Sequence[Moments]], mass: tuple[Tensor, Tensor] | None, options: FusionOptions
) -> tuple[Tensor, float]:
    """The map of a site and its cost; an error says of which neurons it speaks."""
    try:
        return _transport(sides, mass, options)
    except FusionError as error:
        raise FusionError(f"parent {one}, neuron space {site.size_of!r}: {error}") from error


def _transport(
    sides: Sequence[Sequence[Moments]], mass: tuple[Tensor, Tensor] | None, options: FusionOptions
) -> tuple[Tensor, float]:
    """A map and its cost, from the moments of one pair, or for Gromov of each network with itself."""
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


def _weight_maps(
    balanced: Balanced, places: Sequence[Site], options: FusionOptions
) -> tuple[tuple[Maps, ...], tuple[dict[str, float], ...]]:
    """Compare neurons by their incoming weights, whose inputs the earlier maps have already aligned."""
    maps: tuple[Maps, ...] = tuple({} for _ in balanced.structures)
    costs: tuple[dict[str, float], ...] = tuple({} for _ in balanced.structures)
    problems = _problems(balanced, places)
    for site, one in tracked(problems, "matching neurons", len(problems)):
        other = balanced.reference(site.owners)
        layer = site.layers[0][0]
        x, y = (_incoming(balanced.structures[k], layer, maps[k], options) for k in (one, other))
        pairs = [(x, x), (y, y)] if options.solver == "gromov" else [(x, y)]
        sides = [[Moments.of(a.T, b.T)] for a, b in pairs]
        maps[one][site.key], costs[one][site.key] = _solve(
            site, one, sides, _mass(balanced, site, one, options), options
        )
    return maps, costs


def _incoming(structure: Structure, layer: Layer, maps: Maps, options: FusionOptions) -> Tensor:
    """The incoming weights (and bias) of every neuron, [neurons, weights], with aligned inputs."""
    state = state_of(structure.module.get_submodule(layer.name))
    axes = structure.axes[f"{layer.name}.weight"]
    mappings = [None, *axis_maps(axes[1:], maps, options)]
    weight = move(state["weight"].double(), axes, mappings).flatten(1)
    return torch.cat([weight, state["bias"][:, None].to(weight)], 1) if "bias" in state else weight


def axis_map(axis: Axis | None, maps: Maps, options: FusionOptions) -> Tensor | None:
    """The map that moves one axis of a parameter; None: it stays."""
    if axis is None:
        return None
    if options.streams == "shared":
        return maps.get(axis.space)
    found = [maps[layer] for layer in axis.layers if layer in maps]
    return torch.stack(found).mean(0) if found else None


def axis_maps(axes: Sequence[Axis | None], maps: Maps, options: FusionOptions) -> list[Tensor | None]:
    """The map that moves each axis of a parameter."""
    return [axis_map(axis, maps, options) for axis in axes]


def moved(structure: Structure, name: str, tensor: Tensor, maps: Maps, options: FusionOptions) -> Tensor:
    """A parameter of a balanced parent with all its axes carried onto the anchor's neurons."""
    axes = structure.axes[name]
    return move(tensor, axes, axis_maps(axes, maps, options))


def _mass(balanced: Balanced, site: Site, one: int, options: FusionOptions) -> tuple[Tensor, Tensor] | None:
    """The masses of the neurons of both sides; None: uniform."""
    if options.mass == "uniform":
        return None
    order = 1 if options.mass == "l1" else 2
    layer = site.layers[0][0]
    both = [balanced.structures[k].module.get_submodule(layer.name) for k in (one, balanced.reference(site.owners))]
    norms = [state_of(module)["weight"].double().flatten(1).norm(order, dim=1) for module in both]
    # A silent neuron keeps a little mass, or its map would not be defined.
    floors = [norm.clamp_min(1e-6 * max(float(norm.max()), 1e-12)) for norm in norms]
    return floors[0] / floors[0].sum(), floors[1] / floors[1].sum()
