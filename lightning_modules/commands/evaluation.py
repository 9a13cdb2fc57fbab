"""Networks side by side: their accuracies on the test images, and the table that shows them."""

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from clafusion import Ensemble, Fusion, average
from clafusion.errors import FusionError
from clafusion.formats.files import describe
from clafusion.fusion.record import NetworkRow
from clafusion.lightning import LightningDataModule, Trainer
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.progress import Step
from clafusion.teachers.label_sets import Label
from clafusion.tracing.example import example_of


class Widened(nn.Module):
    """A classifier that tells some of several classes apart, and never gives one of the others.

    Args:
        network: Kept as it is.
        columns: The places of its classes among all, [its classes].
        count: How many classes there are.
    """

    columns: Tensor

    def __init__(self, network: nn.Module, columns: Tensor, count: int) -> None:
        super().__init__()
        self.network = network
        self.count = count
        self.register_buffer("columns", columns)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[N, classes of all]`, minus infinity for those that the network does not know."""
        logits: Tensor = self.network(images)
        return logits.new_full((len(logits), self.count), -torch.inf).index_copy(1, self.columns, logits)


def side_by_side(parents: Sequence[nn.Module], result: Fusion) -> dict[str, nn.Module]:
    """Return the parents by name, with the outputs of the result where they have others."""
    columns = None if result.teacher is None else result.teacher.columns
    if columns is None:
        return {f"parent {number}": network for number, network in enumerate(parents, 1)}
    total = len(result.classes)
    pairs = enumerate(zip(parents, columns, strict=True), 1)
    return {
        f"parent {number} (knows {len(own)} of {total} classes)": Widened(network, own, total)
        for number, (network, own) in pairs
    }


def contestants(parents: list[nn.Module], result: Fusion) -> dict[str, nn.Module]:
    """Return the networks to compare, by name: the parents, the baselines and the fused network last.

    Warns:
        UserWarning: A balanced parent is left out, since the class of the template cannot have its widths.
    """
    found = side_by_side(parents, result)
    comparable = list(found.values())
    found["ensemble"] = Ensemble(comparable, result.weights)
    teacher = result.teacher
    if teacher is not None and teacher.gate is not None:
        gated = Ensemble(comparable, result.weights)
        gated.teacher = teacher
        found["gated ensemble"] = gated
    if teacher is not None and teacher.columns is not None:
        # An average of networks with other outputs says nothing, nor does a parent that was given more of them.
        return {**found, "fused": result.model}
    samples = example_of(result.structure.capture)
    described = [describe(network, samples) for network in parents]
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
    trainer: Trainer,
    networks: Mapping[str, nn.Module],
    datamodule: ImageData,
    step: Step = lambda words: None,
    classes: Sequence[Label] = (),
) -> list[NetworkRow]:
    """Test networks.

    Args:
        trainer: Tests them.
        networks: By name.
        datamodule: Test images, and labels.
        step: Called with what is done next.
        classes: What their outputs stand for, where that is known.

    Returns:
        Name, number of parameters and accuracy on the test images of each.
    """
    rows: list[NetworkRow] = []
    for name, network in networks.items():
        step(f"testing {name}")
        count = sum(parameter.numel() for parameter in network.parameters())
        accuracy = _test_accuracy(trainer, network, datamodule, classes)
        rows.append({"name": name, "parameters": count, "test_acc": accuracy})
    return rows


def _test_accuracy(trainer: Trainer, network: nn.Module, datamodule: ImageData, classes: Sequence[Label]) -> float:
    classifier = ImageClassifier()
    classifier.class_names = list(classes) or None
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
