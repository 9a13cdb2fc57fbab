"""Networks side by side: their accuracies on the test images, and the table that shows them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from clafusion import Ensemble, Fusion, average
from clafusion.errors import FusionError
from clafusion.formats.files import describe
from clafusion.fusion.record import NetworkRow
from clafusion.lightning import LightningDataModule, Trainer
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.progress import Step
from clafusion.tracing.example import example_of


def contestants(parents: list[nn.Module], result: Fusion) -> dict[str, nn.Module]:
    """Return the networks to compare, by name: the parents, the baselines and the fused network last.

    Warns:
        UserWarning: A balanced parent is left out, since the class of the template cannot have its widths.
    """
    samples = example_of(result.structure.capture)
    described = [describe(network, samples) for network in parents]
    found = {f"parent {number}": network for number, network in enumerate(parents, 1)}
    found["ensemble"] = Ensemble(parents, result.weights)
    for number, before in enumerate(described, 1):
        balanced = _balanced(result, number)
        if balanced is not None and describe(balanced, samples) != before:
            found[f"balanced {number}"] = balanced
    if all(description == described[0] for description in described):
        found["naive average"] = average(parents, result.weights)
    return {**found, "fused": result.model}


def _balanced(result: Fusion, number: int) -> nn.Module | None:
    try:
        return result.balanced_parent(number - 1)
    except FusionError as error:
        warnings.warn(f"balanced {number} is left out: {error}", UserWarning, stacklevel=3)
        return None


def evaluate_networks(
    trainer: Trainer, networks: Mapping[str, nn.Module], datamodule: ImageData, step: Step = lambda words: None
) -> list[NetworkRow]:
    """Test networks; return name, number of parameters and accuracy on the test images of each."""
    rows: list[NetworkRow] = []
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


def print_networks(networks: Sequence[NetworkRow]) -> None:
    """Print name, test accuracy and parameters of networks as a table on standard output, the last one in bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table("network", "test accuracy", "parameters")
    table.columns[1].justify = table.columns[2].justify = "right"
    for number, row in enumerate(networks, 1):
        style = "bold" if number == len(networks) else None
        table.add_row(row["name"], f"{row['test_acc']:.2%}", f"{row['parameters']:,}", style=style)
    Console().print(table)
