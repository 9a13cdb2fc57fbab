"""Elements: what the entries of all parameter axes are, until it is known which of them are the same neuron.

A union-find over integers that touches only what it is asked for. An element may be *fixed*, and it may lie in a
*block* of others (a neuron in its attention head); both survive when elements turn out to be the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass
class Relation:
    """Which block every element of a set is in, and what said so; `child` is sorted and has no element twice."""

    child: Ints
    block: Ints
    place: str = ""


class Elements:
    """Elements with three things to say of them: the same as another, fixed, in a block."""

    def __init__(self) -> None:
        self.count = 0
        #: How often something was said of them: what was found before is still right if it is the same.
        self.version = 0
        self.relations: list[Relation] = []
        self._root: Ints = np.arange(4096)
        #: 0: free; otherwise one more than the index of the reason.
        self._why: Ints = np.zeros(4096, np.int64)
        #: Elements that were made or tied together: relations are looked up by these.
        self._family: Ints = np.zeros(4096, np.int64)
        self._families: list[int] = []
        self._related: dict[int, list[int]] = {}

    def fresh(self, count: int) -> Ints:
        """New elements, each different from all others."""
        start, end = self.count, self.count + count
        if end > len(self._root):
            room = max(end, 2 * len(self._root))
            self._root = np.concatenate([self._root, np.arange(len(self._root), room)])
            more = np.zeros(room - len(self._why), np.int64)
            self._why, self._family = np.concatenate([self._why, more]), np.concatenate([self._family, more])
        self._family[start:end] = len(self._families)
        self._families.append(len(self._families))
        self.count = end
        return np.arange(start, end)

    def find(self, elements: Ints) -> Ints:
        """The element that stands for each."""
        roots = self._root[elements]
        while True:
            further = self._root[roots]
            if (further == roots).all():
                break
            roots = further
            self._root[elements] = roots
        return roots

    def fix(self, elements: Ints, reason: int) -> None:
        """Let elements keep their places, unless they do already; the first reason counts."""
        roots = self.find(elements.reshape(-1))
        self._why[roots[self._why[roots] == 0]] = reason + 1
        self.version += 1

    def are_fixed(self, roots: Ints) -> NDArray[np.bool_]:
        """Whether each of some elements that stand for themselves is fixed."""
        return self._why[roots] > 0

    def reason(self, elements: Ints) -> Ints:
        """The index of the reason why each is fixed; -1: it is free."""
        return self._why[self.find(elements)] - 1

    def tie(self, one: Ints, other: Ints) -> None:
        """Let elements be the same, pair by pair."""
        one, other = self.find(one.reshape(-1)), self.find(other.reshape(-1))
        unlike = one != other
        if not unlike.any():
            return
        self.version += 1
        one, other = one[unlike], other[unlike]
        both = np.concatenate([one, other])
        fixed = both[self._why[both] > 0]
        reasons = self._why[fixed]
        self._join_families(both)
        while True:
            low, high = np.minimum(one, other), np.maximum(one, other)
            np.minimum.at(self._root, high, low)
            one, other = self.find(one), self.find(other)
            unlike = one != other
            if not unlike.any():
                break
            one, other = one[unlike], other[unlike]
        self._why[self.find(fixed)] = reasons

    def put_in_blocks(self, child: Ints, block: Ints, place: str = "") -> None:
        """Let the block of every child move as a whole; `child` and `block` go pair by pair."""
        pairs = self._pairs(child, block)
        twice = pairs[0][1:] == pairs[0][:-1]
        if twice.any():  # one child in several blocks: they are one block
            self.tie(pairs[1][1:][twice], pairs[1][:-1][twice])
            pairs = self._pairs(child, block)
        if len(np.unique(pairs[1])) == len(pairs[0]):
            self.tie(*pairs)
            return
        for known in self.blocks_of(pairs[0]):
            if _is_bijection(*self._pairs(known, pairs[1])):
                self.tie(known, pairs[1])
                return
        self.version += 1
        self._join_families(pairs[0])
        self._related.setdefault(self._family_of(pairs[0][0]), []).append(len(self.relations))
        self.relations.append(Relation(*pairs, place))

    def blocks_of(self, elements: Ints) -> Iterator[Ints]:
        """For every relation that knows all of these elements the block of each."""
        if not self._related:
            return
        roots = self.find(elements)
        for number in tuple(self._related.get(self._family_of(roots.flat[0]), ())):
            relation = self.relation(number)
            place = np.searchsorted(relation.child, roots).clip(max=len(relation.child) - 1)
            if np.array_equal(relation.child[place], roots):
                yield self.find(relation.block[place])

    def implies(self, one: Ints, other: Ints, depth: int = 8) -> bool:
        """Whether each of `other` is the block of its partner in `one`, or a block of its block."""
        if not self._related or not depth:
            return False
        wanted = self.find(other)
        known = list(self.blocks_of(one))
        return any(np.array_equal(block, wanted) or self.implies(block, wanted, depth - 1) for block in known)

    def relation(self, number: int) -> Relation:
        """A relation between the elements that stand for its own today."""
        while True:
            known = self.relations[number]
            child = self.find(known.child)
            if np.array_equal(child, known.child):
                return known
            pairs = self._pairs(child, known.block)
            twice = pairs[0][1:] == pairs[0][:-1]
            if twice.any():
                self.tie(pairs[1][1:][twice], pairs[1][:-1][twice])
            pairs = self._pairs(child, known.block)
            self.relations[number] = Relation(*pairs, known.place)

    def _pairs(self, one: Ints, other: Ints) -> tuple[Ints, Ints]:
        """The different pairs, sorted."""
        one, other = self.find(one.reshape(-1)), self.find(other.reshape(-1))
        code = np.unique(one * self.count + other)
        return code // self.count, code % self.count

    def _family_of(self, element: int) -> int:
        family = int(self._family[element])
        while self._families[family] != family:
            family = self._families[family]
        return family

    def _join_families(self, elements: Ints) -> None:
        names = sorted({self._family_of(first) for first in _one_of_each(self._family, elements)})
        for name in names[1:]:
            self._families[name] = names[0]
            if name in self._related:
                self._related.setdefault(names[0], []).extend(self._related.pop(name))


def _one_of_each(family: Ints, elements: Ints) -> list[int]:
    _, places = np.unique(family[elements], return_index=True)
    return [int(element) for element in elements[places]]


def _is_bijection(one: Ints, other: Ints) -> bool:
    """Whether different pairs are one to one."""
    return len(np.unique(one)) == len(one) == len(np.unique(other))


def turns(labels: Ints) -> Ints:
    """For every entry how many equal ones are before it."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    start = np.r_[True, ordered[1:] != ordered[:-1]]
    if start.all():
        return np.zeros(len(labels), np.int64)
    places = np.arange(len(labels))
    result = np.empty(len(labels), np.int64)
    result[order] = places - np.maximum.accumulate(np.where(start, places, 0))
    return result
