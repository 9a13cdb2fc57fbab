"""What the commands that make a network have in common: where it goes, and how it compares with others."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pytorch_lightning import LightningDataModule, Trainer
from torch import nn

from clafusion.errors import FusionError
from lightning_modules.checkpoints import Writer, checkpoint_of, save_plain, write_atomically
from lightning_modules.checks import ImageData
from lightning_modules.classifier import ImageClassifier
from lightning_modules.progress import Step


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
    return lambda path: save_plain(content, path)


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
