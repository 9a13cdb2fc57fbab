"""What `fuse` and `transfer` have in common: where the result goes, and how its network compares with others."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pytorch_lightning import LightningDataModule, Trainer
from torch import nn

from clafusion.errors import FusionError
from lightning_modules.checks import ImageData
from lightning_modules.classifier import ImageClassifier


def check_output(output: str, record: str, overwrite: bool, record_only: bool = False) -> Path:
    """Refuses an output that could not be written at the end.

    Args:
        output: The checkpoint to write, NAME.ckpt.
        record: The name of the file next to it that tells how it came about.
        overwrite: Whether the two may replace existing files.
        record_only: Whether the record alone will be written.

    Returns:
        The path of the record.

    Raises:
        FusionError: The name or the folder will not do, or a file is there already.
    """
    path = Path(output)
    if path.suffix != ".ckpt" or "://" in output:
        raise FusionError(f"Expected a local output file named NAME.ckpt, got {output}; change --output")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise FusionError(f"Expected a folder that can be written, got {path.parent}; create it or change --output")
    for file in (path.parent / record,) if record_only else (path, path.parent / record):
        if file.is_dir() or (file.exists() and not overwrite):
            raise FusionError(f"Expected to write a new file, got {file}, which exists; give --overwrite")
    return path.parent / record


def check_empty(model: ImageClassifier) -> None:
    """Refuses a module that has a network already, where the command is to make it one.

    Raises:
        FusionError: It has.
    """
    if model.network is not None:
        raise FusionError("Expected no model architecture to fuse into, got one; leave out --model.architecture")


def compare(trainer: Trainer, networks: Mapping[str, nn.Module], datamodule: ImageData) -> list[dict[str, Any]]:
    """Name, number of parameters and accuracy on the test images of each network, as plain values."""
    return [
        {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "test_acc": _test_accuracy(trainer, network, datamodule),
        }
        for name, network in networks.items()
    ]


def _test_accuracy(trainer: Trainer, network: nn.Module, datamodule: ImageData) -> float:
    classifier = ImageClassifier()
    # Not set_network: an ensemble has no description, and this classifier is never saved.
    classifier.network = network
    return trainer.test(classifier, datamodule=cast(LightningDataModule, datamodule), verbose=False)[0]["test_acc"]
