"""The table at the end of an experiment: every network over all seeds, for people and for programs."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clafusion.lightning_modules.commands.records import versions, write_results
from clafusion.lightning_modules.files import write_text

#: What is known of a network for one seed: by its evaluation, and by the stage that made it.
_MEASURED, _COSTS = ("test_acc", "parameters"), ("seconds", "peak_memory_bytes")
Results = Mapping[tuple[int, str], dict[str, Any]]


def compare(
    evaluations: Mapping[str, str],
    makers: Mapping[str, str],
    seeds: Iterable[int],
    results: Results,
    published: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row for each network.

    Args:
        evaluations: By the name of a network, the stage that evaluates it; in the order of the rows.
        makers: By the name of a network, the stage that makes it; none for an ensemble, which costs nothing to make.
        seeds: Of the runs.
        results: By seed and name of the stage, what there is.
        published: Test accuracies in percent.

    Returns:
        Rows of plain values: mean and sample standard deviation of the test accuracy (None without, or with one, run),
        mean seconds, highest peak memory, and all of them by seed.
    """
    rows = []
    for name, evaluation in evaluations.items():
        runs = {}
        for seed in seeds:
            evaluated = results.get((seed, evaluation), {})
            cost = results.get((seed, makers.get(name, "")), {})
            runs[str(seed)] = {key: evaluated.get(key) for key in _MEASURED} | {key: cost.get(key) for key in _COSTS}
        known: dict[str, list[Any]] = {
            key: [run[key] for run in runs.values() if run[key] is not None] for key in (*_MEASURED, *_COSTS)
        }
        accuracies = known["test_acc"]
        rows.append(
            {
                "name": name,
                "parameters": next(iter(known["parameters"]), None),
                "test_acc": statistics.fmean(accuracies) if accuracies else None,
                "test_acc_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "published_test_acc": round(published[name] / 100, 6) if name in published else None,
                "seconds": statistics.fmean(known["seconds"]) if known["seconds"] else None,
                "peak_memory_bytes": max(known["peak_memory_bytes"], default=None),
                "seeds": runs,
            }
        )
    return rows


def write_comparison(results: dict[str, Any], folder: Path) -> None:
    """Writes `results.json`, `results.csv` and `results.md`, each whole or not at all.

    Args:
        results: `networks`, the rows of `compare`; `experiment`, `scale`, `seeds` and `failures`.
        folder: Where to.

    Raises:
        FusionError: They cannot be written.
    """
    write_results({**results, "versions": versions()}, folder / "results.json")
    for name, text in (("results.csv", _csv(results)), ("results.md", _markdown(results))):
        write_text(folder / name, text)


def print_comparison(results: dict[str, Any], folder: Path, report: bool = False) -> None:
    """Prints the table on standard output, and which files there are."""
    from rich.console import Console
    from rich.table import Table

    header, *lines = _cells(results)
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line, style="bold" if line[0].startswith("fused") else None)
    console = Console()
    console.print(table)
    more = ", report.html" if report else ""
    console.print(f"{folder / 'results.json'}, results.csv, results.md{more}", highlight=False, soft_wrap=True)


def _cells(results: dict[str, Any]) -> list[list[str]]:
    """The table in words, its header first; the column of published numbers only where there are some."""
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


def _word(value: Any, words: Any) -> str:
    return "–" if value is None else words(value)


def _markdown(results: dict[str, Any]) -> str:
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


def _csv(results: dict[str, Any]) -> str:
    """One line for each network and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "seed", *_MEASURED, "published_test_acc", *_COSTS])
    for row in results["networks"]:
        for seed, run in row["seeds"].items():
            measured, costs = ([run[key] for key in keys] for keys in (_MEASURED, _COSTS))
            writer.writerow([row["name"], seed, *measured, row["published_test_acc"], *costs])
    return text.getvalue()
