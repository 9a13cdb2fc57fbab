"""Fusing trained networks of different depth and width into one: the main path of the library.

`models -> trace -> layer costs -> align -> balance -> maps -> move, average -> correct -> one network`
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.layer_maps import Alignment, deep_and_shallow, map_stages, open_costs
from clafusion.alignment.parents import check_parents, template_of, trace_all, with_anchor
from clafusion.balancing.insertion import inserted, pass_on
from clafusion.balancing.merging import merged
from clafusion.balancing.verification import check_inserted
from clafusion.correction.correct import correct
from clafusion.correction.rescaling import add_missing_biases
from clafusion.correction.targets import Parents
from clafusion.errors import FusionError
from clafusion.fusion.averaging import combine
from clafusion.fusion.verification import check_maps, check_moved, check_outputs
from clafusion.options import FusionOptions, normalized
from clafusion.statistics.memory import within_memory
from clafusion.statistics.samples import check_finite, collect
from clafusion.tracing.capture import independent_copy
from clafusion.tracing.structure import Structure, structure_of
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.neuron_maps import neuron_maps

#: Per stage and unit of a network, which share of its weight comes from parents that have the unit.
Held = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Fusion:
    """What `fuse` returns.

    Attributes:
        model: the fused network, in eval mode.
        balanced: every parent at the fused network's depth, in the order of the parents.
        alignments: per parent and stage (the head last) the unit of the template that each of its units became
            (`insert`), or the unit of it that each of the template's stands for (`merge`).
        template: index of the parent whose depth the result has.
        layer_costs: per parent and stage the matrix of layer dissimilarities [deep, shallow], or None where the map was
            forced and nothing had to be measured.
        maps: per parent the maps [its neurons, the result's neurons] by neuron space (or layer).
        costs: per parent the transport cost of each map.
        weights: per parent, summing to one.
        options: what was asked for, with the anchor that was chosen.
        num_samples: how many samples were measured on.
    """

    model: nn.Module
    balanced: tuple[nn.Module, ...]
    alignments: tuple[Alignment, ...]
    template: int
    layer_costs: tuple[tuple[Tensor | None, ...], ...]
    maps: tuple[Maps, ...]
    costs: tuple[dict[str, float], ...]
    weights: tuple[float, ...]
    options: FusionOptions
    num_samples: int

    def summary(self) -> dict[str, Any]:
        """What happened, as plain containers that `json.dumps` accepts."""
        return {
            "options": self.options.to_dict(),
            "num_samples": self.num_samples,
            "weights": list(self.weights),
            "template": self.template,
            "alignments": [[list(stage) for stage in alignment] for alignment in self.alignments],
            "layer_costs": [[None if c is None else c.tolist() for c in costs] for costs in self.layer_costs],
            "transport_costs": [dict(costs) for costs in self.costs],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }


@torch.no_grad()
def fuse(models: Sequence[nn.Module], batches: Iterable[Any], options: FusionOptions | None = None) -> Fusion:
    """Fuse trained networks of different depth and width into one (CLAFusion, Nguyen et al. 2023).

    Args:
        models: at least two networks that `trace` understands, with the same input and classes; left as they are.
        batches: unlabelled samples: tensors [batch, ...], or tuples that begin with one, such as a DataLoader yields;
            read once, up to `options.num_samples` samples.
        options: how; None: the defaults.

    Returns:
        The fused network, with the anchor's widths and the template's depth, and how it came about.

    Raises:
        FusionError: if the networks, the samples or the options do not fit together; nothing has been changed then.

    Example:
        >>> from clafusion.networks import MLP
        >>> a, b = MLP(8, [6, 5, 4], num_classes=3), MLP(8, [6, 4], num_classes=3)
        >>> fusion = fuse([a, b], [torch.randn(64, 8)])
        >>> fusion.model(torch.randn(2, 8)).shape
        torch.Size([2, 3])
    """
    options = FusionOptions() if options is None else options
    models = list(models)
    check_parents(models, options)
    samples = collect(batches, options.num_samples)
    if len(samples) < 2:
        raise FusionError(f"Expected at least 2 samples to measure on, got {len(samples)}; pass more")
    weights = normalized(options.weights, len(models))

    def compute() -> Fusion:
        chosen = with_anchor(models, samples, options)
        fold = chosen.many == "iterative" and len(models) > 2
        return (_fold if fold else _fuse_at_once)(models, samples, weights, chosen)

    return within_memory(compute)


def _fuse_at_once(
    models: Sequence[nn.Module],
    samples: Tensor,
    weights: Sequence[float],
    options: FusionOptions,
    held: Held | None = None,
) -> Fusion:
    """Every parent onto the anchor, one average; `held`: of the first parent, None: it has all its units wholly."""
    structures = trace_all(models, samples)
    template = template_of(structures, options)
    sides = [deep_and_shallow(structures, template, k, options) for k in range(len(models))]
    costs = [open_costs(*side, samples, options) for side in sides]
    alignments = tuple(map_stages(*side, cost, options) for side, cost in zip(sides, costs, strict=True))
    parts = [_balance(models, structures, k, template, alignments[k], samples, options) for k in range(len(models))]
    parents = tuple(network for network, _ in parts)
    balanced = Balanced(
        structures=tuple(structure for _, structure in parts),
        owners=owners_by_unit(structures[template], template, alignments, held, options),
        anchor=options.anchor_index,
        template=template,
    )
    maps, transport_costs = _maps(balanced, samples, options)
    check_maps(balanced, maps)
    check_moved(balanced, maps, samples, options)
    model = combine(parents[options.anchor_index], balanced, maps, weights, options)
    check_finite(model, "the fused network", balanced.structure)
    if options.correction != "none":
        lead = options.anchor_lead if options.correction == "refit" else 1.0
        correct(model, Parents(balanced, maps, weights, options.head, lead), samples, options)
        check_finite(model, f"the fused network after {options.correction}", balanced.structure)
    check_outputs(model, samples)
    return Fusion(
        model.requires_grad_(True), parents, alignments, template, tuple(costs), maps, transport_costs, tuple(weights),
        options, len(samples),
    )  # fmt: skip


def _fold(models: Sequence[nn.Module], samples: Tensor, weights: Sequence[float], options: FusionOptions) -> Fusion:
    """One parent after another onto the result so far, which keeps the share that its parents ask for."""
    if options.correction == "repair":
        # Repairing one step gives its result biases, which the next parent must have as well.
        models = [add_missing_biases(independent_copy(model)) for model in models]
    # Here all are named as they were given; what is refused later is refused after some of the work.
    template = template_of(trace_all(models, samples), options)
    anchor = options.anchor_index
    order = [anchor, *(k for k in range(len(models)) if k != anchor)]
    pairwise = replace(options, anchor=0, weights=None)
    current, share, held = models[order[0]], weights[order[0]], None
    steps: dict[int, Fusion] = {}
    for k in order[1:]:
        total = share + weights[k]
        pair = [share / total, weights[k] / total] if total else [0.5, 0.5]
        try:
            steps[k] = _fuse_at_once([current, models[k]], samples, pair, pairwise, held)
        except FusionError as error:
            raise FusionError(f"adding parent {k} (parent 1 here) to the result so far (parent 0): {error}") from error
        current, share, held = steps[k].model, total, _held(steps[k], held)
    first, last = steps[order[1]], steps[order[-1]]

    def gathered(name: str) -> tuple[Any, ...]:
        return tuple(getattr(first, name)[0] if k == anchor else getattr(steps[k], name)[1] for k in range(len(models)))

    return replace(
        last, balanced=gathered("balanced"), alignments=gathered("alignments"), layer_costs=gathered("layer_costs"),
        maps=gathered("maps"), costs=gathered("costs"), weights=tuple(weights), options=options,
        template=template,
    )  # fmt: skip


def _held(step: Fusion, before: Held | None) -> Held | None:
    """What the result of a step holds of each unit, given what its first parent held."""
    if step.options.balance == "merge":
        return None
    held = []
    for number, stages in enumerate(zip(*step.alignments, strict=True)):
        depth = len(stages[step.template])
        found = [0.0] * depth
        for k, (places, weight) in enumerate(zip(stages, step.weights, strict=True)):
            for unit, place in enumerate(places):
                found[place] += weight * (before[number][unit] if before is not None and k == 0 else 1.0)
        held.append(tuple(found))
    return tuple(held)


def _balance(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    k: int,
    template: int,
    alignment: Alignment,
    samples: Tensor,
    options: FusionOptions,
) -> tuple[nn.Module, Structure]:
    """One parent at the template's depth, and its structure; what its inserted units give is not computed any more."""
    if k == template:
        return independent_copy(models[k]), structures[k]
    deep, shallow = deep_and_shallow(structures, template, k, options)
    if options.balance == "merge":
        network = merged(models[template], deep, shallow, alignment, samples, options.relu).requires_grad_(True)
        return network, structure_of(network, samples)
    zero_branches = options.streams == "per_layer"
    network = inserted(models[template], deep, shallow, alignment, zero_branches).requires_grad_(True)
    structure = structure_of(network, samples)
    check_inserted(structure, shallow, alignment, samples, f"parent {k}")
    stages = zip(deep.stages, alignment, strict=True)
    new = {unit.name for stage, places in stages for place, unit in enumerate(stage) if place not in places}
    pass_on(structure, new, zero_branches)
    return network, structure


def owners_by_unit(
    template: Structure, number: int, alignments: Sequence[Alignment], held: Held | None, options: FusionOptions
) -> dict[str, dict[int, float]]:
    """For each unit of the template (parent `number`) the parents that really have it, and how much of it."""
    everybody = dict.fromkeys(range(len(alignments)), 1.0)
    owners = {}
    for stage, units in enumerate(template.stages):
        for place, unit in enumerate(units):
            having = {k: 1.0 for k in everybody if place in alignments[k][stage] or k == number}
            if held is not None and 0 in having:
                having[0] = held[stage][alignments[0][stage].index(place)]
            owners[unit.name] = everybody if options.balance == "merge" else having
    return owners


def _maps(
    balanced: Balanced, samples: Tensor, options: FusionOptions
) -> tuple[tuple[Maps, ...], tuple[dict[str, float], ...]]:
    if options.combine == "transport":
        return neuron_maps(balanced, samples, options)
    widths = [dict(structure.sizes) for structure in balanced.structures]
    if any(width != widths[0] for width in widths):
        raise FusionError("Expected parents of equal widths for combine=average, got different ones; use transport")
    nothing: tuple[Maps, ...] = tuple({} for _ in widths)
    return nothing, tuple({} for _ in widths)
