"""What fusing, data, training and solvers take on a GPU: wall seconds, side by side.

    python benchmarks/gpu.py

Everything is run once before it is measured, because the first call of a kind loads the GPU's libraries. The bare
networks run in batches of 256; memory is what the GPU holds.
"""

import sys
from collections.abc import Callable

import torch
from common import fastest, print_machine, print_table, quietly
from data import compared
from fusion import PAIRS, measure, row
from solvers import features_cost, random_cost
from torch import Tensor
from train import options_compared, trainer_against_bare

from clafusion.transport import solvers as transport
from clafusion.transport.solvers import transport_plan

DEVICE = "cuda"
#: Options and samples of the fusions.
CASES = [("none", 200), ("none", 3200), ("paper", 200), ("refit", 1000), ("refit", 2000)]
SHAPES = [(64, 64), (256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024), (1024, 2048), (2048, 2048)]


def solvers(kind: str, cost: Tensor) -> dict[str, object]:
    """One row: the exact solvers, which run on the CPU, and Sinkhorn's iterations here and there."""
    there = cost.to(DEVICE)
    problems: dict[str, Callable[[], Tensor]] = {
        "exact": lambda: transport_plan(there),
        "sinkhorn, CPU": lambda: transport_plan(cost, "sinkhorn").to(DEVICE),
        "sinkhorn, GPU": lambda: transport_plan(there, "sinkhorn"),
    }
    found = fastest(problems, rounds=2, device=DEVICE)
    shown = {f"{name}, ms": 1e3 * value for name, value in found.items()}
    return {"costs": kind, "neurons": f"{cost.shape[0]} x {cost.shape[1]}", **shown,
            "sinkhorn, GPU / exact": found["sinkhorn, GPU"] / found["exact"]}  # fmt: skip


def main() -> None:
    """All tables."""
    if not torch.cuda.is_available():
        sys.exit("Expected a CUDA device, got none; the other benchmarks here run on the CPU")
    quietly()
    print_machine()
    cases = {
        (pair, *case): measure(models, case[1], case[0], device=DEVICE)
        for pair, models in PAIRS.items()
        for case in CASES
    }
    print_table(
        "Fusing at full width, samples of 3x32x32",
        [row(found, "s", pair=pair, options=options, samples=samples)
         for (pair, options, samples), found in cases.items()],
    )  # fmt: skip
    print_table(
        "The same: seconds of each phase",
        [{"pair": pair, "options": options, "samples": samples, **found["phases"]}
         for (pair, options, samples), found in cases.items()],
    )  # fmt: skip
    transport.ACCELERATED = 0  # to see from where on it pays
    makers = {"features": features_cost, "random": random_cost}
    print_table("Solvers", [solvers(kind, make(*shape)) for kind, make in makers.items() for shape in SHAPES])
    loaded = [*compared(True, 5_000, DEVICE), *compared(True, 20_000, DEVICE, workers=8)]
    print_table("Data: an epoch of batches of 128", loaded)
    print_table(
        "Training: an epoch of 3x32x32 in batches of 128",
        [trainer_against_bare(name, 12_800, DEVICE) for name in ("resnet18_eighth", "resnet18")],
    )
    for size in (128, 1024):
        title = f"Training: a step of {size} images, resnet18 with BatchNorm"
        print_table(title, options_compared("resnet18", size, DEVICE, repeats=20))


if __name__ == "__main__":
    main()
