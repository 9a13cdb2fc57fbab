"""What a fusion leaves behind for people and programs: a table and `fusion.json`."""

import json
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_modules.checkpoints import write_atomically

PACKAGES = ("clafusion", "torch", "pytorch-lightning", "torchmetrics", "POT", "scipy", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on the GPU if `device` is one, otherwise in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_results(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the results as JSON, whole or not at all.

    Raises:
        FusionError: The file cannot be written.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def print_results(results: dict[str, Any]) -> None:
    """Prints the results as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table("network", "test accuracy", "parameters")
    table.columns[1].justify = table.columns[2].justify = "right"
    for row in results["networks"]:
        style = "bold" if row["name"] == "fused" else None
        table.add_row(row["name"], f"{row['test_acc']:.2%}", f"{row['parameters']:,}", style=style)
    console = Console()
    console.print(table)
    for number, parent in enumerate(results["parents"], 1):
        console.print(f"parent {number}: {parent['path']}", highlight=False, soft_wrap=True)
    memory = results["peak_memory_bytes"] / 2**20
    console.print(
        f"{results['output']}: fused in {results['seconds']:.2f} s, peak memory {memory:.0f} MiB",
        highlight=False,
        soft_wrap=True,
    )
