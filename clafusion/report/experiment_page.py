"""The report on an experiment: the table of all networks over all seeds, learning curves, and the fusions."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clafusion.report.charts import Interval, interval_chart, line_chart
from clafusion.report.fusion_page import Record, fusion_sections
from clafusion.report.html import Figure, Line, Report, document, render

#: By the name of a training, for each seed: by the name of a quantity its value after every epoch.
Curves = Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]]
#: Fusions drawn, at most: a grid may have hundreds, much alike.
_DRAWN = 8
#: The roles of networks that came of a fusion.
_FUSED = ("fused", "finetuned")
_QUANTITIES = {"val_acc": "validation accuracy", "train_loss": "training loss"}


@dataclass(frozen=True)
class NamedFusion:
    """A fusion of an experiment.

    Attributes:
        name: what people call it.
        file_name: the same as a part of a file's name.
        record: that `fuse` wrote.
    """

    name: str
    file_name: str
    record: Record


def experiment_page(results: Record, curves: Curves, fusions: Sequence[NamedFusion]) -> Report:
    """Return the report on an experiment as a document.

    Args:
        results: the content of `results.json`.
        curves: of the trainings to draw.
        fusions: to list; the first of them are drawn.

    Raises:
        KeyError, TypeError, ValueError: if the results are not of this form.
    """
    seeds, networks = results["seeds"], results["networks"]
    words = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    intervals = [_interval(row) for row in networks]
    published = any(row.published is not None for row in intervals)
    label = "; ".join(f"{row.name} {row.text}" for row in intervals)
    chart = interval_chart(intervals, f"Test accuracy of every network: {label}",
                           ("Orange: fused networks. Blue: controls.",))  # fmt: skip
    trainings = _trainings(curves, networks)
    parts = [(fusion, fusion_sections(fusion.record)) for fusion in fusions[:_DRAWN]]
    sections = render(
        "experiment_sections.html",
        chart=chart,
        published=published,
        full=results["scale"] == "full",
        header=["network", "test accuracy", *(["published"] if published else []), "parameters", "seconds", "peak MiB"],
        rows=[_cells(row, shown, published) for row, shown in zip(networks, intervals, strict=True)],
        trainings=trainings,
        fusions=[_cost(fusion) for fusion in fusions],
        drawn=[(fusion.name, part.html) for fusion, part in parts],
        failures=[(failure["stage"], failure["seed"], failure["reason"]) for failure in results.get("failures") or ()],
        versions=results.get("versions"),
    )
    title, subtitle = str(results["experiment"]), f"Experiment at {results['scale']} scale, {words}."
    figures = [chart, *(figure for charts in trainings for figure in charts)]
    figures += [replace(figure, prefix=f"{fusion.file_name}-") for fusion, part in parts for figure in part.figures]
    return Report(document(title, subtitle, _tiles(results), sections), tuple(figures))


def is_fused(row: Mapping[str, Any]) -> bool:
    """Whether a row of the results is that of a network that came of a fusion.

    Rows have had a role since the second version of these files; before, only their names told.
    """
    return row["role"] in _FUSED if "role" in row else str(row["name"]).partition(" ")[0] == "fused"


def _tiles(results: Record) -> list[tuple[str, str]]:
    """The most important numbers and what they are."""
    tiles = []
    for words, fused in (("best fused", True), ("best of the others", False)):
        rows = [row for row in results["networks"] if row["test_acc"] is not None and is_fused(row) == fused]
        if rows:
            best = max(rows, key=lambda row: row["test_acc"])
            tiles.append((f"{best['test_acc']:.2%}", f"{words}: {best['name']}"))
    return [*tiles, (str(len(results["seeds"])), "seeds"), (str(len(results["networks"])), "networks")]


def _interval(row: Record) -> Interval:
    return Interval(
        name=str(row["name"]),
        mean=_percent(row["test_acc"]),
        deviation=_percent(row["test_acc_std"]),
        published=_percent(row["published_test_acc"]),
        values=tuple(100 * run["test_acc"] for run in row["seeds"].values() if run["test_acc"] is not None),
        fused=is_fused(row),
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _cells(row: Record, shown: Interval, published: bool) -> list[str]:
    """A row of the table in words."""

    def word(value: Any, form: str) -> str:
        return "–" if value is None else format(value, form)

    memory = row["peak_memory_bytes"]
    return [
        shown.name,
        shown.text,
        *([word(shown.published, ".2f")] if published else []),
        word(row["parameters"], ","),
        word(row["seconds"], ".1f"),
        word(None if memory is None else memory / 2**20, ".0f"),
    ]


def _trainings(curves: Curves, networks: Sequence[Record]) -> list[list[Figure]]:
    """Draw the learning curves of each kind of training, whose losses are of one size; fused networks come first."""
    fused = {row["name"]: is_fused(row) for row in networks}
    names = sorted(curves, key=lambda name: (not fused.get(name, is_fused({"name": name})), name))
    kinds = sorted({name.rpartition(", ")[2] for name in names}, reverse=True)
    figures = [_charts({name: curves[name] for name in names if name.endswith(kind)}) for kind in kinds]
    return [charts for charts in figures if charts]


def _charts(curves: Curves) -> list[Figure]:
    """Draw one chart for each quantity; a training has one colour in all of them."""
    figures = []
    for key, name in _QUANTITIES.items():
        values = {training: [run[key] for run in runs if run.get(key)] for training, runs in curves.items()}
        lines = [
            Line(training, _means(runs), f"c{number % 7}")
            for number, (training, runs) in enumerate(values.items())
            if runs
        ]
        if lines:
            epochs = [f"epoch {epoch}" for epoch in range(max(len(line.values) for line in lines))]
            caption = (f"{name.capitalize()} by epoch",)
            figures.append(line_chart(lines, epochs, f"{name} by epoch", caption, name))
    return figures


def _means(runs: Sequence[Mapping[int, float]]) -> tuple[float | None, ...]:
    """The mean of what there is for each epoch, from the first one to the last."""
    epochs = [[run[epoch] for run in runs if epoch in run] for epoch in range(max(map(max, runs)) + 1)]
    return tuple(statistics.fmean(values) if values else None for values in epochs)


def _cost(fusion: NamedFusion) -> tuple[object, ...]:
    """The row of a fusion in the table of what they took."""
    record = fusion.record
    memory = record["peak_memory_bytes"] / 2**20
    return fusion.name, f"{record['seconds']:.2f}", f"{memory:.0f}", record["options"]["seed"]
