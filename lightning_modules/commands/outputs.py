"""The files that a command writes: refused early if they cannot be written, and checkpoints of a network."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clafusion.errors import FusionError
from clafusion.formats.atomic import Writer
from clafusion.lightning_modules.checkpoints.writing import checkpoint_of
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.files import write_atomically


def check_output(output: str, suffixes: Sequence[str] = (".ckpt",)) -> Path:
    """Refuse an output whose name or folder would not do at the end.

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
    """Refuse to replace files unasked.

    Raises:
        FusionError: One of them exists and may not be overwritten, or is a folder.
    """
    for file in files:
        if file.is_dir() or (file.exists() and not overwrite):
            raise FusionError(
                f"Expected to write a new file, got {file}, which exists; give --overwrite, or a new folder"
            )


def check_empty(model: ImageClassifier) -> None:
    """Refuse a module that has a network already, where the command is to make it one.

    Raises:
        FusionError: It has.
    """
    if model.network is not None:
        raise FusionError("Expected no model architecture to fuse into, got one; leave out --model.architecture")


def prepared(classifier: ImageClassifier, network: nn.Module, record: Mapping[str, Any] | None) -> Writer:
    """Return what writes a network as an ordinary checkpoint; the arguments are those of `save_as`."""
    classifier.set_network(network.cpu())
    classifier.fusion = None if record is None else dict(record)
    classifier.class_names = list((record or {}).get("classes") or []) or None
    content = checkpoint_of(classifier)
    return lambda file: torch.save(content, file)


def save_as(
    classifier: ImageClassifier, network: nn.Module, record: Mapping[str, Any] | None, path: str | Path
) -> None:
    """Write a network as an ordinary checkpoint.

    Args:
        classifier: A module without a network, whose recipe is saved along; it gets the network.
        network: What to save.
        record: How it came about, as plain containers; its `classes`, if it has some, are those of the network.
        path: The file to write or replace.

    Raises:
        FusionError: The file cannot be written.
    """
    write_atomically(path, prepared(classifier, network, record))
