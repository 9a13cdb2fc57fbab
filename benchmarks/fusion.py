"""What fusing costs, against running the parents once: CPU seconds and peak memory.

    python benchmarks/fusion.py [FOLDER]        where the plots go; default: docs/plots

Every row is a fresh process of one thread that first runs the bare networks over the samples, without gradients, in
batches of 32 and in batches of 64, of which the faster counts, and then fuses them: the ratio is that of neighbouring
minutes, and "MiB above" is how much the peak of memory grew by when the fusion followed. The straightforward
implementation runs one sample at a time, stacks all features in double precision and compares them then.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from common import (
    case_of_this_process,
    in_fresh_process,
    now,
    peak_mib,
    plot,
    print_machine,
    print_table,
    seconds,
)
from torch import Tensor

from clafusion import FusionOptions, fuse, networks
from clafusion.fusion import candidates
from clafusion.fusion import fuse as fusion
from clafusion.statistics.moments import Moments, Observation
from clafusion.statistics.samples import rows
from clafusion.tracing.execution import GraphRunner
from clafusion.transport import neuron_maps as maps

PAIRS = {"ResNet34 + ResNet18": ["resnet34", "resnet18"], "VGG13_doub + VGG11_half": ["vgg13_doub", "vgg11_half"]}
#: Processes for each row of the first table.
ROUNDS = 5
#: Samples that the bare networks run at once; the fastest counts.
BATCHES = {"cpu": (32, 64), "cuda": (256,)}
#: What the phases of `fuse` are called where its modules look them up.
PHASES = {
    "trace": (fusion, "trace_all"),
    "balance": (fusion, "balance"),
    "statistics": (maps, "paired_moments"),
    "solve": (maps, "_solve"),
    "average": (candidates, "moved_average"),
    "correct": (candidates, "correct"),
}


def options_of(name: str, num_samples: int) -> FusionOptions:
    """The options by the name of the correction, or the published ones."""
    if name == "paper":
        return FusionOptions.paper(num_samples=num_samples)
    return FusionOptions(correction=name, targets="matched", num_samples=num_samples)  # type: ignore[arg-type]


@torch.no_grad()
def measure(
    models: Sequence[str],
    samples: int,
    options: str,
    slow: bool = False,
    compare: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """One case in this process; on a GPU not for the first time, when its libraries are loaded."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    parents = [networks.build({"name": name, "num_classes": 10}).eval().to(device) for name in models]
    images = torch.randn(samples, 3, 32, 32).to(device)
    for parent in parents:
        parent(images[:2])

    def bare(size: int) -> None:
        for parent in parents:
            for batch in images.split(size):
                parent(batch)

    chosen = options_of(options, samples)
    if device != "cpu":
        bare(BATCHES[device][0])
        fuse(parents, [images], chosen)
        torch.cuda.reset_peak_memory_stats()
    taken = {"bare": min(seconds(partial(bare, size), device) for size in BATCHES[device])}
    before = peak_mib(device)
    found: list[Any] = []
    with timed_phases(device) as phases:
        if slow:
            with_straightforward(lambda: found.append(fuse(parents, [images], chosen)), taken)
        else:
            taken["fuse"] = seconds(lambda: found.append(fuse(parents, [images], chosen)), device)
    result = {**taken, "phases": phases, "bare_peak": before, "peak": peak_mib(device)}
    if compare:
        fast = found[0]
        with_straightforward(lambda: found.append(fuse(parents, [images], chosen)), {})
        result["difference"] = difference(fast, found[1])
    return result


@contextmanager
def timed_phases(device: str) -> Iterator[dict[str, float]]:
    """Wrap the phases of `fuse`; the seconds of each appear in what is given."""
    found = dict.fromkeys(PHASES, 0.0)
    kept = {name: getattr(module, attribute) for name, (module, attribute) in PHASES.items()}

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now(device)
            result = function(*args, **kwargs)
            found[name] += now(device) - start
            return result

        return timed

    for name, (module, attribute) in PHASES.items():
        setattr(module, attribute, wrap(name, kept[name]))
    yield found
    for name, (module, attribute) in PHASES.items():
        setattr(module, attribute, kept[name])


def one_at_a_time(
    runners: Sequence[GraphRunner], wanted: Mapping[Any, tuple[Observation, Observation]], samples: Tensor, size: int
) -> dict[Any, Moments]:
    """`paired_moments`, the straightforward way, whatever the size of a batch."""
    stacks: dict[Observation, list[Tensor]] = {one: [] for pair in wanted.values() for one in pair}
    for sample in samples:
        for network, runner in enumerate(runners):
            found = dict(runner.observe(sample[None], {one.node for one in stacks if one.network == network}))
            for one, stack in stacks.items():
                if one.network == network:
                    stack.append(rows(one.of(found[one.node])))
    stacked = {one: torch.cat(stack).double() for one, stack in stacks.items()}
    return {key: Moments.of(stacked[one], stacked[other]) for key, (one, other) in wanted.items()}


def with_straightforward(run: Callable[[], object], taken: dict[str, float]) -> None:
    """Run a fusion whose statistics are collected the straightforward way."""
    kept = maps.paired_moments
    maps.paired_moments = one_at_a_time
    taken["fuse"] = seconds(run)
    maps.paired_moments = kept


def difference(one: fusion.Fusion, other: fusion.Fusion) -> float:
    """The largest relative difference between the transport costs of two fusions."""
    pairs = [(a[key], b[key]) for a, b in zip(one.costs, other.costs, strict=True) for key in a]
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)


def run(models: Sequence[str], samples: int, options: str, **more: bool) -> dict[str, Any]:
    """One case in a fresh process."""
    return in_fresh_process(__file__, {"models": models, "samples": samples, "options": options, **more})


def typical(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median ratio, with the least and the largest ratio and the most memory of all."""
    ordered = sorted(runs, key=_ratio)
    highest = max(runs, key=lambda found: found["peak"] - found["bare_peak"])
    spread = f"{_ratio(ordered[0]):.2f} to {_ratio(ordered[-1]):.2f}"
    memory = {key: highest[key] for key in ("peak", "bare_peak")}
    return {**ordered[len(ordered) // 2], **memory, "spread": spread}


def _ratio(found: Mapping[str, Any]) -> float:
    return float(found["fuse"] / found["bare"])


def row(found: Mapping[str, Any], unit: str = "CPU s", **first: object) -> dict[str, object]:
    """The columns that most tables have of a case."""
    return {
        **first,
        f"bare, {unit}": found["bare"],
        f"fuse, {unit}": found["fuse"],
        "ratio": _ratio(found),
        **({"of all": found["spread"]} if "spread" in found else {}),
        "bare, peak MiB": found["bare_peak"],
        "MiB above": found["peak"] - found["bare_peak"],
    }


def main(folder: str = "docs/plots") -> None:
    """All tables."""
    print_machine()
    full = {
        (pair, options): typical([run(models, 200, options) for _ in range(ROUNDS)])
        for pair, models in PAIRS.items()
        for options in ("none", "paper")
    }
    print_table(
        f"Full width, 200 samples of 3x32x32, without correction, the median of {ROUNDS} processes",
        [row(found, pair=pair, options=options) for (pair, options), found in full.items()],
    )
    print_table(
        "The same: CPU seconds of each phase",
        [{"pair": pair, "options": options, **found["phases"]} for (pair, options), found in full.items()],
    )
    small = ["resnet34_fourth", "resnet18_fourth"]
    counts = (100, 200, 400, 800, 1600, 3200)
    by_samples = {count: run(small, count, "none") for count in counts}
    print_table("A fourth of the width, by samples", [row(by_samples[n], samples=n) for n in counts])
    slow = {count: run(small, count, "none", slow=True) for count in counts[:3]}
    print_table("The straightforward implementation", [row(slow[n], samples=n) for n in slow])
    compared = {options: run(small, 200, options, compare=True)["difference"] for options in ("none", "paper")}
    print_table(
        "Largest relative difference of a transport cost to the straightforward implementation",
        [{"options": name, "difference": value} for name, value in compared.items()],
    )
    widths = {suffix: [f"resnet34{suffix}", f"resnet18{suffix}"] for suffix in ("_eighth", "_fourth", "_half")}
    print_table("By width, 200 samples", [row(run(m, 200, "none"), width=s[1:]) for s, m in widths.items()])
    deep = {"18 + 18": (18, 18), "34 + 18": (34, 18), "50 + 50": (50, 50), "101 + 50": (101, 50)}
    depths = {name: [f"resnet{depth}_eighth" for depth in pair] for name, pair in deep.items()}
    print_table(
        "By depth, an eighth of the width, 200 samples", [row(run(m, 200, "none"), depths=d) for d, m in depths.items()]
    )
    many = {k: run([*small * 4][:k], 200, "none") for k in (2, 4, 6, 8)}
    print_table("By number of models, a fourth of the width, 200 samples", [row(many[k], models=k) for k in many])
    refit = {count: run(small, count, "refit") for count in (200, 800)}
    print_table("With refit, a fourth of the width", [row(refit[n], samples=n) for n in refit])
    series = {"bare networks": ("bare", by_samples), "fused": ("fuse", by_samples), "straightforward": ("fuse", slow)}
    lines = {name: [(float(n), found[n][key]) for n in found] for name, (key, found) in series.items()}
    plot(f"{folder}/seconds.svg", "ResNet34 + ResNet18, a fourth of the width", "samples", "CPU seconds", lines)
    memory = {"fused": by_samples, "straightforward": slow}
    lines = {
        name: [(float(n), found[n]["peak"] - found[n]["bare_peak"] + 1) for n in found]
        for name, found in memory.items()
    }
    plot(f"{folder}/memory.svg", "Memory above the bare networks", "samples", "MiB", lines)


if __name__ == "__main__":
    case = case_of_this_process()
    print(json.dumps(measure(**case))) if case else main(*sys.argv[1:])
