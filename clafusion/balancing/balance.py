"""Balancing: every parent at one depth, by insertion or by merging, and which of them really has which unit."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from clafusion.alignment.layer_maps import Alignment, deep_and_shallow
from clafusion.balancing.insertion import bypass_of, inserted
from clafusion.balancing.merging import merged
from clafusion.balancing.verification import check_inserted
from clafusion.options import FusionOptions
from clafusion.tracing.capture import independent_copy
from clafusion.tracing.structure import Structure, structure_of
from clafusion.transport.balanced import Balanced, BalancedParent


def balance(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    template: int,
    alignments: Sequence[Alignment],
    samples: Tensor,
    options: FusionOptions,
    first_shares: Mapping[str, float] | None = None,
) -> Balanced:
    """Bring every parent to the depth of one of them, the template.

    Args:
        models: the parents; left as they are.
        structures: of the parents.
        template: index of the parent whose depth the result has.
        alignments: per parent, which layers correspond to the template's.
        samples: inputs, to merge layers by, and to check that inserted ones change nothing.
        options: `balance`, `relu`, `streams` and `anchor` are read.
        first_shares: how much of each of its units the first parent has; None: all of it.

    Raises:
        FusionError: if layers cannot be inserted or merged, or inserted ones change the function of a parent.
    """
    return Balanced(
        tuple(
            _balanced(models[template], structures[template], structure, alignment, samples, options, f"parent {k}")
            if k != template
            else BalancedParent(independent_copy(models[k]), structure)
            for k, (structure, alignment) in enumerate(zip(structures, alignments, strict=True))
        ),
        owners_by_unit(structures, template, alignments, first_shares, options),
        options.anchor_index,
        template,
    )


def _balanced(
    model: nn.Module,
    template: Structure,
    parent: Structure,
    alignment: Alignment,
    samples: Tensor,
    options: FusionOptions,
    called: str,
) -> BalancedParent:
    """One parent at the depth of the template, a network of its class."""
    deep, shallow = deep_and_shallow(template, parent, options)
    if options.balance == "merge":
        network = merged(model, deep, shallow, alignment, samples, options.relu).requires_grad_(True)
        return BalancedParent(network, structure_of(network, samples))
    zero_branches = options.streams == "per_layer"
    network = inserted(model, deep, shallow, alignment, zero_branches).requires_grad_(True)
    structure = structure_of(network, samples)
    check_inserted(structure, shallow, alignment, samples, called)
    stages = zip(deep.stages, alignment, strict=True)
    new = {unit.name for stage, places in stages for place, unit in enumerate(stage) if place not in places}
    return BalancedParent(network, structure, bypass_of(structure, new, zero_branches))


def owners_by_unit(
    structures: Sequence[Structure],
    template: int,
    alignments: Sequence[Alignment],
    first_shares: Mapping[str, float] | None,
    options: FusionOptions,
) -> dict[str, dict[int, float]]:
    """For each unit of the template the parents that really have it, and how much of it; arguments as `balance`."""
    everybody = dict.fromkeys(range(len(alignments)), 1.0)
    if options.balance == "merge":
        return {unit.name: everybody for unit in structures[template].units}
    owners = {}
    for stage, units in enumerate(structures[template].stages):
        for place, unit in enumerate(units):
            owners[unit.name] = {k: 1.0 for k in everybody if place in alignments[k][stage]}
            if first_shares is not None and 0 in owners[unit.name]:
                theirs = structures[0].stages[stage][alignments[0][stage].index(place)]
                owners[unit.name][0] = first_shares[theirs.name]
    return owners
