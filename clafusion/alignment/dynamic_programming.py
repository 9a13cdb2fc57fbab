"""Cross-layer alignment: which layer of the deep network each layer of the shallow one stands for."""

import random

from torch import Tensor

from clafusion.errors import FusionError


def align(cost: Tensor, pin_first: int = 0, pin_last: int = 0) -> tuple[int, ...]:
    r"""The strictly increasing map of least total cost (CLAFusion, Nguyen et al. 2023, section 3.1).

    Minimises :math:`\sum_k C_{a(k), k}` over :math:`0 \le a(0) < \dots < a(n - 1) < m` by dynamic programming in
    O(mn). Of equally good maps the one with the smaller indices is taken, from the last column backwards.

    Args:
        cost: dissimilarity of each layer of the deep network to each of the shallow one, [m, n] with m >= n.
        pin_first: how many leading columns are matched to the leading rows by force.
        pin_last: how many trailing columns are matched to the trailing rows by force.

    Returns:
        For every column, its row.

    Raises:
        FusionError: if the matrix is not [m, n] with m >= n >= 1, is not finite, or has fewer columns than pins.

    Example:
        >>> import torch
        >>> align(torch.tensor([[0.0, 1.0], [1.0, 0.5], [1.0, 0.0]]))
        (0, 2)
    """
    _check(cost, pin_first, pin_last)
    m, n = cost.shape
    middle = cost[pin_first : m - pin_last, pin_first : n - pin_last].double()
    free = tuple(pin_first + row for row in _shortest(middle)) if middle.shape[1] else ()
    return (*range(pin_first), *free, *range(m - pin_last, m))


def _check(cost: Tensor, pin_first: int, pin_last: int) -> None:
    if cost.ndim != 2 or not cost.shape[0] >= cost.shape[1] >= 1:
        raise FusionError(f"Expected a cost matrix [m, n] with m >= n >= 1, got {list(cost.shape)}; swap the networks")
    if not cost.isfinite().all():
        raise FusionError("Expected finite layer costs, got NaN or infinity; check the networks' activations")
    if min(pin_first, pin_last) < 0 or pin_first + pin_last > cost.shape[1]:
        raise FusionError(
            f"Expected at most {cost.shape[1]} pins for {cost.shape[1]} columns, got pin_first={pin_first} and "
            f"pin_last={pin_last}; pin fewer layers"
        )


def _shortest(cost: Tensor) -> tuple[int, ...]:
    """Dynamic programme without pins: `best[l, k]` is the least cost of columns 0..k with a(k) <= l."""
    m, n = cost.shape
    values = cost.tolist()
    infinity = float("inf")
    best = [[infinity] * n for _ in range(m)]
    for row in range(m):
        for column in range(min(row + 1, n)):
            before = best[row - 1][column - 1] if column and row else 0.0 if not column else infinity
            skipped = best[row - 1][column] if row else infinity
            best[row][column] = min(skipped, before + values[row][column])
    rows: list[int] = []
    row = m - 1
    for column in reversed(range(n)):
        while row and best[row - 1][column] == best[row][column]:
            row -= 1
        rows.append(row)
        row -= 1
    return tuple(reversed(rows))


def chain(rows: int, columns: int) -> tuple[int, ...]:
    """The baseline that matches the k-th layer to the k-th."""
    return tuple(range(min(rows, columns)))


def random_map(rows: int, columns: int, pin_first: int = 0, seed: int = 0) -> tuple[int, ...]:
    """A uniformly random strictly increasing map, with the first `pin_first` columns matched by force."""
    free = random.Random(seed).sample(range(pin_first, rows), columns - pin_first)
    return (*range(pin_first), *sorted(free))


def clamp_pins(columns: int, pin_first: int, pin_last: int) -> tuple[int, int]:
    """The pins that a stage of `columns` layers has room for; the leading ones come first."""
    first = min(pin_first, columns)
    return first, min(pin_last, columns - first)


def is_forced(rows: int, columns: int, pin_first: int, pin_last: int) -> bool:
    """Whether only one map exists, so that no layer costs are needed."""
    first, last = clamp_pins(columns, pin_first, pin_last)
    return rows == columns or first + last == columns
