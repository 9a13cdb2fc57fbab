"""Balancing: every parent seen at one depth, and which of them really has which unit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clafusion.alignment.layer_maps import deep_and_shallow
from clafusion.alignment.stages import Alignment, pair_stages
from clafusion.balancing.correspondence import correspond, itself
from clafusion.balancing.insertion import sizes_once_inserted
from clafusion.balancing.merging import merged
from clafusion.balancing.verification import activated, check_passing
from clafusion.errors import FusionError
from clafusion.naming import parent_name
from clafusion.options import FusionOptions
from clafusion.tracing.comparison import TOLERANCE, difference, few_of
from clafusion.tracing.execution import GraphRunner, as_input
from clafusion.tracing.reading import structure_of
from clafusion.tracing.resizing import room_for
from clafusion.tracing.structure import Structure
from clafusion.transport.balanced import Balanced, Correspondence


def balance(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    template: int,
    alignments: Sequence[Alignment],
    samples: Tensor,
    options: FusionOptions,
    first_shares: Mapping[str, float] | None = None,
) -> tuple[Balanced, nn.Module, Structure]:
    """Pair every parent with one of them, the template.

    Args:
        models: the parents; left as they are.
        structures: of the parents.
        template: index of the parent whose depth the result has.
        alignments: per parent, which layers correspond to the template's.
        samples: inputs, to merge layers by, and to check that identities change nothing.
        options: `balance`, `relu` and `anchor` are read.
        first_shares: how much of each of its units the first parent has; None: all of it.

    Returns:
        The parents side by side, and a network with room for the result, with its structure.

    Raises:
        FusionError: if parents cannot be paired or merged, or an identity would change the function of a parent.
    """
    deepest = structures[template]
    parents = tuple(
        itself(structure)
        if k == template
        else _paired(models, structures, template, k, alignments[k], samples, options)
        for k, structure in enumerate(structures)
    )
    anchor = parents[options.anchor_index]
    sizes = {
        name: anchor.structure.sizes[anchor.spaces[name]] if name in anchor.spaces else size
        for name, size in deepest.sizes.items()
    }
    if options.streams == "per_layer":  # as published, the result is as wide inside inserted blocks as the anchor is
        sizes = sizes_once_inserted(deepest, anchor)
    network, room = room_for(models[template], deepest, sizes, samples)
    owners = owners_by_unit(structures, template, alignments, first_shares, options)
    return Balanced(parents, owners, options.anchor_index, template, room.axes), network, room


def _paired(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    template: int,
    k: int,
    alignment: Alignment,
    samples: Tensor,
    options: FusionOptions,
) -> Correspondence:
    """One parent seen from the template."""
    called = parent_name(k)
    if options.balance == "merge":
        deep, shallow = deep_and_shallow(structures[template], structures[k], options)
        network = merged(models[template], deep, shallow, alignment, samples, options.relu)
        structure = structure_of(network, samples)
        found = correspond(structures[template], structure, _same_depth(structure), called)
        return replace(found, merged=network)
    found = correspond(structures[template], structures[k], alignment, called)
    check_identities(structures[template], found, samples, called)
    return found


def _same_depth(structure: Structure) -> Alignment:
    return [range(len(stage)) for stage in structure.stages]


@torch.no_grad()
def check_identities(template: Structure, parent: Correspondence, samples: Tensor, called: str) -> None:
    """Refuse units that are no identities, and activations that change the stream which they would be inserted into.

    Args:
        template: the structure with all units.
        parent: one without some of them.
        samples: inputs; the first few are run.
        called: what the message calls the parent.
    """
    missing = [unit for unit in template.units if unit.name not in parent.units]
    check_passing(template, missing, few_of(samples))
    wanted = {parent.nodes[unit.input] for unit in missing}
    run = GraphRunner(parent.structure.capture).observe(as_input(few_of(samples), parent.structure.capture), wanted)
    streams = dict(run)
    for unit in missing:
        stream = streams[parent.nodes[unit.input]]
        passed = activated(template, unit, stream)
        error = difference(stream, passed)
        if not error <= TOLERANCE.get(stream.dtype, 1e-3):
            raise FusionError(
                f"Expected inserted layers to leave {called}'s function as it is, got features that differ by "
                f"{error:.1e} (relative) behind {unit.name!r}; only ReLU-like activations pass an identity"
            )


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
                theirs = pair_stages(structures[template], structures[0])[stage][1][alignments[0][stage].index(place)]
                owners[unit.name][0] = first_shares[theirs.name]
    return owners
