"""The trainer that can also fuse: it checks first, then computes, and writes last."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import nn

from clafusion import Ensemble, Fusion, FusionOptions, average
from clafusion.errors import FusionError
from clafusion.storage import describe
from lightning_modules.atomic_io import AtomicCheckpointIO
from lightning_modules.checkpoints import save_checkpoint
from lightning_modules.checks import ImageData
from lightning_modules.classifier import ImageClassifier
from lightning_modules.fusing import fuse_checkpoints
from lightning_modules.last_checkpoint import LastCheckpoint
from lightning_modules.results import print_results, write_results


class FusionTrainer(Trainer):
    """A Lightning `Trainer` with `fuse`, whose results lie where one expects them.

    `fit` writes `best.ckpt` (of the highest `val_acc`) and `last.ckpt` into `default_root_dir`, replacing those of an
    earlier run, and `logs/version_N/metrics.csv` below it. A logger of yours takes the place of the latter, a
    `ModelCheckpoint` of yours that of `best.ckpt`. From `last.ckpt` an interrupted run goes on exactly where it was.
    Checkpoints are replaced whole or not at all, and nothing in them is ever run.

    Args:
        logger: Logger, several, false for none; none given: a CSV logger.
        callbacks: Callbacks.
        default_root_dir: Folder of the results.
        enable_checkpointing: False keeps `fit` from writing checkpoints.
        barebones: Lightning's mode for timing; nothing is logged or saved.
        save_every_n_steps: Write `last.ckpt` after every n-th optimizer step, besides after every epoch.
        **kwargs: As for `pytorch_lightning.Trainer`.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: list[Callback] | Callback | None = None,
        default_root_dir: str = "runs",
        enable_checkpointing: bool | None = None,
        barebones: bool = False,
        save_every_n_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks] if callbacks else []
        if not barebones and logger in (None, True):
            logger = CSVLogger(default_root_dir, name="logs")
        if save_every_n_steps is not None and save_every_n_steps < 1:
            raise FusionError(f"Expected save_every_n_steps of at least 1, got {save_every_n_steps}; change it")
        last = None
        if not barebones and enable_checkpointing is not False:
            last = LastCheckpoint(default_root_dir, save_every_n_steps)
            callbacks += [*_best(default_root_dir, callbacks), last]
        super().__init__(
            logger=logger,
            callbacks=callbacks,
            default_root_dir=default_root_dir,
            enable_checkpointing=enable_checkpointing,
            barebones=barebones,
            **kwargs,
        )
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        if last is not None:
            last.listen(self)

    def _run(self, model: LightningModule, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Lightning has decided by now, whether the user, `last` or a cluster's requeue names the checkpoint, but tells
        # no one before it has read it; in setup it is known here.
        self.restores = ckpt_path
        return super()._run(model, ckpt_path, *args, **kwargs)

    def fuse(
        self,
        model: ImageClassifier,
        datamodule: ImageData,
        parents: list[str],
        output: str,
        overwrite: bool = False,
        fusion: FusionOptions = FusionOptions(),  # noqa: B008 (it is frozen)
    ) -> dict[str, Any]:
        """Fuses trained networks into one and shows how well each of them does on the test images.

        Writes the fused network as an ordinary checkpoint, and next to it `fusion.json`: options, alignment, costs,
        accuracies, parameters, seconds, memory, seeds, versions and the parents' checksums. Nothing is written before
        all of it is there.

        Args:
            model: Its training recipe is saved with the fused network.
            datamodule: Unlabelled training images for the fusion, test images for the evaluation.
            parents: Two or more checkpoints of fit or fuse, or files of save_network.
            output: The checkpoint to write, NAME.ckpt.
            overwrite: Whether output and fusion.json may replace existing files.
            fusion: The options of the method.

        Returns:
            The content of `fusion.json`.

        Raises:
            FusionError: A parent, the data, an option or the output cannot be used; nothing is written then.
        """
        record = _check_output(output, overwrite)
        if model.network is not None:
            raise FusionError("Expected no model architecture to fuse into, got one; leave out --model.architecture")
        networks, result, figures = fuse_checkpoints(parents, datamodule, fusion, self.strategy.root_device)
        results = {
            "output": output,
            "networks": [
                {
                    "name": name,
                    "parameters": sum(parameter.numel() for parameter in network.parameters()),
                    "test_acc": self._test_accuracy(network, datamodule),
                }
                for name, network in _contestants(networks, result).items()
            ],
            **figures,
        }
        if self.is_global_zero:
            model.set_network(result.model.cpu())
            model.fusion = results
            save_checkpoint(model, output)
            write_results(results, record)
            print_results(results)
        return results

    def _test_accuracy(self, network: nn.Module, datamodule: ImageData) -> float:
        classifier = ImageClassifier()
        # Not set_network: an ensemble has no description, and this classifier is never saved.
        classifier.network = network
        return self.test(classifier, datamodule=cast(LightningDataModule, datamodule), verbose=False)[0]["test_acc"]


def _best(folder: str, callbacks: list[Callback]) -> list[Callback]:
    """What keeps the best checkpoint, unless the user has a `ModelCheckpoint` of their own."""
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        return []
    return [
        ModelCheckpoint(dirpath=folder, filename="best", monitor="val_acc", mode="max", enable_version_counter=False)
    ]


def _check_output(output: str, overwrite: bool) -> Path:
    """Refuses an output that could not be written at the end; returns the path of the record next to it."""
    path = Path(output)
    record = path.parent / "fusion.json"
    if path.suffix != ".ckpt" or "://" in output:
        raise FusionError(f"Expected a local output file named NAME.ckpt, got {output}; change --output")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise FusionError(f"Expected a folder that can be written, got {path.parent}; create it or change --output")
    for file in (path, record):
        if file.is_dir() or (file.exists() and not overwrite):
            raise FusionError(f"Expected to write a new file, got {file}, which exists; give --overwrite true")
    return record


def _contestants(parents: list[nn.Module], result: Fusion) -> dict[str, nn.Module]:
    """The networks to compare, by name: the parents, the baselines and the fused network last."""
    described = [describe(network) for network in parents]
    found = {f"parent {number}": network for number, network in enumerate(parents, 1)}
    found["ensemble"] = Ensemble(parents, result.weights)
    for number, (before, balanced) in enumerate(zip(described, result.balanced, strict=True), 1):
        if describe(balanced) != before:
            found[f"balanced {number}"] = balanced
    if all(description == described[0] for description in described):
        found["naive average"] = average(parents, result.weights)
    return {**found, "fused": result.model}
