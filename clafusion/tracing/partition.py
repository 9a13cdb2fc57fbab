"""From labels to spaces: elements that nothing tells apart are neurons of one space.

Elements are alike if they occur alike: equally often in the same tensors (of parameters alone would not do: one half of
a layer's neurons may pass through another activation), in the same order where they occur several times, and in blocks
that are alike. This is colour refinement; colours are sums of 64-bit hashes, so that the order does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing.elements import Elements, Ints, turns
from clafusion.tracing.exporting import Capture, operation_of
from clafusion.tracing.labelling import Labelling, parameters_of
from clafusion.tracing.labels import Shift, Value

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Partition:
    """The spaces by number.

    Attributes:
        root: for every element the one that stands for it.
        space: for every root the number of its space; -1: it is not free.
        neuron: for every root its index within the space.
        sizes: the number of neurons of every space.
        names: the names of the spaces.
        parents: for a space whose neurons are in blocks the space of these, and the block of every neuron.
    """

    root: Ints
    space: Ints
    neuron: Ints
    sizes: list[int]
    names: list[str]
    parents: Mapping[int, tuple[int, Ints]]


@dataclass(frozen=True, eq=False)
class _Link:
    """The blocks of the neurons of a class: roots of both, and the operation that said so."""

    parent: int
    child: Ints
    block: Ints
    place: str


def partition(labelling: Labelling, capture: Capture) -> Partition:
    """Group the elements of a network into spaces.

    Raises:
        FusionError: if neurons are in blocks of two kinds that cross.
    """
    elements = labelling.labels.elements
    root, kind = _alike(labelling)
    while _tie_equal(elements, kind) or _fix_crossing(labelling, root, kind):
        root, kind = _alike(labelling)
    neuron, names = _numbered(capture, labelling, root, kind)
    links = _links(elements, kind)
    parents: dict[int, _Link] = {}
    todo = list(names)
    while todo:
        one = todo.pop(0)
        chain = _chain(links.get(one, []), names.get(one, "a network"))
        if not chain:
            continue
        parents[one] = chain[0]
        if len(chain) > 1:
            links.setdefault(chain[0].parent, []).extend(_between(chain))
            todo.append(chain[0].parent)
        if chain[0].parent not in names:
            names[chain[0].parent] = _free_name(f"{names[one]} blocks", names)
            blocks = by_appearance(_in_order(chain[0], neuron))
            neuron[blocks] = np.arange(len(blocks))
            todo.append(chain[0].parent)
    order = _parents_first(list(names), parents)
    place = {one: number for number, one in enumerate(order)}
    space = np.full(len(root), -1)
    for one, number in place.items():
        space[kind == one] = number
    sizes = np.bincount(kind[kind >= 0], minlength=max(place, default=0) + 1)
    return Partition(
        root,
        space,
        neuron,
        [int(sizes[one]) for one in order],
        [names[one] for one in order],
        {place[one]: (place[link.parent], neuron[_in_order(link, neuron)]) for one, link in parents.items()},
    )


def _alike(labelling: Labelling) -> tuple[Ints, Ints]:
    """The root of every element, and for every root the number of its class."""
    elements = labelling.labels.elements
    root = _settled(elements)
    colour = _refined(_colours(labelling, root), elements, root)
    return root, _classes(colour, labelling, elements, root)


def _tie_equal(elements: Elements, kind: Ints) -> bool:
    """Let blocks with equal content be the same, and a neuron alone of its kind in its block; say whether any were.

    Features of heads with rotary positions, for example, keep their order in each head: they move with it.
    """
    version = elements.version
    for links in _links(elements, kind).values():
        for number, link in enumerate(links):
            blocks = len(np.unique(link.block))
            if blocks == len(link.child):
                elements.tie(link.child, link.block)
            for other in links[:number]:
                if (
                    blocks
                    == len(np.unique(other.block))
                    == len(np.unique(np.stack([link.block, other.block]), axis=1).T)
                ):
                    elements.tie(link.block, other.block)
    return elements.version > version


def _fix_crossing(labelling: Labelling, root: Ints, kind: Ints) -> bool:
    """Fix blocks that cross others and belong to a parameter, and say whether there were any.

    A norm of queries has one weight per feature, shared by all heads: heads may be permuted, or features, but neither
    lies in the other. Permuting one of them alone is as sound; heads have more to give.
    """
    elements = labelling.labels.elements
    shared = {one for axes in labelling.axes.values() for a in axes if a is not None for one in kind[root[a.numpy()]]}
    version = elements.version
    for links in _links(elements, kind).values():
        for number, link in enumerate(links):
            for other in links[:number]:
                if _nest(link, other) or (link.parent in shared) == (other.parent in shared):
                    continue
                crossing = link if link.parent in shared else other
                labelling.labels.reasons.append(crossing.place)
                elements.fix(crossing.block, len(labelling.labels.reasons) - 1)
    return elements.version > version


def _nest(one: _Link, other: _Link) -> bool:
    return _is_function(one.block, other.block) or _is_function(other.block, one.block)


def _settled(elements: Elements) -> Ints:
    """The root of every element, once relations tie nothing any more."""
    everything = np.arange(elements.count)
    while True:
        root = elements.find(everything)
        for number in range(len(elements.relations)):
            elements.relation(number)
        if np.array_equal(elements.find(everything), root):
            return root


def _mixed(hashes: Hashes) -> Hashes:
    """Scatter the bits of hashes (splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Hashes = hashes ^ (hashes >> np.uint64(31))
    return result


def _hashed(*numbers: Ints | int) -> Hashes:
    """Odd hashes of tuples of numbers, so that multiples of them differ as well."""
    result: Hashes = np.zeros(1, np.uint64)
    for number in numbers:
        result = _mixed(result + np.uint64(0x9E3779B97F4A7C15) + np.atleast_1d(np.asarray(number, np.uint64)))
    odd: Hashes = result | np.uint64(1)
    return odd


def _colours(labelling: Labelling, root: Ints) -> Hashes:
    """For every root how often it occurs in each tensor of the graph, and in which order."""
    labels = labelling.labels
    colour: Hashes = np.zeros(len(root), np.uint64)
    seen: set[int] = set()
    for number, value in enumerate(labelling.values.values()):
        for place, array in enumerate(_arrays(value)):
            if id(array) not in seen:
                seen.add(id(array))
                np.add.at(colour, root[array.reshape(-1).numpy()], _hashed(0, number, place)[0])
    for number, array in enumerate(labels.singled):
        np.add.at(colour, root[array.reshape(-1).numpy()], _hashed(6, number)[0])
    for number, shift in enumerate(labels.shifts):
        if _repeats(shift, root):
            _add_order(colour, shift, number, root)
    for number, nesting in enumerate(labels.nestings):
        block = root[nesting.block.reshape(-1).numpy()]
        turn = turns(block)
        if turn.any():
            spread = np.broadcast_to(turn.reshape(nesting.block.shape), nesting.child.shape)
            np.add.at(colour, root[nesting.child.reshape(-1).numpy()], _hashed(1, number, spread.reshape(-1)))
    fixed = np.flatnonzero(labels.elements.are_fixed(root))
    colour[fixed] = _hashed(2, fixed)
    return colour


def _arrays(value: object) -> list[Tensor]:
    values = value if isinstance(value, list) else [value]
    return [array for one in values if isinstance(one, Value) for array in one.arrays]


def _repeats(shift: Shift, root: Ints) -> bool:
    """Whether an element occurs several times in what is moved."""
    elements = np.concatenate([root[array.reshape(-1).numpy()] for array in shift.before])
    return len(np.unique(elements)) < len(elements)


def _add_order(colour: Hashes, shift: Shift, number: int, root: Ints) -> None:
    """Tell elements apart whose occurrences a move puts in different orders."""
    before = [root[array.numpy()] for array in shift.before]
    after = shift.move(*map(torch.from_numpy, before)).reshape(-1).numpy()
    old = [turns(one.reshape(-1)).reshape(one.shape) * len(before) + place for place, one in enumerate(before)]
    came = shift.move(*map(torch.from_numpy, old)).reshape(-1).numpy()
    np.add.at(colour, after, _hashed(3, number, turns(after), came))


def _refined(colour: Hashes, elements: Elements, root: Ints) -> Hashes:
    """Colours that tell apart what has other blocks, or other content."""
    relations = elements.relations
    if not relations:
        return colour
    child = np.concatenate([relation.child for relation in relations])
    block = root[np.concatenate([relation.block for relation in relations])]
    kind = np.concatenate([np.full(len(relation.child), number) for number, relation in enumerate(relations)])
    up, down = _hashed(4, kind), _hashed(5, kind)
    concerned = np.unique(np.concatenate([child, block]))
    count = 0
    while True:
        new = _mixed(colour)
        np.add.at(new, child, _mixed(colour[block] ^ up))
        np.add.at(new, block, _mixed(colour[child] ^ down))
        if len(np.unique(new[concerned])) == count:
            return new
        count, colour = len(np.unique(new[concerned])), new


def _classes(colour: Hashes, labelling: Labelling, elements: Elements, root: Ints) -> Ints:
    """For every root the number of its class; -1: it is fixed, or nothing is like it."""
    used = [array.numpy() for axes in labelling.axes.values() for array in axes if array is not None]
    used += [relation.block for relation in elements.relations] + [relation.child for relation in elements.relations]
    active = np.unique(root[np.concatenate(used)]) if used else np.zeros(0, np.int64)
    active = active[~elements.are_fixed(active)]
    _, inverse, counts = np.unique(colour[active], return_inverse=True, return_counts=True)
    kind: Ints = np.full(len(root), -1)
    kind[active] = np.where(counts[inverse] > 1, inverse, -1)
    return kind


def _numbered(capture: Capture, labelling: Labelling, root: Ints, kind: Ints) -> tuple[Ints, dict[int, str]]:
    """The index of every neuron in its class, and the name of every class with an axis, in order of appearance."""
    neuron: Ints = np.zeros(len(root), np.int64)
    first: dict[int, str] = {}
    written: dict[int, str] = {}
    for node in capture.graph.nodes:
        for name in parameters_of(node, capture.names) if node.op == "call_function" else ():
            for dim, array in enumerate(labelling.axes.get(name, ())):
                if array is None:
                    continue
                roots = by_appearance(root[array.numpy()])
                kinds = kind[roots]
                for one in by_appearance(kinds[kinds >= 0]).tolist():
                    if one not in first:
                        first[one] = name
                        members = roots[kinds == one]
                        neuron[members] = np.arange(len(members))
                    # The weight of a transposed convolution begins with the inputs.
                    if dim == (len(labelling.axes[name]) > 1 and operation_of(node).startswith("conv_transpose")):
                        written.setdefault(one, name)
    names: dict[int, str] = {}
    for one, name in first.items():
        names[one] = _free_name(written.get(one, name).removesuffix(".weight"), names)
    return neuron, names


def _free_name(name: str, names: Mapping[int, str]) -> str:
    taken, count, wanted = set(names.values()), 1, name
    while name in taken:
        count += 1
        name = f"{wanted} ({count})"
    return name


def by_appearance(entries: Ints) -> Ints:
    """The different entries, by their first places."""
    known, first = np.unique(entries, return_index=True)
    return known[np.argsort(first)]


def _links(elements: Elements, kind: Ints) -> dict[int, list[_Link]]:
    """For every class the blocks that its neurons are in, by every relation."""
    links: dict[int, list[_Link]] = {}
    for relation in elements.relations:
        block = elements.find(relation.block)
        ours, theirs = kind[relation.child], kind[block]
        ours = np.where(relation.child == block, -1, ours)
        for one in np.unique(ours[(ours >= 0) & (theirs >= 0)]).tolist():
            mine = ours == one
            parent = int(theirs[mine][0])
            links.setdefault(one, []).append(_Link(parent, relation.child[mine], block[mine], relation.place))
    return links


def _chain(links: list[_Link], name: str) -> list[_Link]:
    """The blocks that neurons are in, finest first, each in the next.

    Raises:
        FusionError: if two kinds of blocks cross.
    """
    chain: list[_Link] = []
    for link in sorted(links, key=lambda one: (-len(np.unique(one.block)), one.parent)):
        if any(one.parent == link.parent and np.array_equal(one.block, link.block) for one in chain):
            continue
        if chain and (chain[-1].parent == link.parent or not _is_function(chain[-1].block, link.block)):
            raise FusionError(
                f"Expected neurons in blocks (such as attention heads) that do not cross, got those of {name} in "
                f"blocks by {chain[-1].place} and in others by {link.place}; fusion cannot align this network"
            )
        chain.append(link)
    return chain


def _is_function(one: Ints, other: Ints) -> bool:
    """Whether equal entries of `one` have equal partners in `other`, and each of these equally many."""
    pairs = np.unique(np.stack([one, other]), axis=1)
    counts = np.unique(pairs[1], return_counts=True)[1]
    return len(np.unique(one)) == pairs.shape[1] and bool((counts == counts[0]).all())


def _between(chain: list[_Link]) -> list[_Link]:
    """That the finest blocks of a chain lie in the coarser ones."""
    found = []
    fine = chain[0]
    child, first = np.unique(fine.block, return_index=True)
    for coarse in chain[1:]:
        found.append(_Link(coarse.parent, child, coarse.block[first], coarse.place))
    return found


def _in_order(link: _Link, neuron: Ints) -> Ints:
    """The block of every neuron of a space, in their order."""
    return link.block[np.argsort(neuron[link.child])]


def _parents_first(order: list[int], parents: Mapping[int, _Link]) -> list[int]:
    result: list[int] = []

    def add(one: int) -> None:
        if one not in result:
            if one in parents:
                add(parents[one].parent)
            result.append(one)

    for one in order:
        add(one)
    return result
