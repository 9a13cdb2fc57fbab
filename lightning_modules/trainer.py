"""The trainer that can also fuse: it checks first, then computes, and writes last."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import nn

from clafusion import Ensemble, Fusion, FusionOptions, average, fuse
from clafusion.errors import FusionError
from clafusion.storage import describe
from lightning_modules.checkpoints import load_parent, save_checkpoint, sha256
from lightning_modules.checks import ImageData, check_images
from lightning_modules.classifier import ImageClassifier
from lightning_modules.results import peak_memory, print_results, versions, write_results


class FusionTrainer(Trainer):
    """A Lightning `Trainer` with `fuse`, whose results lie where one expects them.

    `fit` writes `best.ckpt` (of the highest `val_acc`) and `last.ckpt` into `default_root_dir`, replacing those of an
    earlier run, and `logs/version_N/metrics.csv` below it. A logger or `ModelCheckpoint` of yours takes their place.

    Args:
        logger: Logger, several, false for none; none given: a CSV logger.
        callbacks: Callbacks.
        default_root_dir: Folder of the results.
        enable_checkpointing: False keeps `fit` from writing checkpoints.
        barebones: Lightning's mode for timing; nothing is logged or saved.
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
        **kwargs: Any,
    ) -> None:
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks] if callbacks else []
        if not barebones and logger in (None, True):
            logger = CSVLogger(default_root_dir, name="logs")
        if not barebones and enable_checkpointing is not False:
            callbacks += _best_and_last(default_root_dir, callbacks)
        super().__init__(
            logger=logger,
            callbacks=callbacks,
            default_root_dir=default_root_dir,
            enable_checkpointing=enable_checkpointing,
            barebones=barebones,
            **kwargs,
        )

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
        networks = _load_parents(parents, datamodule)
        batches = list(datamodule.alignment_batches(fusion.num_samples, fusion.seed))

        device = self.strategy.root_device
        started = time.perf_counter()
        result = fuse([network.to(device) for network in networks], [batch.to(device) for batch in batches], fusion)
        seconds = time.perf_counter() - started
        memory = peak_memory(device)

        results = {
            "output": output,
            "parents": [{"path": path, "sha256": sha256(path)} for path in parents],
            "networks": [
                {
                    "name": name,
                    "parameters": sum(parameter.numel() for parameter in network.parameters()),
                    "test_acc": self._test_accuracy(network, datamodule),
                }
                for name, network in _contestants(networks, result).items()
            ],
            **result.summary(),
            "seconds": seconds,
            "peak_memory_bytes": memory,
            "seeds": {"fusion": fusion.seed, "global": int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))},
            "versions": versions(),
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


def _best_and_last(folder: str, callbacks: list[Callback]) -> list[Callback]:
    """The checkpoints that `fit` writes, unless the user has a `ModelCheckpoint` of their own."""
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        return []
    return [
        ModelCheckpoint(
            dirpath=folder, filename="best", monitor="val_acc", mode="max", save_last=True, enable_version_counter=False
        )
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


def _load_parents(paths: list[str], datamodule: ImageData) -> list[nn.Module]:
    """The parents' networks, all of which take the data's images and tell the same number of classes apart."""
    if len(paths) < 2:
        raise FusionError(f"Expected two or more parents, got {len(paths)}; give --parents '[a.ckpt, b.ckpt]'")
    networks = [load_parent(path) for path in paths]
    classes = [check_images(network, datamodule, path) for path, network in zip(paths, networks, strict=True)]
    if len(set(classes)) > 1:
        found = ", ".join(f"{path}: {count}" for path, count in zip(paths, classes, strict=True))
        raise FusionError(f"Expected parents with the same number of classes, got {found}; choose others")
    return networks


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
