"""Checkpoints as a trainer writes and reads them: whole or not at all, and as plain data."""

import os
from pathlib import Path
from typing import Any

import torch

from clafusion.errors import FusionError
from clafusion.formats.atomic import write_together
from clafusion.lightning import LightningModule, TorchCheckpointIO, __version__
from clafusion.lightning_modules.checkpoints.reading import load_plain, local_file
from clafusion.lightning_modules.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that survive a kill and a full disk, and that are read as plain data.

    A checkpoint is written under a hidden name next to its own, forced onto the disk and then renamed. (Lightning
    writes to the system's temporary folder; from there a file gets into another file system by copying, which can be
    interrupted.) At no moment is the previous checkpoint of that name damaged; there must be room for both.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write or replace a local file.

        Args:
            checkpoint: Tensors and plain containers.
            path: The file.
            storage_options: Must be None.

        Raises:
            FusionError: The file cannot be written, for example because the disk is full; an earlier file of that name
                is as it was.
        """
        if storage_options is not None or "://" in str(path):
            raise FusionError(f"Expected a local file for a checkpoint, got {path}; choose a folder of this machine")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Always the same hidden name: one process writes, and a kill leaves at most one such file.
            write_together({path: lambda file: torch.save(checkpoint, file)}, suffix="part")
        except OSError as error:
            kept = "the previous one is kept" if path.exists() else "there is none yet"
            raise FusionError(
                f"Expected to write the checkpoint {path}, got {error.strerror}; {kept}: make room and resume"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a local file onto the CPU as tensors and plain containers.

        Args:
            path: The file.
            map_location: Ignored.
            weights_only: Ignored: no file is read in another way.

        Raises:
            FusionError: The file is missing, remote, damaged or holds pickled objects.
        """
        return load_plain(local_file(path))


def save_checkpoint(classifier: LightningModule, path: str | os.PathLike[str]) -> None:
    """Write an `ImageClassifier` that no trainer has fitted as an ordinary checkpoint.

    It serves `load_from_checkpoint` and `validate`, `test` and `predict --ckpt_path`. It holds no optimizer state, so
    `fit --ckpt_path` starts training from its weights at epoch 0.

    Args:
        classifier: What to save; its `on_save_checkpoint` is called, as by Lightning.
        path: The file to write or replace; its folder exists.

    Raises:
        FusionError: The file cannot be written; nothing is left behind.
    """
    content = checkpoint_of(classifier)
    write_atomically(path, lambda file: torch.save(content, file))


def checkpoint_of(classifier: LightningModule) -> dict[str, Any]:
    """Return the content of the file that `save_checkpoint` writes."""
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": __version__,
        "state_dict": {name: tensor.detach().cpu() for name, tensor in classifier.state_dict().items()},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(classifier.hparams),
    }
    classifier.on_save_checkpoint(checkpoint)
    return checkpoint
