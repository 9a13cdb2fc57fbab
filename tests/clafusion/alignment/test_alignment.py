"""Cross-layer alignment: against brute force, the published results, and its own rules."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from clafusion import FusionError, align
from clafusion.alignment.dynamic_programming import chain, clamp_pins, is_forced, random_map
from tests.helpers import REFERENCE


def brute_force(cost: Tensor, first: int, last: int) -> list[tuple[int, ...]]:
    """All maps of least total cost that honour the pins."""
    m, n = cost.shape
    free = itertools.combinations(range(first, m - last), n - first - last)
    maps = [(*range(first), *rows, *range(m - last, m)) for rows in free]
    totals = cost.double().numpy()[np.array(maps, dtype=int), np.arange(n)].sum(1)
    return [maps[index] for index in np.flatnonzero(totals <= totals.min() + 1e-12)]


def matrices(count: int):
    for seed in range(count):
        generator = random.Random(seed)
        m = generator.randint(1, 7)
        n = generator.randint(1, m)
        torch_generator = torch.Generator().manual_seed(seed)
        # Small integers (many ties, exact sums), halves below zero, and real numbers.
        cost = torch.randint(0, 4, (m, n), generator=torch_generator).double()
        if seed % 3 == 1:
            cost = cost / 2 - 1
        if seed % 3 == 2:
            cost = torch.rand(m, n, generator=torch_generator, dtype=torch.float64)
        yield cost


def test_equals_brute_force_with_all_pins():
    checked = 0
    for cost in matrices(300):
        n = cost.shape[1]
        for first, last in itertools.product(range(n + 1), repeat=2):
            if first + last <= n:
                best = brute_force(cost, first, last)
                assert align(cost, first, last) in best
                checked += 1
    assert checked > 2000


def test_ties_take_the_smaller_index_from_the_last_column_backwards():
    for cost in matrices(200):
        expected = min(brute_force(cost, 0, 0), key=lambda rows: rows[::-1])
        assert align(cost) == expected


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_single_column_takes_the_cheapest_row(rows):
    cost = torch.arange(rows, 0, -1).double()[:, None]
    assert align(cost) == (rows - 1,)
    assert align(cost, pin_first=1) == (0,)
    assert align(cost, pin_last=1) == (rows - 1,)


def test_a_square_matrix_leaves_no_choice():
    assert align(torch.rand(4, 4)) == (0, 1, 2, 3)


def test_pins_are_honoured_whatever_they_cost():
    cost = torch.zeros(5, 3)
    cost[0, 0] = cost[4, 2] = 100.0
    assert align(cost, 1, 1) == (0, 1, 4)
    assert align(cost, 3, 0) == (0, 1, 2)
    assert align(cost, 0, 3) == (2, 3, 4)


def test_the_input_is_left_as_it_is():
    cost = torch.rand(5, 3)
    before = cost.clone()
    align(cost, 1, 1)
    assert torch.equal(cost, before)


@pytest.fixture(scope="module")
def published():
    with np.load(REFERENCE / "align.npz") as file:
        return dict(file)


def test_equals_the_published_results_wherever_those_are_optimal(published):
    equal = skipped = 0
    for name, rows in published.items():
        if "_s" not in name:
            continue
        case, start, free = (int(part[1:]) for part in name.split("_"))
        cost = torch.from_numpy(published[f"C{case}"])
        first, last = start - 1, free
        theirs = tuple(int(row) - 1 for row in rows)
        if first + last > cost.shape[1]:
            with pytest.raises(FusionError, match="pin fewer layers"):
                align(cost, first, last)
            skipped += 1
            continue
        best = brute_force(cost, first, last)
        assert align(cost, first, last) in best
        if theirs not in best:
            assert cost.shape[1] == 1  # the published code answers the first row, whatever the cost
            skipped += 1
            continue
        assert align(cost, first, last) == theirs or len(best) > 1
        equal += align(cost, first, last) == theirs
    assert equal + skipped >= 260


def test_the_chain_is_the_published_one(published):
    for case in range(30):
        rows = tuple(int(row) - 1 for row in published[f"A{case}_chain"])
        assert chain(*published[f"C{case}"].shape) == rows


def test_random_maps_increase_keep_pins_and_reach_every_map():
    seen = set()
    for seed in range(300):
        rows = random_map(5, 3, pin_first=1, seed=seed)
        assert rows[0] == 0 and all(a < b for a, b in itertools.pairwise(rows)) and rows[-1] < 5
        assert rows == random_map(5, 3, pin_first=1, seed=seed)
        seen.add(rows)
    assert len(seen) == 6  # 4 choose 2


@pytest.mark.parametrize(
    ("columns", "first", "last", "expected"),
    [(3, 1, 1, (1, 1)), (1, 1, 1, (1, 0)), (2, 3, 1, (2, 0)), (3, 2, 2, (2, 1)), (3, 0, 5, (0, 3))],
)
def test_leading_pins_come_first_where_there_is_no_room_for_all(columns, first, last, expected):
    assert clamp_pins(columns, first, last) == expected


def test_forced_means_that_only_one_map_exists():
    for m, n, first, last in itertools.product(range(1, 6), range(1, 6), range(3), range(3)):
        if n <= m:
            pins = clamp_pins(n, first, last)
            assert is_forced(m, n, first, last) == (len(brute_force(torch.zeros(m, n), *pins)) == 1)


@pytest.mark.parametrize("shape", [(2, 3), (3, 0), (3,), (0, 0), (2, 2, 2)])
def test_refuses_what_is_no_tall_matrix(shape):
    with pytest.raises(FusionError, match=r"\[m, n\] with m >= n >= 1, got .*swap the networks"):
        align(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_costs_that_are_not_finite(value):
    cost = torch.zeros(3, 2)
    cost[2, 0] = value
    with pytest.raises(FusionError, match="Expected finite layer costs"):
        align(cost)


@pytest.mark.parametrize(("first", "last"), [(2, 1), (3, 0), (0, 3), (-1, 0), (0, -1)])
def test_refuses_pins_beyond_the_columns(first, last):
    with pytest.raises(FusionError, match=f"at most 2 pins for 2 columns, got pin_first={first} and pin_last={last}"):
        align(torch.zeros(4, 2), first, last)
