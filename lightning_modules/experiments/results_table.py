"""The table at the end of an experiment: every network over all seeds, for people and for programs."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from clafusion.lightning_modules.commands.records import versions, write_results
from clafusion.lightning_modules.experiments.plan import Contestant
from clafusion.lightning_modules.experiments.stages.base import Role, StageResult
from clafusion.lightning_modules.files import write_text

#: What is known of a network for one seed: by its evaluation, and by the stage that made it.
_MEASURED, _COSTS = ("test_acc", "parameters"), ("seconds", "peak_memory_bytes")


class SeedRow(TypedDict):
    """A network for one seed; None: there is no result."""

    test_acc: float | None
    parameters: int | None
    seconds: float | None
    peak_memory_bytes: int | None


class ResultRow(TypedDict):
    """A network over all seeds: mean and sample standard deviation of the test accuracy, mean seconds, highest memory.

    The accuracy is None without a result, its deviation also with a single one.
    """

    name: str
    role: Role
    parameters: int | None
    test_acc: float | None
    test_acc_std: float | None
    published_test_acc: float | None
    seconds: float | None
    peak_memory_bytes: int | None
    seeds: dict[str, SeedRow]


class Failure(TypedDict):
    """A stage without a result."""

    seed: int
    stage: str
    reason: str


class ExperimentResults(TypedDict):
    """The content of `results.json`, besides versions. The first version wrote rows without a role."""

    experiment: str
    scale: str
    seeds: list[int]
    networks: list[ResultRow]
    failures: list[Failure]


def result_rows(
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    results: Mapping[tuple[int, str], StageResult],
    published: Mapping[str, float],
) -> list[ResultRow]:
    """Return one row for each network.

    Args:
        contestants: The networks, in the order of the rows.
        seeds: Of the runs.
        results: By seed and name of the stage, as far as there are any.
        published: Test accuracies in percent, by the name of the network.
    """
    return [_row(network, seeds, results, published.get(network.name)) for network in contestants]


def _row(
    network: Contestant,
    seeds: Sequence[int],
    results: Mapping[tuple[int, str], StageResult],
    published: float | None,
) -> ResultRow:
    runs = {str(seed): _run(network, seed, results) for seed in seeds}
    known: dict[str, list[Any]] = {
        key: [run[key] for run in cast("list[dict[str, Any]]", list(runs.values())) if run[key] is not None]
        for key in (*_MEASURED, *_COSTS)
    }
    accuracies = known["test_acc"]
    return {
        "name": network.name,
        "role": network.role,
        "parameters": next(iter(known["parameters"]), None),
        "test_acc": statistics.fmean(accuracies) if accuracies else None,
        "test_acc_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "published_test_acc": None if published is None else round(published / 100, 6),
        "seconds": statistics.fmean(known["seconds"]) if known["seconds"] else None,
        "peak_memory_bytes": max(known["peak_memory_bytes"], default=None),
        "seeds": runs,
    }


def _run(network: Contestant, seed: int, results: Mapping[tuple[int, str], StageResult]) -> SeedRow:
    evaluated: Mapping[str, Any] = results.get((seed, network.evaluation), {})
    cost: Mapping[str, Any] = results.get((seed, network.maker or ""), {})
    values = {key: evaluated.get(key) for key in _MEASURED} | {key: cost.get(key) for key in _COSTS}
    return cast(SeedRow, values)


def write_tables(results: ExperimentResults, folder: Path) -> None:
    """Write `results.json`, `results.csv` and `results.md`, each whole or not at all.

    Raises:
        FusionError: They cannot be written.
    """
    write_results({**results, "versions": versions()}, folder / "results.json")
    for name, text in (("results.csv", _csv(results)), ("results.md", _markdown(results))):
        write_text(folder / name, text)


def print_table(results: ExperimentResults, folder: Path, report: bool = False) -> None:
    """Print the table on standard output, and the names of the files."""
    from rich.console import Console
    from rich.table import Table

    header, *lines = _cells(results)
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row, line in zip(results["networks"], lines, strict=True):
        table.add_row(*line, style="bold" if row["role"] in ("fused", "finetuned") else None)
    console = Console()
    console.print(table)
    more = ", report.html" if report else ""
    console.print(f"{folder / 'results.json'}, results.csv, results.md{more}", highlight=False, soft_wrap=True)


def _cells(results: ExperimentResults) -> list[list[str]]:
    """Return the table in words, its header first; published numbers have a column if there are some."""
    rows = results["networks"]
    published = any(row["published_test_acc"] is not None for row in rows)
    header = ["network", "test accuracy", *(["published"] if published else []), "parameters", "seconds", "peak MiB"]
    lines = [header]
    for row in rows:
        spread = "" if row["test_acc_std"] is None else f" ± {100 * row['test_acc_std']:.2f}"
        accuracy = _word(row["test_acc"], lambda value: f"{100 * value:.2f}") + spread
        other = [_word(row["published_test_acc"], lambda value: f"{100 * value:.2f}")] if published else []
        lines.append(
            [
                row["name"],
                accuracy,
                *other,
                _word(row["parameters"], "{:,}".format),
                _word(row["seconds"], "{:.1f}".format),
                _word(row["peak_memory_bytes"], lambda value: f"{value / 2**20:.0f}"),
            ]
        )
    return lines


def _word(value: Any, words: Callable[[Any], str]) -> str:
    return "–" if value is None else words(value)


def _markdown(results: ExperimentResults) -> str:
    header, *lines = _cells(results)
    seeds = ", ".join(map(str, results["seeds"]))
    several = "mean ± standard deviation over seeds" if len(results["seeds"]) > 1 else "seed"
    explained = (
        f"Test accuracy in percent, {several} {seeds}; seconds and peak memory of the stage that made the network."
    )
    if "published" in header and results["scale"] != "full":
        explained += " The published numbers are of the full scale, with which this one cannot be compared."
    table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    parts = [
        f"# {results['experiment']} ({results['scale']})",
        explained,
        "\n".join(f"| {' | '.join(line)} |" for line in table),
        "\n".join(
            f"- {failure['stage']}, seed {failure['seed']}: {failure['reason']}" for failure in results["failures"]
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _csv(results: ExperimentResults) -> str:
    """Return one line for each network and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "seed", *_MEASURED, "published_test_acc", *_COSTS])
    for row in results["networks"]:
        for seed, run in row["seeds"].items():
            values = [run["test_acc"], run["parameters"], row["published_test_acc"], run["seconds"]]
            writer.writerow([row["name"], seed, *values, run["peak_memory_bytes"]])
    return text.getvalue()
