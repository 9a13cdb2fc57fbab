"""The map between the layers of two parents, stage by stage, and the costs that it was chosen by."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.dynamic_programming import align, chain, clamp_pins, is_forced, random_map
from clafusion.alignment.layer_costs import stage_costs
from clafusion.alignment.parents import check_parents, parents_of, template_of, trace_all, with_anchor
from clafusion.alignment.stages import FORBIDDEN, Alignment, StagePair, allowed, pair_stages
from clafusion.errors import FusionError
from clafusion.options import FusionOptions
from clafusion.statistics.batches import Batches, Inputs
from clafusion.statistics.memory import within_memory
from clafusion.statistics.samples import collect
from clafusion.tracing.structure import Structure
from clafusion.tracking import bar

#: Per stage a matrix of layer dissimilarities [deep, shallow]; None: not measured, since the map is forced.
StageCosts = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LayerAlignment:
    """The result of `align_layers`.

    Attributes:
        template: index of the parent whose depth the fused network would have.
        units: per parent and stage (the head last) the names of its units.
        alignments: as `Fusion.alignments`.
        costs: per parent and stage the matrix of layer dissimilarities [deep, shallow]: of the template's units to the
            parent's (`insert`), or of the parent's to the template's (`merge`).
        num_samples: how many samples were measured on.
    """

    template: int
    units: tuple[tuple[tuple[str, ...], ...], ...]
    alignments: tuple[Alignment, ...]
    costs: tuple[StageCosts, ...]
    num_samples: int

    def summary(self) -> dict[str, Any]:
        """The maps and the costs, as plain containers that `json.dumps` accepts."""
        return {
            "num_samples": self.num_samples,
            "template": self.template,
            "units": [[list(stage) for stage in stages] for stages in self.units],
            "alignments": [[list(stage) for stage in alignment] for alignment in self.alignments],
            "layer_costs": [as_lists(costs) for costs in self.costs],
        }


@torch.no_grad()
def align_layers(
    models: Iterable[nn.Module],
    batches: Batches,
    options: FusionOptions | None = None,
    *,
    inputs: Inputs = None,
    progress: bool | None = None,
) -> LayerAlignment:
    """Align the layers of networks as `fuse` does, without fusing, and measure every stage: forced maps, too.

    Args:
        models: at least two networks, as for `fuse`; left as they are.
        batches: unlabelled samples, as for `fuse`.
        options: those of `fuse`; None: the defaults.
        inputs: the part of a batch that the networks take, as for `fuse`.
        progress: whether to show a bar, as for `fuse`.

    Returns:
        The map and the costs of every stage of every parent.

    Raises:
        FusionError: as `fuse`; and for more than two parents fused one after another, since there each but the first
            is aligned to what was fused before.

    Example:
        >>> from clafusion.networks import MLP
        >>> maps = align_layers([MLP(8, [6, 5, 4], 3), MLP(8, [6, 4], 3)], [torch.randn(64, 8)])
        >>> maps.alignments[1], [list(cost.shape) for cost in maps.costs[1]]
        (((0, 2), (0,)), [[3, 2], [1, 1]])
    """
    parents = parents_of(models, "align_layers([a, b], batches)")
    options = FusionOptions() if options is None else options
    check_parents(parents, options)
    if options.many == "iterative" and len(parents) > 2:
        raise FusionError(
            "Expected many=many_to_one to align layers alone, got iterative: there each parent is aligned to what was "
            "fused before; fuse, or choose many_to_one"
        )

    def measure(samples: Tensor) -> LayerAlignment:
        structures = trace_all(parents, samples)
        anchored = with_anchor(structures, samples, options)
        template = template_of(structures, anchored)
        pairs = [deep_and_shallow(structures[template], structure, anchored) for structure in structures]
        costs = tuple(measure_stages(*pair, samples, anchored, forced=True) for pair in pairs)
        alignments = tuple(align_stages(*pair, each, anchored) for pair, each in zip(pairs, costs, strict=True))
        units = tuple(tuple(tuple(unit.name for unit in stage) for stage in one.stages) for one in structures)
        return LayerAlignment(template, units, alignments, costs, len(samples))

    with bar(progress) as step:
        step(f"aligning the layers of {len(parents)} networks")
        return within_memory(partial(measure, collect(batches, options.num_samples, inputs)))


def as_lists(costs: StageCosts) -> list[list[list[float]] | None]:
    """Layer costs as plain containers."""
    return [None if cost is None else cost.tolist() for cost in costs]


def deep_and_shallow(template: Structure, parent: Structure, options: FusionOptions) -> tuple[Structure, Structure]:
    """The deep and the shallow one of a parent and the template."""
    return (template, parent) if options.balance == "insert" else (parent, template)


def measure_stages(
    deep: Structure, shallow: Structure, samples: Tensor, options: FusionOptions, forced: bool = False
) -> StageCosts:
    """The layer costs of every stage whose map depends on them, or of the `forced` ones, too."""
    pairs = pair_stages(deep, shallow)

    def is_open(pair: StagePair) -> bool:
        depths = len(pair[0]), len(pair[1])
        return options.mapping == "optimal" and not is_forced(*depths, *_pins(pair, options))

    chosen = {n: pair for n, pair in enumerate(pairs) if pair[1] and (forced or is_open(pair))}
    costs = stage_costs(deep, shallow, samples, chosen, options.layer_measure, options.debiased) if chosen else {}
    return tuple(costs.get(number) for number in range(len(pairs)))


def align_stages(deep: Structure, shallow: Structure, costs: StageCosts, options: FusionOptions) -> Alignment:
    """For every stage the units of the deep network that those of the shallow one stand for."""
    alignment = []
    for number, (pair, cost) in enumerate(zip(pair_stages(deep, shallow), costs, strict=True)):
        barred, pins, seed = allowed(pair, options.balance == "insert"), _pins(pair, options), options.seed + number
        alignment.append(map_stage(len(pair[0]), len(pair[1]), cost, pins, options.mapping, seed, barred))
    return tuple(alignment)


def map_stage(
    rows: int,
    columns: int,
    cost: Tensor | None,
    pins: tuple[int, int],
    mapping: str,
    seed: int,
    barred: Tensor | None = None,
) -> tuple[int, ...]:
    """The map of one stage.

    Args:
        rows: units of the deep network.
        columns: units of the shallow one.
        cost: their dissimilarities [rows, columns], or None where the map is forced.
        pins: leading and trailing columns matched by force; a random map has the leading ones only, a chain none.
        mapping: `optimal`, `chain` or `random`.
        seed: of the random map.
        barred: added to the cost, so that some pairs are not chosen and some rows are; None: nothing.

    Returns:
        For every column its row, strictly increasing.
    """
    if not columns:
        return ()
    if mapping == "chain":
        return chain(rows, columns)
    some_barred = barred is not None and bool((barred >= FORBIDDEN).any())
    if mapping == "random" and not some_barred:
        return random_map(rows, columns, pins[0], seed)
    if mapping == "random":
        cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(rows, columns, dtype=torch.float64) if cost is None else cost.double()
    return align(total if barred is None else total + barred.to(total.device), *pins)


def _pins(pair: StagePair, options: FusionOptions) -> tuple[int, int]:
    """The pins of a stage; where units are inserted, those that cannot be identities must be matched."""
    ours, theirs = pair
    fixed = 0
    if options.balance == "insert":
        flags = [unit.insertable for unit in ours]
        fixed = flags.index(True) if True in flags else len(flags)
    elif options.mapping == "random":
        return 0, 0
    first, last = clamp_pins(len(theirs), max(options.pin_first, fixed), options.pin_last)
    if not theirs:
        return 0, 0
    # A pin is of no use between units that do different things.
    alike = [one.signature == other.signature for one, other in zip(ours, theirs, strict=False)]
    behind = [one.signature == other.signature for one, other in zip(reversed(ours), reversed(theirs), strict=False)]
    first = next((n for n in range(first) if not alike[n]), first)
    return first, next((n for n in range(last) if not behind[n]), last)
