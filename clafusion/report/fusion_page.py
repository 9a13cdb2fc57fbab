"""The report on one fusion, from what its record holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clafusion.fusion.record import in_percent, parent_names, role_of, shown_name
from clafusion.report.charts import heat_map, layer_pairs, line_chart, neuron_map
from clafusion.report.html import Figure, Line, Report, document, render

Record = Mapping[str, Any]
#: Layers of a stage, at most: a file may claim what it likes.
_DEEPEST = 10_000
_CANDIDATES = {
    "anchor": "the anchor's hidden layers, with a new output layer",
    "matched": "the anchor's neurons, each with what is like it in the other parents",
    "matched, equal": "likewise, with all parents at their weights",
    "union": "neurons chosen among those of all parents",
    "centroids": "means of similar neurons of all parents",
}
_MEASURES = {"variance_ratio": "variance ratio", "cka": "linear CKA"}


def fusion_page(record: Record) -> Report:
    """Return the report on one fusion as a document.

    Args:
        record: `Fusion.summary()`; with `report` (of `report_data`), `networks`, `parents`, `seconds`,
            `peak_memory_bytes`, `seeds` and `versions` where they are known.

    Raises:
        KeyError, TypeError, ValueError, IndexError: if the record is not of this form.
    """
    count, names = len(record["alignments"]), parent_names(record)
    subtitle = f"{count} networks became one: {names[record['template']]} gave the depth, "
    subtitle += f"{names[record['options']['anchor']]} the neurons."
    if "transport_costs" not in record:
        subtitle = f"The layers of {count} networks; nothing was fused."
    part = fusion_sections(record)
    return Report(document("CLAFusion report", subtitle, _tiles(record), part.html), part.figures)


def fusion_sections(record: Record) -> Report:
    """Return the report on one fusion as a part of a document; `fusion_page` says what the record is."""
    figures = _Figures(_layers(record), _costs(record), _maps(record), _features(record), _line(record))
    html = render(
        "fusion_sections.html",
        figures=figures,
        options=record["options"],
        networks=_networks(record),
        anchor=parent_names(record)[record["options"]["anchor"]],
        chosen=record.get("chosen"),
        candidates=_candidates(record),
        trusted=_trusted(record),
        report=record.get("report"),
        numbers=_numbers(record) if figures.features else None,
        parents=_parents(record),
        settings={
            "When and where": {name: record[name] for name in ("date", "host", "device", "data") if name in record},
            **{name.capitalize(): record.get(name) for name in ("options", "versions", "seeds")},
        },
    )
    return Report(html, figures.all)


@dataclass(frozen=True)
class _Figures:
    """The figures of each section; those of the maps by the name of the parent."""

    layers: list[Figure]
    costs: list[Figure]
    maps: dict[str, list[Figure]]
    features: list[Figure]
    line: list[Figure]

    @property
    def all(self) -> tuple[Figure, ...]:
        maps = [figure for figures in self.maps.values() for figure in figures]
        return *self.layers, *self.costs, *maps, *self.features, *self.line


def _tiles(record: Record) -> list[tuple[str, str]]:
    """The most important numbers and what they are."""
    rows = record.get("networks") or []
    tiles = [(f"{row['test_acc']:.2%}", row["name"]) for row in rows if role_of(row) == "fused"]
    parents = [row for row in rows if role_of(row) == "parent"]
    if parents:
        best = max(parents, key=lambda row: row["test_acc"])
        tiles.append((f"{best['test_acc']:.2%}", f"best parent, {best['name']}"))
    tiles += [(f"{row['test_acc']:.2%}", "their ensemble") for row in rows if row["name"] == "ensemble"]
    if "parameters" in record:
        tiles.append((f"{record['parameters']:,}", "parameters"))
    if "seconds" in record:
        tiles.append((f"{record['seconds']:.2f} s", f"to fuse, {record['num_samples']} samples"))
    if "peak_memory_bytes" in record:
        tiles.append((f"{record['peak_memory_bytes'] / 2**20:.0f} MiB", "peak memory"))
    return tiles


def _networks(record: Record) -> list[dict[str, Any]]:
    """Name, accuracy and parameters of each network, and whether it is the result."""
    return [
        {
            **row,
            "name": shown_name(row, len(record.get("classes") or ())),
            "accuracy": in_percent(row),
            "fused": role_of(row) == "fused",
        }
        for row in record.get("networks") or ()
    ]


def _candidates(record: Record) -> list[tuple[object, ...]]:
    """Name, meaning and divergence of each network that was tried, and whether it was kept."""
    return [
        (name, _CANDIDATES.get(name, ""), f"{float(score):.4f}", "kept" if name == record["chosen"] else "")
        for name, score in (record.get("candidates") or {}).items()
    ]


def _trusted(record: Record) -> list[tuple[object, ...]]:
    """Name and mean share of each parent, where a gate gave every sample its own shares."""
    if record.get("teacher") != "gated":
        return []
    return [(name, f"{float(share):.1%}") for name, share in zip(parent_names(record), record["trust"], strict=True)]


def _parents(record: Record) -> list[tuple[object, ...]]:
    """Name, file, weight and checksum of each parent."""
    weights, names = record.get("weights"), parent_names(record)
    return [
        (names[k], parent["path"], f"{weights[k]:.4g}" if weights else "–", parent["sha256"])
        for k, parent in enumerate(record.get("parents") or [])
    ]


def _others(record: Record) -> list[int]:
    """The numbers of the parents that were aligned to the template."""
    return [k for k in range(len(record["alignments"])) if k != record["template"]]


def _units(record: Record, k: int) -> list[list[str]]:
    """The layers of a parent, stage by stage, by name; where the record does not name them, by number."""
    if "report" in record:
        return [[f"{u['name']} · {u['neurons']}" for u in stage] for stage in record["report"]["units"][k]]
    if "units" in record:
        return [[str(name) for name in stage] for stage in record["units"][k]]
    return [[str(number + 1) for number in range(len(stage))] for stage in record["alignments"][k]]


def _layers(record: Record) -> list[Figure]:
    template, merging = record["template"], record["options"]["balance"] == "merge"
    called, figures = parent_names(record), []
    for k in _others(record):
        pairs = record["alignments"][k]
        deep, shallow = (k, template) if merging else (template, k)
        layers = _units(record, deep)
        if merging:
            # Without names only the partners tell how deep the parent is.
            for stage, partners in zip(layers, pairs, strict=True):
                if max(partners, default=0) >= _DEEPEST:
                    raise ValueError(f"a stage of {max(partners)} layers")
                stage += [str(number) for number in range(len(stage) + 1, max(partners, default=0) + 2)]
        label = f"Layers of {called[template]} and {called[k]} that correspond"
        caption = f"{label}: {sum(map(len, pairs))} of {sum(map(len, layers))}."
        names = (called[deep], called[shallow])
        lone = "merged" if merging else "inserted"
        figures.append(layer_pairs(layers, _units(record, shallow), pairs, names, lone, label, (caption,)))
    return figures


def _costs(record: Record) -> list[Figure]:
    """The costs of every stage whose map was not forced."""
    names, figures = parent_names(record), []
    for k in _others(record):
        for number, cost in enumerate(record["layer_costs"][k]):
            if cost is None or not cost or len(cost) == len(cost[0]) == 1:
                continue
            path = [(row, column) for column, row in enumerate(record["alignments"][k][number])]
            total = sum(cost[row][column] for row, column in path)
            label = f"Layer costs of stage {number + 1}, {names[k]}: rows deep, columns shallow"
            caption = (f"Stage {number + 1}, {names[k]}. ", f"Chosen path: {total:.4f} in all.")
            figures.append(heat_map(cost, path, label, caption))
    return figures


def _maps(record: Record) -> dict[str, list[Figure]]:
    """The maps of every parent that was moved, by its name."""
    pictures = record.get("report", {}).get("maps", [{} for _ in record["alignments"]])
    names = parent_names(record)
    return {
        names[k]: [_map(record, k, space, float(cost), pictures[k].get(space)) for space, cost in costs.items()]
        for k, costs in enumerate(record.get("transport_costs", []))
        if costs
    }


def _map(record: Record, k: int, space: str, cost: float, picture: Record | None) -> Figure:
    """The map of one set of neurons; older records have no picture of it, but numbers."""
    options = record["options"]
    direct = options["cost"] in ("correlation", "cosine") and options["normalize"] == "none"
    like = direct and options["solver"] in ("exact", "sinkhorn")
    numbers = [f"cost {cost:.4f}", *([f"{options['cost']} {1 - cost:.4f}"] if like else [])]
    if picture is None:
        return Figure("", (space, *numbers), 0, 0)
    rows, columns = picture["shape"]
    numbers = [f"{rows} → {columns}, mixes {picture['mixes']:.2f}", *numbers]
    label = f"Map of {space}, {parent_names(record)[k]}: {rows} to {columns} neurons"
    return neuron_map(picture, label, (space, *numbers))


def _steps(record: Record, parent: Record) -> list[tuple[str, Record, str]]:
    """Return the controls of a parent's features, each with its name, values and style."""
    if not parent["before"]:
        return [("fused", parent["after"], "after")]
    correction = record["options"]["correction"]
    return [("averaged", parent["before"], "before"), (f"after {correction}", parent["after"], "after")]


def _features(record: Record) -> list[Figure]:
    diagnosis = record.get("report", {}).get("diagnosis")
    if not diagnosis:
        return []
    figures = []
    for name_of, parent in zip(parent_names(record), diagnosis["parents"], strict=True):
        for key, name in _MEASURES.items():
            lines = [Line(step, tuple(values[key]), style) for step, values, style in _steps(record, parent)]
            label = f"{name} of the fused network to {name_of}, layer by layer"
            caption = (f"{name_of}: ", name)
            figures.append(line_chart(lines, diagnosis["layers"], label, caption, name, key == "variance_ratio"))
    return figures


def _numbers(record: Record) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of what the charts of the features show."""
    diagnosis = record["report"]["diagnosis"]
    steps = [_steps(record, parent) for parent in diagnosis["parents"]]
    header = ["", "layer", *(f"{name}, {step}" for name in ("variance ratio", "CKA") for step, _, _ in steps[0])]
    rows = []
    for called, parent in zip(parent_names(record), steps, strict=True):
        for at, layer in enumerate(diagnosis["layers"]):
            values = [measures[key][at] for key in _MEASURES for _, measures, _ in parent]
            rows.append([called, layer, *("–" if value is None else f"{value:.4g}" for value in values)])
    return header, rows


def _line(record: Record) -> list[Figure]:
    line = record.get("report", {}).get("line")
    if not line:
        return []
    names, figures = parent_names(record), list[Figure]()
    anchor = names[record["options"]["anchor"]]
    for k, accuracies in line["accuracies"].items():
        other = names[int(k)]
        lines = [
            Line("averaged, not corrected", tuple(100 * float(value) for value in accuracies), "before"),
            Line("the fused network", (100 * float(line["fused"]),) * len(line["shares"]), "after flat"),
        ]
        ends = {0: anchor, 1: other}
        positions = [ends.get(share, f"{share:.0%} {other}") for share in line["shares"]]
        label = f"Accuracy along the line from {anchor} to {other}"
        figures.append(line_chart(lines, positions, label, (f"{label}.",), "accuracy, %"))
    return figures
