"""What a fusion leaves behind for people and programs: a table and `fusion.json`."""

import json
import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_modules.checkpoints import write_text

PACKAGES = ("clafusion", "torch", "pytorch-lightning", "torchmetrics", "POT", "scipy", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far, or since `reset_peak_memory`.

    On the GPU if `device` is one, otherwise in main memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` count from now on, where the system allows it (CUDA, Linux); else it goes on counting."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            # Linux: the high-water mark of this process becomes what it holds now.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def as_json(results: dict[str, Any]) -> str:
    """The results as JSON, for people to read as well."""
    return json.dumps(results, indent=2, allow_nan=False) + "\n"


def write_results(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the results as JSON, whole or not at all.

    Raises:
        FusionError: The file cannot be written.
    """
    write_text(path, as_json(results))


def print_networks(networks: list[dict[str, Any]]) -> None:
    """Prints name, test accuracy and parameters of networks as a table on standard output, the last one in bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table("network", "test accuracy", "parameters")
    table.columns[1].justify = table.columns[2].justify = "right"
    for number, row in enumerate(networks, 1):
        style = "bold" if number == len(networks) else None
        table.add_row(row["name"], f"{row['test_acc']:.2%}", f"{row['parameters']:,}", style=style)
    Console().print(table)


def print_results(results: dict[str, Any]) -> None:
    """Prints the results as a table on standard output."""
    from rich.console import Console

    print_networks(results["networks"])
    console = Console()
    for number, parent in enumerate(results["parents"], 1):
        console.print(f"parent {number}: {parent['path']}", highlight=False, soft_wrap=True)
    memory = results["peak_memory_bytes"] / 2**20
    console.print(
        f"{results['output']}: fused in {results['seconds']:.2f} s, peak memory {memory:.0f} MiB",
        highlight=False,
        soft_wrap=True,
    )
    if "report" in results:
        page = Path(results["output"]).parent / "report.html"
        console.print(f"{page}: all of it to look at", highlight=False, soft_wrap=True)
