"""Networks side by side: their accuracies on the test images, and the table that shows them."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from clafusion import Ensemble, Fusion, average
from clafusion.errors import FusionError
from clafusion.formats.files import describe
from clafusion.fusion.record import NetworkRow, Role, in_percent, shown_name
from clafusion.lightning import LightningDataModule, Logger, Trainer
from clafusion.lightning_modules.classifier import Batch, ImageClassifier
from clafusion.lightning_modules.commands.naming import logged_names
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.progress import Step
from clafusion.teachers.label_sets import Label, columns_of, union_of
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


def widened(parents: Mapping[str, nn.Module], classes: Sequence[Sequence[Label]] | None) -> dict[str, nn.Module]:
    """Return the parents by name, with outputs for the classes of all where these are not the same.

    Args:
        parents: By name.
        classes: Per parent the labels that its outputs stand for; None: all have the same.
    """
    together = union_of(classes or ())
    if classes is None or all(tuple(labels) == together for labels in classes):
        return dict(parents)
    return _with_columns(parents, columns_of(classes), len(together))


def side_by_side(parents: Mapping[str, nn.Module], result: Fusion) -> dict[str, nn.Module]:
    """Return the parents by name, with the outputs of the result where they have others."""
    columns = None if result.teacher is None else result.teacher.columns
    if columns is None:
        return dict(parents)
    return _with_columns(parents, columns, len(result.classes))


def _with_columns(parents: Mapping[str, nn.Module], columns: Iterable[Tensor], count: int) -> dict[str, nn.Module]:
    """Return the parents by name, with the outputs of each in its columns of all."""
    pairs = zip(parents.items(), columns, strict=True)
    return {name: Widened(network, own, count) for (name, network), own in pairs}


def controls(parents: Mapping[str, nn.Module], result: Fusion) -> dict[str, nn.Module]:
    """Return the networks that are made of the parents without fusing them, by name.

    Args:
        parents: By name.
        result: What became of them.

    Warns:
        UserWarning: A balanced parent is left out, since the class of the template cannot have its widths.
    """
    comparable = list(side_by_side(parents, result).values())
    found: dict[str, nn.Module] = {"ensemble": Ensemble(comparable, result.weights)}
    teacher = result.teacher
    if teacher is not None and teacher.gate is not None:
        gated = Ensemble(comparable, result.weights)
        gated.teacher = teacher
        found["gated ensemble"] = gated
    if teacher is not None and teacher.columns is not None:
        # An average of networks with other outputs says nothing, nor does a parent that was given more of them.
        return found
    samples = example_of(result.structure.capture)
    described = {name: describe(network, samples) for name, network in parents.items()}
    for k, (name, before) in enumerate(described.items()):
        balanced = _balanced(result, k, name)
        if balanced is not None and describe(balanced, samples) != before:
            found[f"balanced {name}"] = balanced
    if all(description == before for description in described.values()):
        found["naive average"] = average(list(parents.values()), result.weights)
    return found


def _balanced(result: Fusion, k: int, name: str) -> nn.Module | None:
    try:
        return result.balanced_parent(k)
    except FusionError as error:
        warnings.warn(f"balanced {name} is left out: {error}", UserWarning, stacklevel=3)
        return None


def evaluate_fusion(
    trainer: Trainer, parents: Mapping[str, nn.Module], result: Fusion, datamodule: ImageData, step: Step
) -> list[NetworkRow]:
    """Test what is made of the parents without fusing them, and the fused network, which comes last.

    Args:
        trainer: Tests them.
        parents: By name.
        result: What became of them.
        datamodule: Test images, and labels.
        step: Called with what is done next.

    Returns:
        One row for each.
    """
    groups: dict[Role, Mapping[str, nn.Module]] = {
        "control": controls(parents, result),
        "fused": {"fused": result.model},
    }
    rows: list[NetworkRow] = []
    for role, networks in groups.items():
        rows += evaluate_networks(trainer, networks, datamodule, step, role, result.classes)
    return rows


def evaluate_networks(
    trainer: Trainer,
    networks: Mapping[str, nn.Module],
    datamodule: ImageData,
    step: Step = lambda words: None,
    role: Role = "control",
    classes: Sequence[Label] = (),
) -> list[NetworkRow]:
    """Test networks.

    Args:
        trainer: Tests them.
        networks: By name.
        datamodule: Test images, and labels.
        step: Called with what is done next.
        role: Of all of them.
        classes: What their outputs stand for, where that is known.

    Returns:
        Name, role, number of parameters, accuracy on the test images and their number of each; also how many of the
        classes it knows, and the number of their images, if it does not know all.
    """
    rows: list[NetworkRow] = []
    for name, network in networks.items():
        step(f"testing {name}")
        count = sum(parameter.numel() for parameter in network.parameters())
        found = _tested(trainer, network, datamodule, classes)
        row: NetworkRow = {
            "name": name,
            "role": role,
            "parameters": count,
            "test_acc": found["test_acc"],
            "test_images": round(found["test_images"]),
        }
        if isinstance(network, Widened):
            row = {**row, "knows": len(network.columns), "known_images": round(found["known_images"])}
        rows.append(row)
    return rows


class _Counting(ImageClassifier):
    """A classifier that counts the test images as well, and those of the classes that its network knows."""

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to `test_loss`, `test_acc`, `test_images` and `known_images`."""
        super().test_step(batch, batch_idx)
        labels = batch[1]
        known = torch.isin(labels, self.network.columns).sum() if isinstance(self.network, Widened) else len(labels)
        counts = {"test_images": float(len(labels)), "known_images": float(known)}
        self.log_dict(counts, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=1)


def _tested(
    trainer: Trainer, network: nn.Module, datamodule: ImageData, classes: Sequence[Label]
) -> Mapping[str, float]:
    """Return what the trainer measures on the test images."""
    classifier = _Counting()
    classifier.class_names = list(classes) or None
    # Not set_network: an ensemble has no description, and this classifier is never saved.
    classifier.network = network
    loggers = trainer.loggers
    # All networks would be logged under one name.
    trainer.loggers = []
    try:
        return trainer.test(classifier, datamodule=cast(LightningDataModule, datamodule), verbose=False)[0]
    finally:
        trainer.loggers = loggers


def log_networks(loggers: Iterable[Logger], networks: Sequence[NetworkRow]) -> None:
    """Log the accuracies of networks, each under its own name: `resnet34/test_acc`, `fused/test_acc`."""
    names = logged_names([row["name"] for row in networks])
    accuracies = {f"{name}/test_acc": row["test_acc"] for name, row in zip(names, networks, strict=True)}
    for logger in loggers:
        logger.log_metrics(accuracies, step=0)
        logger.save()


def print_networks(networks: Sequence[NetworkRow], classes: int = 0) -> None:
    """Print networks as a table on standard output, the last one in bold: name, test accuracy, parameters.

    An accuracy has its standard error beside it.

    Args:
        networks: What `evaluate_networks` returned.
        classes: How many classes there are, where not every network knows all of them.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counts = {row["test_images"] for row in networks}
    caption = f"± one standard error for {' or '.join(f'{count:,}' for count in sorted(counts))} test images"
    table = Table("network", "test accuracy", "parameters", caption=caption, caption_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for number, row in enumerate(networks, 1):
        style = "bold" if number == len(networks) else None
        table.add_row(escape(shown_name(row, classes)), in_percent(row), f"{row['parameters']:,}", style=style)
    Console().print(table)
