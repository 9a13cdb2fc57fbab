"""The stages of two networks side by side, and which of their units may stand for each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing.signatures import Signature
from clafusion.tracing.structure import Structure, Unit

#: Per stage of the deep network (the head last), for every unit of the shallow one the unit that it stands for.
Alignment = Sequence[Sequence[int]]
#: The units of the deep network and of the shallow one that are in the same stage.
StagePair = tuple[tuple[Unit, ...], tuple[Unit, ...]]
#: More than any sum of layer costs: of a pair that must not be, and of a unit that must not be left out.
FORBIDDEN = 1e9


def pair_stages(deep: Structure, shallow: Structure, called: str = "the second network") -> list[StagePair]:
    """For every stage of the deep network the stage of the shallow one that corresponds; one may be missing.

    Args:
        deep: a structure.
        shallow: another one.
        called: what messages call the shallow network.

    Raises:
        FusionError: if a stage of the shallow network has no counterpart, or one that it lacks cannot be left out.
    """
    ours, theirs = deep.stages, shallow.stages
    if len(ours) == len(theirs):
        pairs: list[StagePair] = list(zip(ours, theirs, strict=True))
        if all(a[0].kind == b[0].kind for a, b in pairs):
            return pairs
    rows = _rows(deep, shallow)
    if rows is None:
        kinds = [", ".join(stage[0].kind for stage in stages) for stages in (ours, theirs)]
        firm = [unit.name for stage in ours[len(theirs) - 1 : -1] for unit in stage if not unit.insertable]
        behind = f"; no identity can stand in place of {firm[0]!r} there" if firm else ""
        raise FusionError(
            f"Expected networks with the same stages, got {len(theirs)} ({kinds[1]}) in {called} and {len(ours)} "
            f"({kinds[0]}) in the other{behind}"
        )
    return [(stage, theirs[rows.index(row)] if row in rows else ()) for row, stage in enumerate(ours)]


def _rows(deep: Structure, shallow: Structure) -> list[int] | None:
    """The stage of the deep network for each of the shallow one's; None if these do not fit in."""
    theirs = shallow.stages
    # By how many stages of the shallow network are placed, and what must lie before the next one of them because it
    # lies before a stage of the deep network that it lacks: where they were placed.
    reached: dict[tuple[int, Signature], list[int]] = {(0, ()): []}
    for row, stage in enumerate(deep.stages):
        between = deep.transitions[stage[0].name].signature
        following: dict[tuple[int, Signature], list[int]] = {}
        for (count, before), rows in reached.items():
            if count < len(theirs) and _alike(stage, theirs[count]):
                moved = not between and shallow.transitions[theirs[count][0].name].signature == before
                if not before or moved:
                    following.setdefault((count + 1, ()), [*rows, row])
            if all(unit.insertable for unit in stage) and not (before and between):
                following.setdefault((count, before or between), rows)
        reached = following
    return reached.get((len(theirs), ()))


def _alike(ours: Sequence[Unit], theirs: Sequence[Unit]) -> bool:
    """Whether every unit of one stage has its like in the other."""
    signatures = {unit.signature for unit in ours}
    return ours[0].kind == theirs[0].kind and all(unit.signature in signatures for unit in theirs)


def allowed(pair: StagePair, inserting: bool) -> Tensor:
    """Penalties for the costs of a stage, [units of deep, units of shallow], so that only possible pairs are chosen.

    Args:
        pair: the units.
        inserting: whether a unit of the deep network without a partner becomes an identity in the shallow one.
    """
    ours, theirs = pair
    unlike = [[FORBIDDEN * (one.signature != other.signature) for other in theirs] for one in ours]
    needed = [FORBIDDEN * (inserting and not one.insertable) for one in ours]
    return torch.tensor(unlike, dtype=torch.float64) - torch.tensor(needed, dtype=torch.float64)[:, None]


def check_same_stages(a: Structure, b: Structure, names: tuple[str, str] = ("the first network", "the second")) -> None:
    """Refuse two structures whose stages cannot be matched one to one."""
    kinds = [[stage[0].kind for stage in structure.stages] for structure in (a, b)]
    if kinds[0] != kinds[1]:
        raise FusionError(
            f"Expected networks with the same stages, got {len(kinds[0])} ({', '.join(kinds[0])}) in {names[0]} and "
            f"{len(kinds[1])} ({', '.join(kinds[1])}) in {names[1]}"
        )
