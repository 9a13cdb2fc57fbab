"""Transport of neurons in blocks, such as attention heads: whole blocks first, then the neurons inside matched blocks.

To permute the neurons of one head among themselves, or whole heads, leaves attention the function that it is; to move a
neuron from one head into another does not.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clafusion.transport.solvers import as_map

#: A transport plan from a cost matrix.
Solver = Callable[[Tensor], Tensor]
#: The blocks of the neurons of a space in two networks; None: it is in no blocks.
BlockPair = tuple[Tensor | None, Tensor | None]


def solve_in_blocks(
    grounds: Mapping[str, Tensor],
    parents: Mapping[str, str | None],
    blocks: Mapping[str, BlockPair],
    sizes: Mapping[str, tuple[int, int]],
    solver: Solver,
) -> dict[str, tuple[Tensor, float]]:
    """Carry the neurons of one network onto those of another, block by block.

    The cost of carrying one block onto another is the sum of the costs of carrying what is in them.

    Args:
        grounds: by neuron space the cost matrix [its neurons, the other's neurons].
        parents: by space the space of its blocks; these are in the mapping as well, each before what is in it.
        blocks: by space the block of every neuron, in both networks.
        sizes: by space the number of its neurons in both networks.
        solver: gives the plan of a cost matrix.

    Returns:
        By space, blocks included, the map [its neurons, the other's neurons], columns summing to one, and its cost.
    """
    children: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    found: dict[str, tuple[Tensor, float]] = {}
    for top in children[None]:
        rows, columns = (torch.arange(size) for size in sizes[top])
        for name, (mapping, cost) in _solve(top, rows, columns, grounds, children, blocks, solver).items():
            whole = torch.zeros(*sizes[name], dtype=torch.float64)
            rows_of, columns_of, part = mapping
            whole[rows_of[:, None], columns_of] = part.cpu()
            found[name] = whole, cost
    return found


#: Which neurons of both networks, and the map between them.
_Part = tuple[Tensor, Tensor, Tensor]


def _solve(
    name: str,
    rows: Tensor,
    columns: Tensor,
    grounds: Mapping[str, Tensor],
    children: Mapping[str | None, list[str]],
    blocks: Mapping[str, BlockPair],
    solver: Solver,
) -> dict[str, tuple[_Part, float]]:
    """The map between some neurons of a space, and those of everything that is in them."""
    inside = children.get(name, [])
    if not inside:
        cost = grounds[name].cpu()[rows][:, columns]
        plan = solver(cost)
        return {name: ((rows, columns, as_map(plan)), float((plan * cost).sum()))}
    parts: dict[tuple[int, int], dict[str, tuple[_Part, float]]] = {}
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            parts[i, j] = {}
            for child in inside:
                members = _members(blocks[child][0], row), _members(blocks[child][1], column)
                solved = _solve(child, *members, grounds, children, blocks, solver)
                total[i, j] += solved[child][1]
                parts[i, j] |= solved
    if name in grounds:
        total = total + grounds[name].cpu()[rows][:, columns]
    plan = solver(total)
    mapping = as_map(plan)
    result: dict[str, tuple[_Part, float]] = {name: ((rows, columns, mapping), float((plan * total).sum()))}
    for (i, j), found in parts.items():
        if mapping[i, j]:
            for child, (part, each) in found.items():
                result[child] = _joined(result.get(child), part, float(mapping[i, j]), float(plan[i, j]) * each)
    return result


def _members(block: Tensor | None, one: int) -> Tensor:
    """The neurons in a block."""
    assert block is not None
    return (block == one).nonzero().flatten()


def _joined(known: tuple[_Part, float] | None, part: _Part, share: float, cost: float) -> tuple[_Part, float]:
    """A map of some neurons with that of others; blocks that several are carried onto share it."""
    if known is None:
        return (part[0], part[1], share * part[2]), cost
    (rows, columns, mapping), so_far = known
    all_rows, all_columns = torch.cat([rows, part[0]]).unique(), torch.cat([columns, part[1]]).unique()
    joined = mapping.new_zeros(len(all_rows), len(all_columns))
    for one_rows, one_columns, one in ((rows, columns, mapping), (part[0], part[1], share * part[2])):
        places = torch.searchsorted(all_rows, one_rows)[:, None], torch.searchsorted(all_columns, one_columns)
        joined[places] += one
    return (all_rows, all_columns, joined), so_far + cost
