"""What a fusion leaves behind for people and programs: a table and `fusion.json`."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from clafusion.errors import FusionError
from clafusion.formats.atomic import Writer
from clafusion.lightning import LightningDataModule, Trainer
from clafusion.lightning_modules.checkpoints.writing import checkpoint_of
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.files import write_atomically, write_text
from clafusion.lightning_modules.progress import Step

PACKAGES = ("clafusion", "torch", "pytorch-lightning", "torchmetrics", "POT", "scipy", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held so far, or since `reset_peak_memory`.

    On the GPU if `device` is one, otherwise in main memory; 0 where the system does not count them (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
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


def check_output(output: str, suffixes: Sequence[str] = (".ckpt",)) -> Path:
    """Refuses an output whose name or folder would not do at the end.

    Raises:
        FusionError: It is no local file with one of the suffixes, or its folder cannot be written.
    """
    path = Path(output)
    if path.suffix not in suffixes or "://" in output:
        names = " or ".join(f"NAME{suffix}" for suffix in suffixes)
        raise FusionError(f"Expected a local output file named {names}, got {output}; change --output")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise FusionError(f"Expected a folder that can be written, got {path.parent}; create it or change --output")
    return path


def check_new(files: Iterable[Path], overwrite: bool) -> None:
    """Refuses to replace files unasked.

    Raises:
        FusionError: One of them exists and may not be overwritten, or is a folder.
    """
    for file in files:
        if file.is_dir() or (file.exists() and not overwrite):
            raise FusionError(
                f"Expected to write a new file, got {file}, which exists; give --overwrite, or a new folder"
            )


def check_empty(model: ImageClassifier) -> None:
    """Refuses a module that has a network already, where the command is to make it one.

    Raises:
        FusionError: It has.
    """
    if model.network is not None:
        raise FusionError("Expected no model architecture to fuse into, got one; leave out --model.architecture")


def prepared(classifier: ImageClassifier, network: nn.Module, record: dict[str, Any] | None) -> Writer:
    """What writes a network as an ordinary checkpoint; the arguments are those of `save_as`."""
    classifier.set_network(network.cpu())
    classifier.fusion = record
    content = checkpoint_of(classifier)
    return lambda file: torch.save(content, file)


def save_as(classifier: ImageClassifier, network: nn.Module, record: dict[str, Any] | None, path: str | Path) -> None:
    """Writes a network as an ordinary checkpoint.

    Args:
        classifier: A module without a network, whose recipe is saved along; it gets the network.
        network: What to save.
        record: How it came about, as plain containers.
        path: The file to write or replace.

    Raises:
        FusionError: The file cannot be written.
    """
    write_atomically(path, prepared(classifier, network, record))


def compare(
    trainer: Trainer, networks: Mapping[str, nn.Module], datamodule: ImageData, step: Step = lambda words: None
) -> list[dict[str, Any]]:
    """Name, number of parameters and accuracy on the test images of each network, as plain values."""
    rows = []
    for name, network in networks.items():
        step(f"testing {name}")
        count = sum(parameter.numel() for parameter in network.parameters())
        rows.append({"name": name, "parameters": count, "test_acc": _test_accuracy(trainer, network, datamodule)})
    return rows


def _test_accuracy(trainer: Trainer, network: nn.Module, datamodule: ImageData) -> float:
    classifier = ImageClassifier()
    # Not set_network: an ensemble has no description, and this classifier is never saved.
    classifier.network = network
    return trainer.test(classifier, datamodule=cast(LightningDataModule, datamodule), verbose=False)[0]["test_acc"]
