"""The parents as they come: checked, traced, and compared in depth."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from clafusion.alignment.stages import pair_stages
from clafusion.errors import FusionError
from clafusion.naming import parent_name
from clafusion.options import FusionOptions, normalized
from clafusion.statistics.samples import all_finite, check_finite, logits_of
from clafusion.teachers.teacher import log_softmaxes, teacher_of
from clafusion.tracing.parameters import state_of
from clafusion.tracing.reading import structure_of
from clafusion.tracing.structure import Structure


def parents_of(models: Iterable[nn.Module], call: str) -> list[nn.Module]:
    """Return the networks in a list that a user gave.

    Args:
        models: the list, or anything else with networks.
        call: how the function is called, for the message.

    Raises:
        FusionError: if it is one network, a mapping, or holds something else.
    """
    if isinstance(models, Mapping | nn.ModuleDict):
        raise FusionError(f"Expected a list of models, got {type(models).__name__}; write list(models.values())")
    alone = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    if alone or isinstance(models, str) or not isinstance(models, Iterable):
        raise FusionError(f"Expected a list of models, got {type(models).__name__}; write {call}")
    found = list(models)
    for number, model in enumerate(found):
        if not isinstance(model, nn.Module):
            raise FusionError(
                f"Expected models as torch.nn.Module, got {type(model).__name__} for parent {number}; build the "
                "network, or read its file with clafusion.load_network"
            )
    return found


def check_parents(models: Sequence[nn.Module], options: FusionOptions) -> None:
    """Refuse what no samples are needed to refuse.

    Raises:
        FusionError: if there are fewer than two networks, the anchor is none of them, or `check_alike` fails.
    """
    if len(models) < 2:
        raise FusionError(f"Expected at least 2 networks to fuse, got {len(models)}")
    if isinstance(options.anchor, str) and options.anchor != "agreement":
        raise FusionError(f"Expected anchor to be the number of a network or agreement, got {options.anchor!r}")
    if isinstance(options.anchor, int) and options.anchor >= len(models):
        raise FusionError(f"Expected anchor to be below {len(models)}, the number of networks, got {options.anchor}")
    check_alike(models, [parent_name(number) for number in range(len(models))])


def check_alike(models: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Refuse networks that cannot be computed with together.

    Args:
        models: The networks.
        names: What to call each of them.

    Raises:
        FusionError: if a network has no parameters, one that is not finite, or is of another device or dtype.
    """
    kinds = set()
    for model, called in zip(models, names, strict=True):
        check_finite(state_of(model), called)
        first = next(model.parameters(), None)
        if first is None:
            raise FusionError(f"Expected networks with parameters, got none in {called}")
        kinds.add((first.device, first.dtype))
    if len(kinds) > 1:
        raise FusionError(f"Expected networks on one device and of one dtype, got {sorted(map(str, kinds))}")


def with_anchor(
    structures: Sequence[Structure],
    samples: Tensor,
    options: FusionOptions,
    columns: tuple[Tensor, ...] | None = None,
) -> FusionOptions:
    """The options with an index as anchor: the smallest of those that agree most often with the parents' teacher.

    Args:
        structures: of the parents.
        samples: unlabelled inputs.
        options: how; `anchor`, `weights`, `teacher` and `gate_temperature` are read.
        columns: see `Teacher`.
    """
    if options.anchor != "agreement":
        return options
    logits = [logits_of(structure, samples) for structure in structures]
    weights = normalized(options.weights, len(logits))
    together = teacher_of(logits, weights, options.teacher, options.gate_temperature, columns).log_probabilities(logits)
    answers = torch.stack([one.argmax(1) for one in log_softmaxes(logits, columns)])
    return replace(options, anchor=int((answers == together.argmax(1)).sum(1).argmax()))


def trace_as(model: nn.Module, samples: Tensor, name: str) -> Structure:
    """`structure_of`; an error says of which network it speaks."""
    try:
        return structure_of(model, samples)
    except FusionError as error:
        raise FusionError(f"{name}: {error}") from error


def trace_all(models: Sequence[nn.Module], samples: Tensor) -> list[Structure]:
    """The structures of networks that tell the same number of classes apart.

    Raises:
        FusionError: if a network cannot be traced, its outputs are not finite, or their classes differ in number.
    """
    structures = [trace_as(model, samples, parent_name(number)) for number, model in enumerate(models)]
    for number, structure in enumerate(structures):
        if not all_finite(structure.logits):
            raise FusionError(
                f"Expected finite outputs, got NaN or infinity from {parent_name(number)}; check its weights and the "
                "samples"
            )
    classes = [structure.logits.shape[1] for structure in structures]
    if len(set(classes)) > 1:
        found = ", ".join(f"{parent_name(number)}: {count}" for number, count in enumerate(classes))
        raise FusionError(f"Expected parents with the same number of classes, got {found}; choose others")
    return structures


def template_of(structures: Sequence[Structure], options: FusionOptions) -> int:
    """The parent whose depth the result has: the deepest (`insert`) or the shallowest (`merge`) in every stage.

    Raises:
        FusionError: if the stages cannot be matched one to one, or no parent is so in all of them.
    """
    candidates = [k for k in range(len(structures)) if _contains(structures, k, options)]
    if isinstance(options.anchor, int) and options.anchor in candidates:
        return options.anchor
    if not candidates:
        for k, structure in enumerate(structures[1:], 1):
            _pair_either_way(structures[0], structure, k)
        word = "deepest" if options.balance == "insert" else "shallowest"
        depths = [[len(stage) for stage in structure.stages] for structure in structures]
        raise FusionError(f"Expected one parent to be {word} in every stage, got stages of {depths} units")
    return max(candidates, key=lambda k: structures[k].rank)


def _contains(structures: Sequence[Structure], k: int, options: FusionOptions) -> bool:
    """Whether a parent is the deepest (`insert`) or the shallowest (`merge`) in every stage."""
    for structure in structures:
        deep, shallow = (structures[k], structure) if options.balance == "insert" else (structure, structures[k])
        try:
            pairs = pair_stages(deep, shallow)
        except FusionError:
            return False
        if any(len(ours) < len(theirs) for ours, theirs in pairs):
            return False
    return True


def _pair_either_way(one: Structure, other: Structure, k: int) -> None:
    """Refuse two parents of which neither has the stages of the other; the message is on the one with fewer."""
    ways = [(other, one, parent_name(0)), (one, other, parent_name(k))]
    first, last = sorted(ways, key=lambda way: len(way[0].stages))
    try:
        pair_stages(*first)
    except FusionError:
        pair_stages(*last)
