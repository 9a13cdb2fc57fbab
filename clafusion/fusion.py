"""Fusing trained networks of different depth and width into one: the main path of the library.

`models -> trace -> layer costs -> align -> balance -> maps -> move, average -> correct -> one network`
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment import align, chain, clamp_pins, is_forced, random_map
from clafusion.balance import check_same_function, inserted
from clafusion.combination import combine, normalized
from clafusion.correction import correct
from clafusion.errors import FusionError
from clafusion.graph import independent_copy
from clafusion.layer_costs import check_stages, stage_costs
from clafusion.maps import Balanced, Maps, neuron_maps
from clafusion.merging import merged
from clafusion.options import FusionOptions
from clafusion.parameters import state_of
from clafusion.statistics import as_input, collect
from clafusion.structure import Structure, trace
from clafusion.targets import Parents

Alignment = tuple[tuple[int, ...], ...]


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
        options: what was asked for.
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
    _check_models(models, options)
    samples = collect(batches, options.num_samples)
    if len(samples) < 2:
        raise FusionError(f"Expected at least 2 samples to measure on, got {len(samples)}; pass more")
    weights = normalized(options.weights, len(models))
    if options.many == "iterative" and len(models) > 2:
        return _fold(models, samples, weights, options)
    return _fuse_at_once(models, samples, weights, options)


def _check_models(models: Sequence[nn.Module], options: FusionOptions) -> None:
    if len(models) < 2:
        raise FusionError(f"Expected at least 2 networks to fuse, got {len(models)}")
    if options.anchor >= len(models):
        raise FusionError(f"Expected anchor to be below {len(models)}, the number of networks, got {options.anchor}")
    kinds = set()
    for number, model in enumerate(models):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.isfinite().all():
                raise FusionError(f"Expected finite weights, got NaN or infinity in {name!r} of parent {number}")
        first = next(model.parameters(), None)
        if first is None:
            raise FusionError(f"Expected networks with parameters, got none in parent {number}")
        kinds.add((first.device, first.dtype))
    if len(kinds) > 1:
        raise FusionError(f"Expected parents on one device and of one dtype, got {sorted(map(str, kinds))}")


def _fuse_at_once(
    models: Sequence[nn.Module], samples: Tensor, weights: Sequence[float], options: FusionOptions
) -> Fusion:
    """Every parent onto the anchor, one average."""
    structures = _trace_all(models, samples)
    template = _template(structures, options)
    costs = [_layer_costs(structures, template, k, samples, options) for k in range(len(models))]
    alignments = tuple(_alignment(structures, template, k, costs[k], options) for k in range(len(models)))
    parents = tuple(
        _balance(models, structures, template, k, alignments[k], samples, options) for k in range(len(models))
    )
    balanced = Balanced(
        structures=tuple(trace(parent, as_input(samples[:2], parent)) for parent in parents),
        owners=_owners(structures, template, alignments, options),
        anchor=options.anchor,
        template=template,
    )
    maps, transport_costs = _maps(balanced, samples, options)
    model = combine(parents[options.anchor], balanced, maps, weights, options)
    correct(model, Parents(balanced, maps, weights, options.head), samples, options)
    return Fusion(
        model.requires_grad_(True), parents, alignments, template, tuple(costs), maps, transport_costs, tuple(weights),
        options, len(samples),
    )  # fmt: skip


def _fold(models: Sequence[nn.Module], samples: Tensor, weights: Sequence[float], options: FusionOptions) -> Fusion:
    """One parent after another onto the result so far, which keeps the share that its parents ask for."""
    order = [options.anchor, *(k for k in range(len(models)) if k != options.anchor)]
    pairwise = replace(options, anchor=0, weights=None)
    current, share = models[order[0]], weights[order[0]]
    steps: dict[int, Fusion] = {}
    for k in order[1:]:
        total = share + weights[k]
        pair = [share / total, weights[k] / total] if total else [0.5, 0.5]
        steps[k] = _fuse_at_once([current, models[k]], samples, pair, pairwise)
        current, share = steps[k].model, total
    first, last = steps[order[1]], steps[order[-1]]

    def gathered(name: str) -> tuple[Any, ...]:
        return tuple(
            getattr(first, name)[0] if k == options.anchor else getattr(steps[k], name)[1] for k in range(len(models))
        )

    return replace(
        last, balanced=gathered("balanced"), alignments=gathered("alignments"), layer_costs=gathered("layer_costs"),
        maps=gathered("maps"), costs=gathered("costs"), weights=tuple(weights), options=options,
        template=_template(_trace_all(models, samples), options),
    )  # fmt: skip


def _trace_all(models: Sequence[nn.Module], samples: Tensor) -> list[Structure]:
    structures = []
    for number, model in enumerate(models):
        try:
            structures.append(trace(model, as_input(samples[:2], model)))
        except FusionError as error:
            raise FusionError(f"parent {number}: {error}") from error
    classes = [structure.sizes[structure.output] for structure in structures]
    if len(set(classes)) > 1:
        raise FusionError(f"Expected parents with the same number of classes, got {classes}")
    return structures


def _template(structures: Sequence[Structure], options: FusionOptions) -> int:
    """The parent whose depth the result has: the deepest (`insert`) or the shallowest (`merge`) in every stage."""
    for k, structure in enumerate(structures[1:], 1):
        check_stages(structures[0], structure, ("parent 0", f"parent {k}"))
    depths = [tuple(len(stage) for stage in structure.stages) for structure in structures]
    extreme = tuple(map(max if options.balance == "insert" else min, zip(*depths, strict=True)))
    if depths[options.anchor] == extreme:
        return options.anchor
    if extreme not in depths:
        word = "deepest" if options.balance == "insert" else "shallowest"
        raise FusionError(
            f"Expected one parent to be {word} in every stage, got stages of {[list(d) for d in depths]} units"
        )
    candidates = [k for k, depth in enumerate(depths) if depth == extreme]
    return max(candidates, key=lambda k: _fingerprint(structures[k]))


def _fingerprint(structure: Structure) -> tuple[int, float]:
    """Ranks networks by what they are and not by where they stand, so that the order of the parents does not matter."""
    tensors = list(state_of(structure.module).values())
    return sum(tensor.numel() for tensor in tensors), sum(float(tensor.double().sum()) for tensor in tensors)


def _sides(
    structures: Sequence[Structure], template: int, k: int, options: FusionOptions
) -> tuple[Structure, Structure]:
    """The deep and the shallow structure of a parent and the template."""
    pair = structures[template], structures[k]
    return pair if options.balance == "insert" else (pair[1], pair[0])


def _pins(deep: Structure, shallow: Structure, stage: int, options: FusionOptions) -> tuple[int, int]:
    """The pins of a stage; where units are inserted, those that cannot be identities must be matched."""
    fixed = 0
    if options.balance == "insert":
        flags = [unit.insertable for unit in deep.stages[stage]]
        fixed = flags.index(True) if True in flags else len(flags)
    return clamp_pins(len(shallow.stages[stage]), max(options.pin_first, fixed), options.pin_last)


def _layer_costs(
    structures: Sequence[Structure], template: int, k: int, samples: Tensor, options: FusionOptions
) -> tuple[Tensor | None, ...]:
    """The cost matrix of every stage whose map is not forced."""
    deep, shallow = _sides(structures, template, k, options)
    depths = [(len(a), len(b)) for a, b in zip(deep.stages, shallow.stages, strict=True)]
    open_stages = [
        number
        for number, depth in enumerate(depths)
        if options.mapping == "optimal" and not is_forced(*depth, *_pins(deep, shallow, number, options))
    ]
    measured: dict[int, Tensor] = {}
    if open_stages:
        measured = stage_costs(deep, shallow, samples, open_stages, options.layer_measure, options.debiased)
    return tuple(measured.get(number) for number in range(len(depths)))


def _alignment(
    structures: Sequence[Structure], template: int, k: int, costs: Sequence[Tensor | None], options: FusionOptions
) -> Alignment:
    deep, shallow = _sides(structures, template, k, options)
    found = []
    for number, (ours, theirs) in enumerate(zip(deep.stages, shallow.stages, strict=True)):
        m, n = len(ours), len(theirs)
        pins = _pins(deep, shallow, number, options)
        cost = costs[number]
        if options.mapping == "chain":
            found.append(chain(m, n))
        elif options.mapping == "random":
            found.append(random_map(m, n, pins[0] if options.balance == "insert" else 0, options.seed + number))
        else:
            found.append(align(torch.zeros(m, n) if cost is None else cost, *pins))
    return tuple(found)


def _balance(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    template: int,
    k: int,
    alignment: Alignment,
    samples: Tensor,
    options: FusionOptions,
) -> nn.Module:
    """One parent at the template's depth."""
    if k == template:
        return independent_copy(models[k])
    deep, shallow = _sides(structures, template, k, options)
    if options.balance == "merge":
        return merged(models[template], deep, shallow, alignment, samples, options.relu).requires_grad_(True)
    network = inserted(models[template], deep, shallow, alignment, zero_branches=options.streams == "per_layer")
    check_same_function(network, models[k], samples[:8])
    return network.requires_grad_(True)


def _owners(
    structures: Sequence[Structure], template: int, alignments: Sequence[Alignment], options: FusionOptions
) -> dict[str, frozenset[int]]:
    """Which parents really have each unit of the template."""
    everybody = frozenset(range(len(structures)))
    owners = {}
    for number, stage in enumerate(structures[template].stages):
        for place, unit in enumerate(stage):
            having = frozenset(k for k in everybody if place in alignments[k][number])
            owners[unit.name] = everybody if options.balance == "merge" else having | {template}
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
