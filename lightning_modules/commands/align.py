"""The corresponding layers of the networks of checkpoints: `clafusion fuse --align_only`."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from clafusion import FusionOptions, align_layers
from clafusion.fusion.record import AlignmentRecord, parent_names
from clafusion.lightning_modules.commands.naming import file_names
from clafusion.lightning_modules.commands.records import circumstances, parent_files, seeds, versions
from clafusion.lightning_modules.compatibility import ImageData, load_parents
from clafusion.naming import named_parents
from clafusion.teachers.label_sets import Label


def align_checkpoints(
    paths: list[str],
    data: ImageData,
    options: FusionOptions,
    device: torch.device,
    classes: Sequence[Sequence[Label]] | None = None,
) -> AlignmentRecord:
    """Align the layers of the networks of checkpoints, and measure the costs of every stage: of forced maps, too.

    Args:
        paths: Two or more checkpoints of fit or fuse, or files of save_network.
        data: Unlabelled training images.
        options: How to align.
        device: Where to compute.
        classes: Per parent the labels that its outputs stand for; None: as the files say.

    Returns:
        The map and the costs of every stage, and how they were found.

    Raises:
        FusionError: The parents, the data and the options do not fit together.
    """
    names = file_names(paths)
    options = options.for_parents(names, paths)
    with named_parents(names):
        networks, _ = load_parents(paths, data, classes)
        batches = [batch.to(device) for batch in data.alignment_batches(options.num_samples, options.seed)]
        started = time.perf_counter()
        found = align_layers([network.to(device) for network in networks], batches, options)
    record = {
        "parents": parent_files(paths, names),
        "options": options.to_dict(),
        **found.summary(),
        "seconds": time.perf_counter() - started,
        **circumstances(device, data),
        "seeds": seeds(options),
        "versions": versions(),
    }
    return cast(AlignmentRecord, record)


def print_alignment(record: AlignmentRecord) -> None:
    """Print for every parent and stage the map and the cost matrix, with the matched cells in bold.

    Args:
        record: What `align_checkpoints` returned.
    """
    from rich.console import Console

    console = Console()
    merging = record["options"]["balance"] == "merge"
    template, names = record["template"], parent_names(record)
    for number, alignment in enumerate(record["alignments"]):
        if number == template:
            continue
        console.print(f"{names[number]} onto the depth of {names[template]}", style="bold", markup=False)
        sides = (number, template) if merging else (template, number)
        rows, columns = (record["units"][side] for side in sides)
        for stage, places in enumerate(alignment):
            console.print(_matrix(record["layer_costs"][number][stage], rows[stage], columns[stage], places, stage + 1))
    for name, parent in zip(names, record["parents"], strict=True):
        console.print(f"{name}: {parent['path']}", highlight=False, markup=False, soft_wrap=True)


def _matrix(costs: list[list[float]], rows: list[str], columns: list[str], places: list[int], number: int) -> Any:
    """Return one stage as a table: the deep network's units down, the shallow one's across."""
    from rich.table import Table

    shown = ", ".join(f"{columns[k]} = {rows[row]}" for k, row in enumerate(places))
    table = Table(f"stage {number}", *columns, caption=shown, caption_justify="left", title_justify="left")
    for row, values in enumerate(costs):
        cells = [
            f"[bold]{value:.3f}[/bold]" if places[column] == row else f"{value:.3f}"
            for column, value in enumerate(values)
        ]
        table.add_row(rows[row], *cells)
    return table
