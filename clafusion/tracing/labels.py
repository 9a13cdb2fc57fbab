"""Labels: which neurons every tensor of a network is made of, found by moving labels as the network moves its data.

A *value* stands for a tensor. Each of its label arrays gives an element to every position, so that whatever permutes
the elements permutes the tensor. Three primitives say what an operation does to them:

- `move`: the operation puts entries elsewhere (reshape, transpose, slice). It runs on the labels themselves.
- `merge`: the operation pairs entries (an addition, a product). Elements that meet are the same neuron.
- `reduce`: the operation is symmetric in what it sums over (a contraction, a norm). What is summed disappears.

An operation that is neither fixes what it reads: `pin`. Label arrays are compact: they have size 1 along a dimension in
which they are constant.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clafusion.tracing.elements import Elements

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a network, described by the elements that its entries belong to.

    Attributes:
        shape: its shape, for a batch of two samples.
        arrays: int64 labels that broadcast to the shape; none for what no permutation may move.
        constant: the tensor itself if it depends neither on the input nor on a parameter.
        same: dimensions along which all entries are the same, because it was broadcast.
        version: the state of the elements for which the arrays are compact and none is superfluous.
    """

    shape: tuple[int, ...]
    arrays: tuple[Tensor, ...] = ()
    constant: Tensor | None = None
    same: frozenset[int] = frozenset()
    version: int = -1


def varies(array: Tensor) -> frozenset[int]:
    """The dimensions along which a compact array is not constant."""
    return frozenset(dim for dim, size in enumerate(array.shape) if size > 1)


@dataclass(frozen=True, eq=False)
class Shift:
    """A move that may change the row-major order of the entries: the arrays before it and what it does to them."""

    before: tuple[Tensor, ...]
    move: Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Nesting:
    """An array and the array of the blocks of its elements, which broadcasts to it, and the operation that said so."""

    child: Tensor
    block: Tensor
    place: str


class Labels:
    """The primitives, and the elements that they tie, put in blocks or pin.

    Attributes:
        elements: the elements of all arrays.
        place: what is named as the reason if an element is pinned now: the operation and the path of its module.
        reasons: all places that pinned something.
        singled: arrays of elements that an operation took out of others.
        shifts, nestings: records from which it follows that elements are told apart by their order.
    """

    def __init__(self) -> None:
        self.elements = Elements()
        self.place = ""
        self.reasons: list[str] = []
        self.singled: list[Tensor] = []
        self.shifts: list[Shift] = []
        self.nestings: list[Nesting] = []

    # Values

    def fresh(self, shape: Sequence[int], *, pinned: bool = False) -> Tensor:
        """A label array with elements of its own."""
        elements = self.elements.fresh(math.prod(shape))
        array = torch.from_numpy(elements).reshape(tuple(shape))
        if pinned:
            self._fix(array)
        return array

    def parameter(self, shape: Sequence[int]) -> Value:
        """A tensor whose axes may each be permuted: every axis longer than 1 gets elements of its own."""
        rank = len(shape)
        sizes = ([size if dim == axis else 1 for axis in range(rank)] for dim, size in enumerate(shape))
        return Value(tuple(shape), tuple(self.fresh(one) for one in sizes if math.prod(one) > 1))

    def tidy(self, value: Value) -> Value:
        """A value with compact arrays, without those that say nothing: fixed, twice there, or implied by another."""
        if value.version == self.elements.version or not value.arrays:
            return value
        kept: list[Tensor] = []
        for array in map(self._compact, value.arrays):
            if array.numel() > 1 and not self._is_fixed(array) and not any(_same(array, other) for other in kept):
                kept.append(array)
        if len(kept) > 1:
            kept = [one for one in kept if not any(one is not other and self._implies(other, one) for other in kept)]
        return Value(value.shape, tuple(kept), value.constant, value.same, self.elements.version)

    def bare(self, value: Value) -> frozenset[int]:
        """The dimensions along which the entries of a value are different, and no label moves them."""
        long = frozenset(dim for dim, size in enumerate(value.shape) if size > 1 and dim not in value.same)
        if value.constant is not None:
            return frozenset(dim for dim in long if differs(value.constant, dim))
        return long.difference(*map(varies, value.arrays))

    # Primitives

    def move(
        self,
        value: Value,
        shape: Sequence[int],
        move: Move,
        dims: Iterable[int] | None = None,
        *,
        keeps_order: bool = False,
    ) -> Value:
        """Let an operation put the entries elsewhere.

        Args:
            value: what it moves.
            shape: the shape of its result.
            move: the operation, run on each label array.
            dims: the dimensions that the arrays need in full size; all by default. The operation must treat the
                others alike whatever their size is.
            keeps_order: whether the entries stay in row-major order.
        """

        def run(array: Tensor) -> Tensor:
            return move(_expanded(array, value.shape, dims))

        if not keeps_order:
            self.shifts.extend(Shift((array,), run) for array in value.arrays)
        moved = tuple(run(array) for array in value.arrays)
        # An entry that is taken by itself has no label that varies, but is not like the others any more.
        self.singled.extend(one for one, array in zip(moved, value.arrays, strict=True) if one.numel() < array.numel())
        constant = None if value.constant is None else move(value.constant)
        return self.tidy(Value(tuple(shape), moved, constant))

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """Keep the row-major order of the entries under another shape."""
        shape = tuple(shape)
        if shape == value.shape:
            return value
        return self.move(value, shape, lambda array: array.reshape(shape), keeps_order=True)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """Permute the dimensions."""
        order = [dim % len(value.shape) for dim in order]
        shape = tuple(value.shape[dim] for dim in order)
        return self.move(value, shape, lambda array: array.permute(order), ())

    def merge(self, *values: Value) -> Value:
        """Broadcast values against each other, entry by entry.

        Elements that meet are the same. An array that varies along fewer dimensions than another holds the blocks of
        its elements. What meets entries without labels is pinned along the dimensions of these.
        """
        shape = torch.broadcast_shapes(*(value.shape for value in values))
        lifted = [self.tidy(_lifted(value, len(shape))) for value in values]
        same = frozenset(
            dim
            for dim, size in enumerate(shape)
            if all(v.shape[dim] == 1 or dim in v.same for v in lifted) and size > 1
        )
        if len(lifted) == 1 or not any(value.arrays for value in lifted):
            return Value(tuple(shape), lifted[0].arrays, None, same)
        bare = [self.bare(value) for value in lifted]
        for number, value in enumerate(lifted):
            others = frozenset[int]().union(*(dims for other, dims in enumerate(bare) if other != number))
            for array in value.arrays:
                self._pin(array, others)
        joined: list[Tensor] = []
        for value in lifted:
            joined = self._joined(joined, value.arrays)
        return self.tidy(Value(tuple(shape), tuple(joined), None, same))

    def reduce(self, value: Value, dims: Iterable[int], *, keepdim: bool = True) -> Value:
        """Sum over dimensions, or anything else that is symmetric along them.

        An array that varies elsewhere as well leaves the blocks of its elements there: the products of queries and
        keys, summed over the features of a head, have the heads.
        """
        rank = len(value.shape)
        dims = frozenset(dim % rank for dim in dims) if rank else frozenset()
        value = self.tidy(value)
        left = [array for array in value.arrays if not varies(array) & dims]
        for array in value.arrays:
            rest = varies(array) - dims
            if rest and varies(array) & dims:
                left.append(self._blocks(array, rest))
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(value.shape))
        reduced = self.tidy(Value(shape, tuple(left)))
        return reduced if keepdim else self.drop(reduced, dims)

    def drop(self, value: Value, dims: Iterable[int]) -> Value:
        """Remove dimensions of size 1."""
        rank = len(value.shape)
        kept = [dim for dim in range(rank) if dim not in {one % rank for one in dims}]

        def take(sizes: Sequence[int]) -> tuple[int, ...]:
            return tuple(sizes[dim] for dim in kept)

        constant = None if value.constant is None else value.constant.reshape(take(value.shape))
        return Value(take(value.shape), tuple(array.reshape(take(array.shape)) for array in value.arrays), constant)

    def pin(self, value: Value, dims: Iterable[int] | None = None) -> Value:
        """Fix the order of the entries along dimensions (all by default): the operation is not symmetric there."""
        rank = len(value.shape)
        chosen = frozenset(range(rank)) if dims is None else frozenset(dim % rank for dim in dims)
        value = self.tidy(value)
        for array in value.arrays:
            self._pin(array, chosen)
        return self.tidy(value)

    def per_channel(self, value: Value, dims: Iterable[int]) -> Value:
        """Fix the positions along dimensions, and leave what is the same at all of them: with size 1 along these."""
        dims = tuple(dims)
        return self.reduce(self.pin(value, dims), dims)

    # Arrays

    def _fix(self, array: Tensor) -> None:
        if not self.reasons or self.reasons[-1] != self.place:
            self.reasons.append(self.place)
        self.elements.fix(array.reshape(-1).numpy(), len(self.reasons) - 1)

    def _is_fixed(self, array: Tensor) -> bool:
        """Whether all elements of a compact array are fixed."""
        return bool(self.elements.are_fixed(array.numpy()).all())

    def _implies(self, one: Tensor, other: Tensor) -> bool:
        if not varies(other) <= varies(one):
            return False
        return self.elements.implies(one.numpy(), other.expand(one.shape).numpy())

    def _compact(self, array: Tensor) -> Tensor:
        """The same labels with size 1 along every dimension in which they are constant."""
        for dim, stride in enumerate(array.stride()):
            if stride == 0 and array.shape[dim] > 1:
                array = array.narrow(dim, 0, 1)
        roots = self.elements.find(array.numpy())
        for dim, size in enumerate(roots.shape):
            if size > 1:
                first, last = (roots[(slice(None),) * dim + (slice(end, end + 1),)] for end in (0, size - 1))
                if first.flat[0] == last.flat[0] and (first == roots).all():
                    roots = first
        return torch.from_numpy(roots)

    def _pin(self, array: Tensor, dims: frozenset[int]) -> None:
        """Fix an array along dimensions: wholly, or by blocks that are fixed where it varies along others as well."""
        fixed = varies(array) & dims
        if not fixed:
            return
        if fixed == varies(array):
            self._fix(array)
            return
        self._nest(array, self.fresh(_sizes(array, fixed), pinned=True))

    def _nest(self, child: Tensor, block: Tensor) -> None:
        self.nestings.append(Nesting(child, block, self.place))
        self.elements.put_in_blocks(child.numpy(), block.expand(child.shape).numpy(), self.place)

    def _blocks(self, array: Tensor, dims: frozenset[int]) -> Tensor:
        """The blocks of an array's elements, one for each place along `dims`: known ones, or new ones."""
        known = next(self._known_blocks(array, dims), None)
        block = self.fresh(_sizes(array, dims)) if known is None else known
        self._nest(array, block)
        return block

    def _known_blocks(self, array: Tensor, dims: frozenset[int]) -> Iterator[Tensor]:
        for known in self.elements.blocks_of(array.numpy()):
            block = self._compact(torch.from_numpy(known))
            if varies(block) == dims:
                yield block

    def _joined(self, joined: list[Tensor], arrays: Sequence[Tensor]) -> list[Tensor]:
        """The arrays of two values that meet; `joined` are those of the first."""
        result = list(joined)
        for array in arrays:
            dims = varies(array)
            alike = [other for other in joined if varies(other) == dims]
            if alike:
                if self._tie(array, alike):
                    result.append(array)
                continue
            for other in joined:
                if varies(other) & dims:
                    self._relate(array, other)
            result.append(array)
        return result

    def _tie(self, array: Tensor, others: Sequence[Tensor]) -> bool:
        """Give an array the elements of others that vary alike; return whether it adds to them, as their content."""
        if any(self._implies(other, array) for other in others):
            return False
        if any(self._implies(array, other) for other in others):
            return True
        same = [other for other in others if _like(array, other)] if len(others) > 1 else others
        for other in same or others:
            self.elements.tie(array.numpy(), other.numpy())
        return False

    def _relate(self, one: Tensor, other: Tensor) -> None:
        """Let arrays share blocks along the dimensions that both vary along."""
        common = varies(one) & varies(other)
        if common == varies(other):
            self._nest(one, other)
        elif common == varies(one):
            self._nest(other, one)
        else:
            self._nest(other, self._blocks(one, common))


def _sizes(array: Tensor, dims: frozenset[int]) -> list[int]:
    return [size if dim in dims else 1 for dim, size in enumerate(array.shape)]


def _lifted(value: Value, rank: int) -> Value:
    """A value with dimensions of size 1 put before its own."""
    more = (1,) * (rank - len(value.shape))
    if not more:
        return value
    return replace(
        value,
        shape=more + value.shape,
        same=frozenset(dim + len(more) for dim in value.same),
        arrays=tuple(array.reshape(more + tuple(array.shape)) for array in value.arrays),
        constant=None if value.constant is None else value.constant.reshape(more + value.shape),
    )


def _expanded(array: Tensor, shape: Sequence[int], dims: Iterable[int] | None) -> Tensor:
    """An array in full size along some dimensions, without a copy."""
    chosen = range(len(shape)) if dims is None else {dim % len(shape) for dim in dims}
    return array.expand([shape[dim] if dim in chosen else size for dim, size in enumerate(array.shape)])


def differs(constant: Tensor, dim: int) -> bool:
    """Whether the entries of a constant differ along a dimension."""
    return constant.stride(dim) != 0 and not torch.equal(constant.narrow(dim, 0, 1).expand_as(constant), constant)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _like(one: Tensor, other: Tensor) -> bool:
    """Whether two arrays of one shape have equal elements at the same places."""
    first, second = (np.unique(array.numpy(), return_inverse=True)[1].reshape(-1) for array in (one, other))
    pairs = np.unique(first * (int(second.max()) + 1) + second)
    return len(pairs) == int(first.max()) + 1 == int(second.max()) + 1
