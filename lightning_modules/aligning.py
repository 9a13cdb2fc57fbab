"""`clafusion fuse --align_only true`: which layers correspond, and why, without fusing."""

import time
from typing import Any

import torch

from clafusion import FusionOptions, align_layers
from lightning_modules.checks import ImageData
from lightning_modules.fusing import check_number, load_alike, parents_of, seeds
from lightning_modules.results import versions


def align_checkpoints(
    paths: list[str], data: ImageData, options: FusionOptions, device: torch.device
) -> dict[str, Any]:
    """Aligns the layers of the networks of checkpoints, and measures the costs of every stage: of forced maps, too.

    Args:
        paths: Two or more checkpoints of fit or fuse, or files of save_network.
        data: Unlabelled training images.
        options: How to align.
        device: Where to compute.

    Returns:
        As plain containers the parents' checksums, the options, the map and the costs of every stage, seconds, seeds
        and versions.

    Raises:
        FusionError: The parents, the data and the options do not fit together.
    """
    check_number(paths)
    networks = load_alike(paths, data, "parents")
    batches = [batch.to(device) for batch in data.alignment_batches(options.num_samples, options.seed)]
    started = time.perf_counter()
    found = align_layers([network.to(device) for network in networks], batches, options)
    return {
        "parents": parents_of(paths),
        "options": options.to_dict(),
        **found.summary(),
        "seconds": time.perf_counter() - started,
        "seeds": seeds(options),
        "versions": versions(),
    }


def print_alignment(record: dict[str, Any]) -> None:
    """Prints for every parent and stage the map and the cost matrix, with the matched cells in bold.

    Args:
        record: What `align_checkpoints` returned.
    """
    from rich.console import Console

    console = Console()
    merging = record["options"]["balance"] == "merge"
    template = record["template"]
    for number, alignment in enumerate(record["alignments"]):
        if number == template:
            continue
        console.print(f"parent {number + 1} onto the depth of parent {template + 1}", style="bold")
        sides = (number, template) if merging else (template, number)
        rows, columns = (record["units"][side] for side in sides)
        for stage, places in enumerate(alignment):
            console.print(_matrix(record["layer_costs"][number][stage], rows[stage], columns[stage], places, stage + 1))
    for number, parent in enumerate(record["parents"], 1):
        console.print(f"parent {number}: {parent['path']}", highlight=False, soft_wrap=True)


def _matrix(costs: list[list[float]], rows: list[str], columns: list[str], places: list[int], number: int) -> Any:
    """One stage as a table: the deep network's units down, the shallow one's across."""
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
