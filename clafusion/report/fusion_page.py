"""The report on one fusion, from what `fusion.json` holds."""

from typing import Any

from clafusion.report.charts import Line, alignment, heat_map, legend, line_chart, pixels
from clafusion.report.html import Safe, figure, folded, join, meter, page, section, table, tag, tiles

Record = dict[str, Any]
#: Layers of a stage, at most: a file may claim what it likes.
_DEEPEST = 10_000


def fusion_page(record: Record) -> str:
    """The report on one fusion.

    Args:
        record: `Fusion.summary()`; with `report` (of `report_data`), `networks`, `parents`, `seconds`,
            `peak_memory_bytes`, `seeds` and `versions` where they are known.

    Returns:
        An HTML document.

    Raises:
        KeyError, TypeError, ValueError, IndexError: if the record is not of this form.
    """
    count = len(record["alignments"])
    subtitle = f"{count} networks became one: parent {record['template'] + 1} gave the depth, "
    subtitle += f"parent {record['options']['anchor'] + 1} the neurons."
    if "transport_costs" not in record:
        subtitle = f"The layers of {count} networks; nothing was fused."
    return page("CLAFusion report", subtitle, _tiles(record), *fusion_sections(record))


def fusion_sections(record: Record) -> list[Safe]:
    """The parts of the report on one fusion; `fusion_page` says what the record is."""
    parts = [_results(record), _layers(record), _costs(record), _maps(record), _features(record), _line(record),
             _made(record)]  # fmt: skip
    return [part for part in parts if part]


def _tiles(record: Record) -> Safe:
    rows = record.get("networks") or []
    values = [(f"{row['test_acc']:.2%}", row["name"]) for row in rows if row["name"] == "fused"]
    parents = [row["test_acc"] for row in rows if row["name"].startswith("parent ")]
    if parents:
        values.append((f"{max(parents):.2%}", "best parent"))
    values += [(f"{row['test_acc']:.2%}", "their ensemble") for row in rows if row["name"] == "ensemble"]
    if "parameters" in record:
        values.append((f"{record['parameters']:,}", "parameters"))
    if "seconds" in record:
        values.append((f"{record['seconds']:.2f} s", f"to fuse, {record['num_samples']} samples"))
    if "peak_memory_bytes" in record:
        values.append((f"{record['peak_memory_bytes'] / 2**20:.0f} MiB", "peak memory"))
    return tiles(values)


def _results(record: Record) -> Safe | None:
    rows = record.get("networks")
    if not rows:
        return None
    cells: list[list[object]] = [
        [row["name"], f"{row['test_acc']:.2%}", f"{row['parameters']:,}", meter(row["test_acc"])] for row in rows
    ]
    fused = next((at for at, row in enumerate(rows) if row["name"] == "fused"), None)
    about = "On the test images, before any finetuning. The bars begin at 0 %."
    return section("Results", tag("p", about), table(["network", "test accuracy", "parameters", ""], cells, 1, fused))


def _others(record: Record) -> list[int]:
    return [k for k in range(len(record["alignments"])) if k != record["template"]]


def _units(record: Record, k: int, partners: list[list[int]]) -> list[list[str]]:
    """The layers of a parent, stage by stage, by name; where the record does not name them, by number."""
    if "report" in record:
        return [[f"{u['name']} · {u['neurons']}" for u in stage] for stage in record["report"]["units"][k]]
    if "units" in record:
        return [[str(name) for name in stage] for stage in record["units"][k]]
    return [[str(number + 1) for number in range(len(stage))] for stage in partners]


def _sides(record: Record, k: int) -> tuple[list[list[str]], list[list[str]], list[list[int]]]:
    """The layers of the deeper and of the shallower network of a pair, and which correspond."""
    pairs = record["alignments"][k]
    template = _units(record, record["template"], record["alignments"][record["template"]])
    if record["options"]["balance"] == "insert":
        return template, _units(record, k, pairs), pairs
    parent = _units(record, k, pairs)
    for stage, partners in zip(parent, pairs, strict=True):
        if max(partners, default=0) >= _DEEPEST:
            raise ValueError(f"a stage of {max(partners)} layers")
        stage += [str(number) for number in range(len(stage) + 1, max(partners, default=0) + 2)]
    return parent, template, pairs


def _layers(record: Record) -> Safe:
    merging = record["options"]["balance"] == "merge"
    drawn = []
    for k in _others(record):
        names = (f"parent {record['template'] + 1}", f"parent {k + 1}")
        deep, shallow, pairs = _sides(record, k)
        lone = "merged" if merging else "inserted"
        label = f"Layers of {names[0]} and {names[1]} that correspond"
        shown = alignment(deep, shallow, pairs, names[::-1] if merging else names, lone, label)
        drawn.append(figure(shown, f"{label}: {sum(map(len, pairs))} of {sum(map(len, deep))}."))
    about = "Bands are stages; the number beside a layer is that of its neurons. "
    about += (
        "A dashed layer has no partner: it was merged into the next one that has."
        if merging
        else "A dashed layer has no partner: the shallower network was given an identity in its place."
    )
    return section("Which layers correspond", tag("p", about), tag("div", *drawn, class_="grids"))


def _costs(record: Record) -> Safe | None:
    drawn = []
    for k in _others(record):
        for number, cost in enumerate(record["layer_costs"][k]):
            if cost is None or not cost or len(cost) == len(cost[0]) == 1:
                continue
            path = [(row, column) for column, row in enumerate(record["alignments"][k][number])]
            total = sum(cost[row][column] for row, column in path)
            label = f"Layer costs of stage {number + 1}, parent {k + 1}: rows deep, columns shallow"
            caption = join([tag("b", f"Stage {number + 1}, parent {k + 1}. "), f"Chosen path: {total:.4f} in all."])
            drawn.append(figure(heat_map(cost, path, label), caption))
    measure = record["options"]["layer_measure"]
    if not drawn:
        about = "In every stage the map was forced (equal depth, or pinned layers): nothing had to be measured."
        return section("What layers cost to match", tag("p", about))
    about = f"How unlike two layers are ({measure}); rows are layers of the deeper network, columns of the shallower "
    about += "one. The fuller the colour, the less alike; framed are the pairs that were chosen."
    return section("What layers cost to match", tag("p", about), tag("div", *drawn, class_="grids"))


def _maps(record: Record) -> Safe | None:
    pictures = record.get("report", {}).get("maps", [{} for _ in record["alignments"]])
    parts = []
    for k, costs in enumerate(record.get("transport_costs", [])):
        if not costs:
            continue
        drawn = [_map(record, k, space, float(cost), pictures[k].get(space)) for space, cost in costs.items()]
        parts.append(join([tag("h3", f"Parent {k + 1}"), tag("div", *drawn, class_="maps")]))
    if not parts:
        return None
    about = "How the neurons of a parent (rows) are carried onto those of the result (columns), one picture for every "
    about += "set of neurons. Rows are sorted by the neuron that most of each goes to: a clean diagonal is a map from "
    about += "one neuron to one; “mixes” is how many of the parent's neurons make up one of the result's."
    return section("Where neurons go", tag("p", about), *parts)


def _map(record: Record, k: int, space: str, cost: float, picture: Record | None) -> Safe:
    options = record["options"]
    direct = options["cost"] in ("correlation", "cosine") and options["normalize"] == "none"
    like = direct and options["solver"] in ("exact", "sinkhorn")
    numbers = [f"cost {cost:.4f}", *([f"{options['cost']} {1 - cost:.4f}"] if like else [])]
    if picture is None:
        return figure(Safe(""), join([tag("b", space), *(tag("div", one) for one in numbers)]))
    rows, columns = picture["shape"]
    label = f"Map of {space}, parent {k + 1}: {rows} to {columns} neurons"
    numbers = [f"{rows} → {columns}, mixes {picture['mixes']:.2f}", *numbers]
    return figure(pixels(picture, label), join([tag("b", space), *(tag("div", one) for one in numbers)]))


def _features(record: Record) -> Safe | None:
    found = record.get("report", {}).get("diagnosis")
    if not found:
        return None
    correction, layers = record["options"]["correction"], found["layers"]
    drawn, rows = [], []
    shown: list[Line] = []
    for k, parent in enumerate(found["parents"]):
        steps = {f"after {correction}" if parent["before"] else "fused": (parent["after"], "after")}
        if parent["before"]:
            steps = {"averaged": (parent["before"], "before"), **steps}
        for key, name in (("variance_ratio", "variance ratio"), ("cka", "linear CKA")):
            lines = [Line(step, values[key], style) for step, (values, style) in steps.items()]
            shown = shown or lines
            label = f"{name} of the fused network to parent {k + 1}, layer by layer"
            chart = line_chart(lines, layers, label, name, logarithmic=key == "variance_ratio")
            drawn.append(figure(chart, join([tag("b", f"Parent {k + 1}: "), name])))
        for at, layer in enumerate(layers):
            values = [one[key][at] for key in ("variance_ratio", "cka") for one, _ in steps.values()]
            rows.append([f"parent {k + 1}", layer, *("–" if value is None else f"{value:.4g}" for value in values)])
    about = f"Features before each activation on {found['samples']} of the samples. Averaging networks that agree only "
    about += "in part shrinks the variance (ratio below 1), and their features drift from the parents' (CKA below 1); "
    about += "the correction is there to make up for it. Layers that a parent does not have are left out."
    header = ["", "layer", *(f"{name}, {line.name}" for name in ("variance ratio", "CKA") for line in shown)]
    grid = tag("div", *drawn, class_="charts")
    numbers = folded("The same in numbers", table(list(header), rows, 2))
    return section("What became of the features", tag("p", about), legend(shown), grid, numbers)


def _line(record: Record) -> Safe | None:
    found = record.get("report", {}).get("line")
    if not found:
        return None
    anchor, shares = record["options"]["anchor"] + 1, found["shares"]
    drawn, shown = [], []
    for k, accuracies in found["accuracies"].items():
        shown = [
            Line("averaged, not corrected", [100 * float(value) for value in accuracies], "before"),
            Line("the fused network", [100 * float(found["fused"])] * len(shares), "after flat"),
        ]
        names = {0: f"parent {anchor}", 1: f"parent {int(k) + 1}"}
        places = [names.get(share, f"{share:.0%} parent {int(k) + 1}") for share in shares]
        label = f"Accuracy along the line from parent {anchor} to parent {int(k) + 1}"
        drawn.append(figure(line_chart(shown, places, label, "accuracy, %"), f"{label}."))
    about = f"Accuracy on {found['samples']} validation images of the weighted averages of parent {anchor} and another "
    about += "one, moved onto its neurons. The deeper the valley between the ends, the more averaging alone broke, "
    about += "and the correction had to mend."
    return section("Between the parents", tag("p", about), legend(shown), tag("div", *drawn, class_="charts"))


def _made(record: Record) -> Safe:
    parts = []
    if record.get("parents"):
        shares = record.get("weights", [])
        rows = [[at + 1, tag("code", p["path"]), f"{shares[at]:.4g}" if shares else "–", tag("code", p["sha256"])]
                for at, p in enumerate(record["parents"])]  # fmt: skip
        parts.append(folded("Parents and their checksums", table(["parent", "file", "weight", "SHA-256"], rows, 9)))
    for key, title in (("options", "Options"), ("versions", "Versions"), ("seeds", "Seeds")):
        if record.get(key):
            rows = [[name, tag("code", str(value))] for name, value in record[key].items()]
            parts.append(folded(title, table([title.lower(), "value"], rows, 9)))
    return section("How it was made", *parts)
