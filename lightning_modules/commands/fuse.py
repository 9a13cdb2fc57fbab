"""From checkpoints to one fused network, with the record of how it came about."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions, align_layers, fuse
from clafusion.errors import FusionError
from clafusion.lightning_modules.commands.records import peak_memory, versions
from clafusion.lightning_modules.compatibility import ImageData, load_alike
from clafusion.lightning_modules.files import sha256
from clafusion.report.measurements import SAMPLES
from clafusion.report.pages import line_accuracies, report_data
from clafusion.statistics.samples import collect


@dataclass(frozen=True)
class Fused:
    """What `fuse_checkpoints` made; networks and samples are on the device that was asked for.

    Attributes:
        parents: as they were loaded.
        fusion: what `fuse` made of them.
        record: as plain containers the parents' checksums, the options, alignment, costs, seconds, memory, seeds and
            versions.
        batches: the samples that were measured on.
    """

    parents: list[nn.Module]
    fusion: Fusion
    record: dict[str, Any]
    batches: list[Tensor]


def fuse_checkpoints(paths: list[str], data: ImageData, options: FusionOptions, device: torch.device) -> Fused:
    """Fuses the networks of checkpoints.

    Args:
        paths: Two or more checkpoints of fit or fuse, or files of save_network.
        data: Unlabelled training images.
        options: How to fuse.
        device: Where to compute.

    Returns:
        The networks, the samples, and how it came about.

    Raises:
        FusionError: The parents, the data and the options do not fit together.
    """
    check_number(paths)
    networks = load_alike(paths, data, "parents")
    batches = list(data.alignment_batches(options.num_samples, options.seed))

    started = time.perf_counter()
    batches = [batch.to(device) for batch in batches]
    result = fuse([network.to(device) for network in networks], batches, options)
    record = {
        "parents": parents_of(paths),
        **result.summary(),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(device),
        "seeds": seeds(options),
        "versions": versions(),
    }
    return Fused(networks, result, record, batches)


def check_number(paths: list[str]) -> None:
    """Refuses fewer than two parents.

    Raises:
        FusionError: There are fewer.
    """
    if len(paths) < 2:
        raise FusionError(f"Expected two or more parents, got {len(paths)}; name them, such as a.ckpt b.ckpt")


def parents_of(paths: list[str]) -> list[dict[str, str]]:
    """The parents' files with their checksums."""
    return [{"path": path, "sha256": sha256(path)} for path in paths]


def seeds(options: FusionOptions) -> dict[str, int]:
    """The seeds that a result depends on."""
    return {"fusion": options.seed, "global": int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))}


def drawn(fused: Fused, data: ImageData) -> dict[str, Any]:
    """What the report shows beyond the other figures of `fusion.json`.

    Args:
        fused: What `fuse_checkpoints` returned; its samples are used again.
        data: The images; where it has validation images, their accuracy along the line between the parents is shown.
    """
    found = report_data(fused.fusion, collect(fused.batches, SAMPLES))
    labelled = list(_labelled(data, fused.batches[0].device))
    if sum(len(labels) for _, labels in labelled) > 1:
        images, labels = (torch.cat(parts) for parts in zip(*labelled, strict=True))
        found["line"] = line_accuracies(fused.fusion, images, labels)
    return found


def _labelled(data: ImageData, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The first validation images, as many as are looked at, with their labels."""
    missing = SAMPLES
    for images, labels in getattr(data, "validation_batches", lambda: ())():
        if missing <= 0:
            return
        yield images[:missing].to(device), labels[:missing].to(device)
        missing -= len(labels)


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
