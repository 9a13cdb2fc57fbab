"""The report on an experiment: the table of all networks over all seeds, and the courses of the trainings."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clafusion.report.charts import Line, interval_chart, legend, line_chart
from clafusion.report.fusion_page import fusion_sections
from clafusion.report.html import Safe, figure, folded, join, page, section, table, tag, tiles

#: By the name of a training, for each seed: by the name of a quantity its value after every epoch.
Courses = Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]]
#: By its name, what `fusion.json` of a fusion holds.
Fusions = Mapping[str, dict[str, Any]]
#: Fusions drawn, at most: a grid may have hundreds, much alike.
DRAWN = 8
_QUANTITIES = (("val_acc", "validation accuracy"), ("train_loss", "training loss"))


def experiment_page(results: dict[str, Any], courses: Courses, fusions: Fusions) -> str:
    """The report on an experiment.

    Args:
        results: the content of `results.json`.
        courses: of the trainings to draw.
        fusions: to draw.

    Returns:
        An HTML document.

    Raises:
        KeyError, TypeError, ValueError: if the results are not of this form.
    """
    seeds = results["seeds"]
    words = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    parts = [_tiles(results), _table(results), _courses(courses), _fusions(fusions), _failures(results),
             _made(results)]  # fmt: skip
    return page(str(results["experiment"]), f"Experiment at {results['scale']} scale, {words}.", *filter(None, parts))


def _tiles(results: dict[str, Any]) -> Safe:
    known = [row for row in results["networks"] if row["test_acc"] is not None]
    fused = [row for row in known if row["name"].startswith("fused")]
    others = [row for row in known if not row["name"].startswith("fused")]
    best = [(max(group, key=lambda row: row["test_acc"]), word)
            for group, word in ((fused, "best fused"), (others, "best of the others")) if group]  # fmt: skip
    values = [(f"{row['test_acc']:.2%}", f"{word}: {row['name']}") for row, word in best]
    return tiles([*values, (str(len(results["seeds"])), "seeds"), (str(len(results["networks"])), "networks")])


def _table(results: dict[str, Any]) -> Safe:
    networks = results["networks"]
    rows = [
        {
            "name": str(row["name"]),
            "mean": _percent(row["test_acc"]),
            "deviation": _percent(row["test_acc_std"]),
            "other": _percent(row["published_test_acc"]),
            "values": [100 * run["test_acc"] for run in row["seeds"].values() if run["test_acc"] is not None],
            "style": "fused" if row["name"].startswith("fused") else "control",
        }
        for row in networks
    ]
    published = any(row["other"] is not None for row in rows)
    cells = [_cells(row, shown, published) for row, shown in zip(networks, rows, strict=True)]
    header = ["network", "test accuracy", *(["published"] if published else []), "parameters", "seconds", "peak MiB"]
    about = "Test accuracy in percent: the mean over the seeds (large), one standard deviation to either side, and "
    about += "every seed (small). The axis need not begin at 0."
    if published:
        about += " A bar marks the published number"
        about += "." if results["scale"] == "full" else ", which is of the full scale: this one cannot be compared."
    label = "Test accuracy of every network: " + "; ".join(f"{row[0]} {row[1]}" for row in cells)
    chart = figure(interval_chart(rows, label), "Accent: fused networks; the others are controls.")
    numbers = table(list(header), cells)
    return section("Results", tag("p", about), tag("div", chart, tag("div", numbers), class_="charts"))


def _cells(row: dict[str, Any], shown: dict[str, Any], published: bool) -> list[object]:
    mean, deviation, other = shown["mean"], shown["deviation"], shown["other"]
    accuracy = "–" if mean is None else f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
    memory = row["peak_memory_bytes"]
    return [
        row["name"],
        accuracy,
        *(["–" if other is None else f"{other:.2f}"] if published else []),
        "–" if row["parameters"] is None else f"{row['parameters']:,}",
        "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
        "–" if memory is None else f"{memory / 2**20:.0f}",
    ]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _courses(courses: Courses) -> Safe | None:
    """Trainings of one kind share their pictures: the losses of others are of another size."""
    kinds = sorted({name.rpartition(", ")[2] for name in courses}, reverse=True)
    drawn = [_kind({name: runs for name, runs in courses.items() if name.endswith(kind)}) for kind in kinds]
    about = "Fused networks and their controls, trained for the same budget; the mean over the seeds after every epoch."
    found = [one for one in drawn if one]
    return section("Training", tag("p", about), *found) if found else None


def _kind(courses: Courses) -> Safe | None:
    drawn: list[Safe] = []
    shown: dict[str, Line] = {}
    for key, name in _QUANTITIES:
        lines = []
        for number, (training, runs) in enumerate(courses.items()):
            found = [run[key] for run in runs if run.get(key)]
            if found:
                lines.append(Line(training, _means(found), f"c{number % 7}"))
        if lines:
            longest = max(len(line.values) for line in lines)
            epochs = [f"epoch {epoch}" for epoch in range(longest)]
            drawn.append(figure(line_chart(lines, epochs, f"{name} by epoch", name), f"{name.capitalize()} by epoch"))
            shown |= {line.name: line for line in lines}
    return join([legend(list(shown.values())), tag("div", *drawn, class_="charts")]) if drawn else None


def _means(runs: Sequence[Mapping[int, float]]) -> list[float | None]:
    """The mean of what there is for each epoch, from the first one to the last."""
    found = [[run[epoch] for run in runs if epoch in run] for epoch in range(max(map(max, runs)) + 1)]
    return [statistics.fmean(values) if values else None for values in found]


def _fusions(fusions: Fusions) -> Safe | None:
    if not fusions:
        return None
    rows = [
        [name, f"{record['seconds']:.2f}", f"{record['peak_memory_bytes'] / 2**20:.0f}", record["options"]["seed"]]
        for name, record in fusions.items()
    ]
    drawn = [folded(f"{name}: layers, neurons, features, options, checksums", join(fusion_sections(record)))
             for name, record in list(fusions.items())[:DRAWN]]  # fmt: skip
    about = "What every fusion took, and how it came about, for the first seed that has one."
    if len(fusions) > DRAWN:
        about += f" The first {DRAWN} of {len(fusions)} are drawn; clafusion report draws any from its fusion.json."
    numbers = table(["fusion", "seconds", "peak MiB", "seed of its samples"], rows)
    return section("Fusions", tag("p", about), numbers, *drawn)


def _failures(results: dict[str, Any]) -> Safe | None:
    if not results.get("failures"):
        return None
    rows = [[one["stage"], one["seed"], one["reason"]] for one in results["failures"]]
    return section("What failed", table(["stage", "seed", "reason"], rows, 9))


def _made(results: dict[str, Any]) -> Safe | None:
    if not results.get("versions"):
        return None
    rows = [[name, tag("code", str(value))] for name, value in results["versions"].items()]
    return section("How it was made", folded("Versions", table(["package", "version"], rows, 9)))
