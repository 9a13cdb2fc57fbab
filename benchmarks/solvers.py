"""Which solver for which transport problem: CPU milliseconds side by side.

    python benchmarks/solvers.py

The costs are those that `fuse` meets: 1 - correlation of the features of random neurons, and random numbers, which are
harder for the network simplex. `assignment` is what `exact` uses for equal widths, `emd` what it uses for the rest; the
plans have the same cost, which is checked.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from common import fastest, print_machine, print_table
from torch import Tensor

from clafusion.statistics.moments import Moments
from clafusion.transport.solvers import ground_cost, transport_plan


def features_cost(n: int, m: int) -> Tensor:
    """1 - correlation of neurons that are mixtures of fewer signals and noise, as in neighbouring layers."""
    generator = torch.Generator().manual_seed(n * m)
    signals = torch.randn(2000, 64, generator=generator)
    sides = [
        signals @ torch.randn(64, k, generator=generator) + torch.randn(2000, k, generator=generator) for k in (n, m)
    ]
    return ground_cost(Moments.of(*(side.relu() for side in sides)))


def random_cost(n: int, m: int) -> Tensor:
    """Independent uniform numbers."""
    return torch.rand(n, m, generator=torch.Generator().manual_seed(n * m), dtype=torch.float64)


def compare(kind: str, cost: Tensor) -> dict[str, object]:
    """One row: every solver on one cost matrix."""
    n, m = cost.shape
    uniform = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    solvers: dict[str, Callable[[], Tensor]] = {
        "emd": lambda: transport_plan(cost, "exact", uniform),
        "sinkhorn .05": lambda: transport_plan(cost, "sinkhorn", regularization=0.05),
    }
    if n == m:
        solvers = {"assignment": lambda: transport_plan(cost, "exact"), **solvers}
        assert abs(float((solvers["assignment"]() * cost).sum() - (solvers["emd"]() * cost).sum())) < 1e-9
    seconds = fastest(solvers, rounds=1)
    shown = {
        f"{name}, ms": 1e3 * seconds[name] if name in seconds else "" for name in ("assignment", "emd", "sinkhorn .05")
    }
    exact = seconds.get("assignment", seconds["emd"])
    return {"costs": kind, "neurons": f"{n} x {m}", **shown, "emd / exact": seconds["emd"] / exact,
            "sinkhorn / exact": seconds["sinkhorn .05"] / exact}  # fmt: skip


def in_parallel(n: int, count: int, threads: int) -> dict[str, object]:
    """Wall seconds of independent problems one after another and in threads."""
    costs = [features_cost(n, n) + 1e-3 * random_cost(n, n).roll(k) for k in range(count)]
    wall = {}
    for workers in (1, threads):
        start = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(transport_plan, costs))
        wall[workers] = time.perf_counter() - start
    return {"problems": f"{count} of {n} x {n}", "one thread, s": wall[1], f"{threads} threads, s": wall[threads],
            "ratio": wall[threads] / wall[1]}  # fmt: skip


def main() -> None:
    """Both tables."""
    print_machine()
    shapes = [(64, 64), (128, 128), (256, 256), (512, 512), (64, 128), (128, 256), (256, 512)]
    makers = {"features": features_cost, "random": random_cost}
    print_table(
        "Solvers on the CPU",
        [compare(kind, make(*shape)) for kind, make in makers.items() for shape in shapes],
    )
    print_table("Independent neuron spaces in threads", [in_parallel(n, 8, 2) for n in (256, 512)])


if __name__ == "__main__":
    main()
