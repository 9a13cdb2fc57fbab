"""Concatenation of values: neurons beside neurons."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.tracing.labels import Labels, Shift, Value, differs, varies


def concatenate(labels: Labels, values: Sequence[Value], dim: int) -> Value:
    """The values one after the other along a dimension.

    Arrays that vary along `dim` are joined. An array that does not is one of all values: of tokens, for example, that
    are put before others and have the same features.
    """
    rank = len(values[0].shape)
    dim %= rank
    values = [labels.tidy(value) for value in values if value.shape != (0,)]
    length = sum(value.shape[dim] for value in values)
    shape = tuple(length if one == dim else size for one, size in enumerate(values[0].shape))
    # Beside an array that varies along `dim` and elsewhere, what is shared elsewhere is an array of its own.
    spread = frozenset[int]().union(*(varies(a) - {dim} for v in values for a in v.arrays if dim in varies(a)))
    across = labels.merge(*(_shared(labels, value, {dim, *spread}) for value in values))
    along = _along(labels, values, dim, spread)
    return labels.tidy(Value(shape, (*across.arrays, *along)))


def _shared(labels: Labels, value: Value, joined: set[int]) -> Value:
    """A part of a value along the dimensions that are not joined, with size 1 along those that are."""
    arrays = tuple(array for array in value.arrays if not varies(array) & joined)
    long = (labels.bare(value) - joined).union(*map(varies, arrays))
    return Value(tuple(size if dim in long else 1 for dim, size in enumerate(value.shape)), arrays)


def _along(labels: Labels, values: Sequence[Value], dim: int, spread: frozenset[int]) -> list[Tensor]:
    """The arrays that vary along the dimension that is joined."""
    kinds: dict[frozenset[int], int] = {}
    parts: list[dict[frozenset[int], list[Tensor]]] = []
    for value in values:
        found: dict[frozenset[int], list[Tensor]] = {}
        for array in value.arrays:
            if dim in varies(array) or varies(array) & spread:
                found.setdefault(varies(array) - {dim}, []).append(array)
        parts.append(found)
        for kind, arrays in found.items():
            kinds[kind] = max(kinds.get(kind, 0), len(arrays))
    return [_joint(labels, values, parts, dim, kind, turn) for kind, count in kinds.items() for turn in range(count)]


def _joint(
    labels: Labels,
    values: Sequence[Value],
    parts: Sequence[dict[frozenset[int], list[Tensor]]],
    dim: int,
    kind: frozenset[int],
    turn: int,
) -> Tensor:
    """One array along the joined dimension; what has none is pinned, unless its entries are all alike."""
    pieces = []
    for value, part in zip(values, parts, strict=True):
        sizes = [size if one == dim or one in kind else 1 for one, size in enumerate(value.shape)]
        arrays = part.get(kind, [])
        if turn < len(arrays):
            pieces.append(arrays[turn].expand(sizes))
        else:
            pieces.append(labels.fresh(sizes, pinned=not _is_uniform(value, {dim, *kind})))

    def join(*arrays: Tensor) -> Tensor:
        return torch.cat(arrays, dim)

    if kind:
        labels.shifts.append(Shift(tuple(pieces), join))
    return join(*pieces)


def _is_uniform(value: Value, dims: set[int]) -> bool:
    """Whether a value is a constant whose entries do not differ along dimensions, such as zeros."""
    known = value.constant
    return known is not None and not any(differs(known, dim) for dim in dims)
