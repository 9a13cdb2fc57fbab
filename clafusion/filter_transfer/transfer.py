"""Heterogeneous model transfer: the filters of one network written into another of different depth and width.

Source: the transfer of heterogeneous networks in CLAFusion (Nguyen et al. 2023, arXiv 2110.15538), which puts its
cross-layer alignment in the place of a chain of layers.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clafusion.alignment.dynamic_programming import clamp_pins, is_forced
from clafusion.alignment.layer_costs import stage_costs
from clafusion.alignment.layer_maps import as_lists, map_stage
from clafusion.alignment.parents import check_alike, trace_as
from clafusion.alignment.stages import check_same_stages
from clafusion.errors import FusionError
from clafusion.filter_transfer.filters import fitted_state
from clafusion.formats.files import describe, restore
from clafusion.options import FusionOptions
from clafusion.statistics.batches import Batches, Inputs
from clafusion.statistics.samples import collect
from clafusion.tracing.example import example_for, example_of
from clafusion.tracing.exporting import operation_of
from clafusion.tracing.parameters import independent_copy, load_state, state_of
from clafusion.tracing.structure import Structure, Unit
from clafusion.tracing.units import LAYERS, NORMS
from clafusion.tracking import bar

MappingName = Literal["optimal", "chain", "random"]


@dataclass(frozen=True)
class UnitMap:
    """Which unit of the source each unit of the target takes its filters from.

    Attributes:
        pairs: per stage (the head last), in forward order, the matched (unit of the target, unit of the source).
        costs: per stage their dissimilarities [units of the target, units of the source]; None where the map was forced
            and nothing had to be measured.
    """

    pairs: tuple[tuple[tuple[int, int], ...], ...]
    costs: tuple[Tensor | None, ...]

    def summary(self) -> dict[str, Any]:
        """The map and the costs, as plain containers that `json.dumps` accepts."""
        return {
            "pairs": [[list(pair) for pair in stage] for stage in self.pairs],
            "layer_costs": as_lists(self.costs),
        }


@torch.no_grad()
def transfer(
    source: nn.Module,
    target: nn.Module,
    mapping: MappingName | UnitMap = "optimal",
    batches: Batches | None = None,
    *,
    classifier: bool = False,
    shortcuts: bool = False,
    reinitialize: bool = False,
    options: FusionOptions | None = None,
    inputs: Inputs = None,
    progress: bool | None = None,
) -> nn.Module:
    r"""Write the filters of a trained network into another of different depth and width.

    Stage by stage, the units of the shallower network are mapped to those of the deeper one, whichever of the two is
    the source. A matched layer of the target takes the source's filters: entry :math:`j` of an axis of neurons is the
    source's entry :math:`j \bmod n` of :math:`n` (repeated where the target is wider, truncated where it is narrower),
    for weights, biases and norms alike; kernels of another size are interpolated bilinearly (pixel centres aligned, as
    by default in `torch.nn.functional.interpolate`). Nothing is rescaled.

    The result is an ordinary network of the target's architecture; what the published experiments do with it is
    composition: `average([target, transferred], weights)`, or `fuse([target, transferred], batches)`; or without a
    transfer `fuse([target, source], batches)`, which inserts identities into the shallower one.

    Args:
        source: the network to take from; left as it is.
        target: the network whose architecture, and whose other weights, the result has; left as it is.
        mapping: the map of every stage: `optimal`, the cross-layer alignment on layer costs; `chain`, the k-th unit to
            the k-th; `random`, from `options.seed`; or what `map_units` returned.
        batches: unlabelled samples that both networks take, as for `fuse`; `optimal` needs them.
        classifier: whether the head is transferred as well, label by label.
        shortcuts: whether the projections of matched residual units are transferred too, where both have one.
        reinitialize: draw all that is not transferred anew, from `options.seed`, instead of keeping the target's.
        options: `layer_measure`, `debiased`, `pin_first`, `pin_last`, `num_samples` and `seed` are read; None: the
            defaults. The pins hold for `optimal`, the leading ones for `random` too.
        inputs: the part of a batch that the networks take, as for `fuse`.
        progress: whether to show a bar, as for `fuse`.

    Returns:
        A network of the class of the target, in eval mode.

    Raises:
        FusionError: if the networks have other stages, or layers that do not correspond; if `optimal` has no batches.

    Example:
        >>> from clafusion.networks import MLP
        >>> source, target = MLP(8, [2, 3], num_classes=3), MLP(8, [4, 5, 6], num_classes=3)
        >>> network = transfer(source, target, mapping="chain")
        >>> torch.equal(network.fc1.weight, source.fc1.weight[[0, 1, 0, 1]])
        True
        >>> torch.equal(network.fc3.weight, target.fc3.weight)
        True
    """
    options = FusionOptions() if options is None else options
    with bar(progress):
        samples = None if batches is None else collect(batches, options.num_samples, inputs)
        a, b = _structures(source, target, samples)
        found = mapping if isinstance(mapping, UnitMap) else _map_structures(a, b, mapping, samples, options)
    stages = zip(_checked(found, a, b), a.stages, b.stages, strict=True)
    chosen = [(ours[i], theirs[j]) for pairs, theirs, ours in stages for i, j in pairs]
    if classifier:
        _check_classes(a, b)
    state: dict[str, Tensor] = {}
    for ours, theirs in chosen if classifier else chosen[:-1]:
        for path, other in _matched_modules(b, a, ours, theirs, shortcuts and _projects(theirs)):
            state.update(fitted_state(b, a, (state_of(target), state_of(source)), path, other))
    network = _fresh(target, b, options.seed) if reinitialize else independent_copy(target)
    return load_state(network, {**state_of(network), **state})


@torch.no_grad()
def map_units(
    source: nn.Module,
    target: nn.Module,
    mapping: MappingName = "optimal",
    batches: Batches | None = None,
    options: FusionOptions | None = None,
    *,
    inputs: Inputs = None,
    progress: bool | None = None,
) -> UnitMap:
    """The map that `transfer` goes by, without a transfer; the arguments are those of `transfer`.

    Args:
        source: the network to take from.
        target: the network to write into.
        mapping: `optimal`, `chain` or `random`.
        batches: unlabelled samples; `optimal` needs them.
        options: how to measure; None: the defaults.
        inputs: the part of a batch that the networks take, as for `fuse`.
        progress: whether to show a bar, as for `fuse`.

    Raises:
        FusionError: as `transfer`.
    """
    options = FusionOptions() if options is None else options
    with bar(progress):
        samples = None if batches is None else collect(batches, options.num_samples, inputs)
        return _map_structures(*_structures(source, target, samples), mapping, samples, options)


def _structures(source: nn.Module, target: nn.Module, samples: Tensor | None) -> tuple[Structure, Structure]:
    """Return the structures of source and target; without samples, each is traced on made-up ones."""
    named = {"the source": source, "the target": target}
    check_alike(list(named.values()), list(named))
    a, b = (trace_as(net, example_for(net)[0] if samples is None else samples, name) for name, net in named.items())
    check_same_stages(a, b, ("the source", "the target"))
    return a, b


def _map_structures(
    source: Structure, target: Structure, mapping: MappingName, samples: Tensor | None, options: FusionOptions
) -> UnitMap:
    """The map of every stage, from the shallower side to the deeper one."""
    options = replace(options, mapping=mapping)  # which refuses a mapping that there is not
    if mapping == "optimal" and samples is None:
        raise FusionError("Expected batches to align layers on, got none; pass unlabelled samples, or mapping='chain'")
    depths = [(len(ours), len(theirs)) for theirs, ours in zip(source.stages, target.stages, strict=True)]
    pins = [clamp_pins(min(depth), options.pin_first, options.pin_last) for depth in depths]
    unsure = [n for n, depth in enumerate(depths) if not is_forced(max(depth), min(depth), *pins[n])]
    costs: dict[int, Tensor] = {}
    if mapping == "optimal" and samples is not None and unsure:
        stages = {n: (target.stages[n], source.stages[n]) for n in unsure}
        costs = stage_costs(target, source, samples, stages, options.layer_measure, options.debiased)
    pairs = []
    for n, (ours, theirs) in enumerate(depths):
        cost = costs[n].T if n in costs and theirs > ours else costs.get(n)
        rows = map_stage(max(ours, theirs), min(ours, theirs), cost, pins[n], mapping, options.seed + n)
        pairs.append(tuple((row, k) if ours >= theirs else (k, row) for k, row in enumerate(rows)))
    return UnitMap(tuple(pairs), tuple(costs.get(n) for n in range(len(depths))))


def _checked(found: UnitMap, source: Structure, target: Structure) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The pairs of a map, if they are ones of these networks.

    Raises:
        FusionError: if there is another number of stages, no pair of heads, or no such unit.
    """
    depths = [(len(ours), len(theirs)) for theirs, ours in zip(source.stages, target.stages, strict=True)]
    fits = len(found.pairs) == len(depths) and all(
        0 <= i < depth[0] and 0 <= j < depth[1]
        for pairs, depth in zip(found.pairs, depths, strict=False)
        for i, j in pairs
    )
    if not fits or found.pairs[-1] != ((0, 0),):
        raise FusionError(
            f"Expected pairs of units for stages of {[list(depth) for depth in depths]}, got "
            f"{found.summary()['pairs']}; map these two networks anew"
        )
    return found.pairs


def _check_classes(source: Structure, target: Structure) -> None:
    counts = source.logits.shape[1], target.logits.shape[1]
    if counts[0] != counts[1]:
        raise FusionError(
            f"Expected a source with the target's {counts[1]} classes to transfer the classifier, got {counts[0]}; "
            "leave the classifier out"
        )


def _matched_modules(
    target: Structure, source: Structure, ours: Unit, theirs: Unit, shortcuts: bool
) -> list[tuple[str, str]]:
    """Pair the modules with parameters of two units, of the shortcuts only if wanted and if ours has one.

    Raises:
        FusionError: if the units have other layers.
    """
    wanted = shortcuts and _projects(ours)
    sides = [_modules(structure, unit, wanted) for structure, unit in ((target, ours), (source, theirs))]
    kinds = [[kind for _, kind in side] for side in sides]
    if kinds[0] != kinds[1]:
        raise FusionError(
            f"Expected matched units with the same layers, got {', '.join(kinds[0])} in {ours.name!r} and "
            f"{', '.join(kinds[1])} in {theirs.name!r}"
        )
    return [(path, other) for (path, _), (other, _) in zip(*sides, strict=True)]


def _modules(structure: Structure, unit: Unit, shortcuts: bool) -> list[tuple[str, str]]:
    """The path and the kind of every layer and norm of a unit; those of shortcuts last, or not at all."""
    layers = {layer.node: layer for layer in unit.layers}
    beside = {node for layer in unit.layers if layer.shortcut for node in (layer.node, layer.norm)}
    branch: list[tuple[str, str]] = []
    projections: list[tuple[str, str]] = []
    for name in unit.nodes:
        operation = operation_of(structure.nodes[name])
        tensors = [structure.capture.names.get(one.name) for one in structure.nodes[name].all_input_nodes]
        paths = [one.rpartition(".")[0] for one in tensors if one is not None]
        if operation in LAYERS | NORMS and paths:
            kind = layers[name].kind if name in layers else "norm"
            (projections if name in beside else branch).append((paths[0], kind))
    return branch + projections if shortcuts else branch


def _projects(unit: Unit) -> bool:
    """Whether a unit has a projection shortcut."""
    return any(layer.shortcut for layer in unit.layers)


def _fresh(model: nn.Module, structure: Structure, seed: int) -> nn.Module:
    """A copy of a network with weights drawn anew; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = restore(describe(model, example_of(structure.capture)))
    drawn = {name for name, _ in fresh.named_parameters()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    # Other buffers are constants, which a description does not hold.
    state = {name: one for name, one in state_of(fresh).items() if name in drawn or name.endswith(statistics)}
    return load_state(independent_copy(model), {**state_of(model), **state})
