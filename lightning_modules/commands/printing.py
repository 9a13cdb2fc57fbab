"""What `clafusion fuse` says when it is done."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from clafusion.fusion.record import AlignmentRecord, FusionRecord, parent_names
from clafusion.lightning_modules.commands.evaluation import print_networks
from clafusion.lightning_modules.commands.records import as_json

Record = TypeVar("Record", FusionRecord, AlignmentRecord)


def say(record: Record, in_words: Callable[[Record], None], quiet: bool, json: bool) -> None:
    """Print a record as JSON, in words, or not at all."""
    if json:
        print(as_json(record), end="")
    elif not quiet:
        in_words(record)


def _choices(record: FusionRecord) -> Iterator[str]:
    """Yield which of several networks was taken and why, and which parents were trusted, where that was a question."""
    scores = ", ".join(f"{name} {score:.4f}" for name, score in record["candidates"].items())
    if scores:
        yield f"chosen: {record['chosen']}; divergence from what the parents say together: {scores}"
    if record.get("teacher") == "gated":
        trusted = zip(parent_names(record), record["trust"], strict=True)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in trusted)
        yield f"trusted: {shares} of the samples"


def print_fusion(record: FusionRecord) -> None:
    """Print the networks of a fusion as a table on standard output, and below it the files."""
    from rich.console import Console

    if "networks" in record:
        print_networks(record["networks"], len(record["classes"]))
    console = Console()
    for line in _choices(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for parent in record["parents"]:
        if parent["name"] != parent["path"]:
            console.print(f"{parent['name']}: {parent['path']}", highlight=False, markup=False, soft_wrap=True)
    memory = record["peak_memory_bytes"] / 2**20
    console.print(
        f"{record['output']}: fused in {record['seconds']:.2f} s, peak memory {memory:.0f} MiB",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if "report" in record:
        page = Path(record["output"]).with_suffix(".html")
        console.print(f"{page}: all of it to look at", highlight=False, markup=False, soft_wrap=True)
