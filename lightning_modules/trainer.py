"""The trainer that can also fuse: it checks first, then computes, and writes last."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from clafusion import Ensemble, Fusion, FusionOptions, average
from clafusion.errors import FusionError
from clafusion.formats.files import describe
from clafusion.lightning import (
    Callback,
    CSVLogger,
    HookedTrainer,
    LightningDataModule,
    Logger,
    ModelCheckpoint,
    TorchCheckpointIO,
    training_settings,
)
from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.checkpoints.restoring import CheckedConnector
from clafusion.lightning_modules.checkpoints.writing import AtomicCheckpointIO
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.figures import Pictures, check_folder, folder_beside
from clafusion.lightning_modules.commands.fuse import align_checkpoints, drawn, fuse_checkpoints, print_alignment
from clafusion.lightning_modules.commands.records import (
    as_json,
    check_empty,
    check_new,
    check_output,
    compare,
    prepared,
    print_results,
    write_results,
)
from clafusion.lightning_modules.commands.transfer import transfer_checkpoint
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.experiments.jobs import prepare
from clafusion.lightning_modules.experiments.runner import run_experiment
from clafusion.lightning_modules.experiments.schema import Scale
from clafusion.lightning_modules.experiments.stage_trainers import check_arguments, stage_arguments
from clafusion.lightning_modules.files import write_together, writer
from clafusion.lightning_modules.progress import steps
from clafusion.report.pages import fusion_report


class FusionTrainer(HookedTrainer):
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
        self._given: dict[str, Any] = {
            "logger": logger,
            "callbacks": list(callbacks),
            "default_root_dir": default_root_dir,
            "barebones": barebones,
            "save_every_n_steps": save_every_n_steps,
            **kwargs,
        }
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
        self.use_connector(CheckedConnector)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        if last is not None:
            last.listen(self)

    def fuse(
        self,
        model: ImageClassifier,
        datamodule: ImageData,
        parents: list[str],
        output: str,
        overwrite: bool = False,
        align_only: bool = False,
        report: bool = True,
        figures: bool = True,
        quiet: bool = False,
        json: bool = False,
        fusion: FusionOptions = FusionOptions(),  # noqa: B008 (it is frozen)
    ) -> dict[str, Any]:
        """Fuses trained networks into one and shows how well each of them does on the test images.

        Writes the fused network as an ordinary checkpoint, and next to it `fusion.json`: options, alignment, costs,
        accuracies, parameters, seconds, memory, seeds, versions and the parents' checksums; and `report.html`, whose
        figures go to the folder `report_figures`, too, and into TensorBoard where that is the logger. Nothing is
        written before all of it is there.

        Args:
            model: Its training recipe is saved with the fused network.
            datamodule: Unlabelled training images for the fusion, test images for the evaluation.
            parents: Two or more checkpoints of fit or fuse, or files of save_network.
            output: The checkpoint to write, NAME.ckpt.
            overwrite: Whether the files written here may replace existing ones.
            align_only: Only show and write to fusion.json which layers correspond, with the costs of every stage.
            report: Whether to draw report.html as well: all of this as one file to look at.
            figures: Whether every figure of the report becomes a file of its own as well, as SVG and as PNG.
            quiet: Whether to print nothing but errors.
            json: Whether to print what fusion.json holds, as JSON and nothing else, instead of tables.
            fusion: The options of the method.

        Returns:
            The content of `fusion.json`.

        Raises:
            FusionError: A parent, the data, an option or the output cannot be used; nothing is written then.
        """
        path = check_output(output)
        record = path.parent / "fusion.json"
        page = path.parent / "report.html"
        figures = figures and report and not align_only
        check_new([record] if align_only else [path, record, *([page] if report else [])], overwrite)
        if figures:
            check_folder(page, overwrite)
        check_empty(model)
        if align_only:
            with steps(quiet or json or not self.is_global_zero) as step:
                step(f"aligning the layers of {len(parents)} networks")
                alignment = align_checkpoints(parents, datamodule, fusion, self.strategy.root_device)
            if self.is_global_zero:
                write_results(alignment, record)
                _say(alignment, print_alignment, quiet, json)
            return alignment
        with steps(quiet or json or not self.is_global_zero) as step:
            step(f"fusing {len(parents)} networks")
            fused = fuse_checkpoints(parents, datamodule, fusion, self.strategy.root_device)
            # Before the networks are compared, which may move them to another device.
            step("measuring for the report")
            more = {"report": drawn(fused, datamodule)} if report and self.is_global_zero else {}
            networks = compare(self, _contestants(fused.parents, fused.fusion), datamodule, step)
        results = {"output": output, "networks": networks, **fused.record, **more}
        if self.is_global_zero:
            shown = fusion_report(results) if report else None
            pictures = Pictures.of(shown.figures if shown and figures else ())
            pages = {page: writer(shown.html)} if shown else {}
            checkpoint = prepared(model, fused.fusion.model, results)
            write_together({path: checkpoint, record: writer(as_json(results)), **pages})
            if figures:
                pictures.write(folder_beside(page))
                pictures.log(self.loggers)
            _say(results, print_results, quiet, json)
        return results

    # Defined elsewhere to keep this file small; the command line reads its arguments there.
    transfer = transfer_checkpoint

    def pipeline(
        self,
        model: ImageClassifier,
        datamodule: LightningDataModule,
        experiment: dict[str, Any],
        seeds: Sequence[int] | None = None,
        scale: Scale = "full",
        output: str | None = None,
        report: bool = True,
        figures: bool = True,
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Carries out a whole experiment: trains parents, fuses, finetunes, distils, evaluates, compares.

        Every stage has a folder of its own below the output. The same command goes on where it was interrupted, and
        does nothing again that is finished. When a stage fails, those that do not need it go on. The table of all
        networks is printed and lies in `results.json`, `results.csv` and `results.md`; `report.html` shows it all.

        Args:
            model: Its `channels_last`, `compile` and `fused` apply to every stage; the rest is the experiment's.
            datamodule: Images to train, validate and fuse on; the test images are for the evaluations.
            experiment: name, parents, fusions, transfers, finetune, distill, published, small, ...: see
                docs/experiments.md.
            seeds: The experiment is carried out for each of them; none given: for those that it names.
            scale: full, or small: with the changes that the experiment has for that.
            output: Folder of the experiment; none given: NAME below default_root_dir.
            report: Whether to draw report.html as well: all of this as one file to look at.
            figures: Whether every figure of the report becomes a file of its own as well, as SVG and as PNG, in the
                folder report_figures.
            quiet: Whether to print nothing but what fails.

        Returns:
            The content of `results.json`.

        Raises:
            FusionError: The experiment, the data or the output cannot be used; nothing has been computed then.
            ExperimentFailed: Stages have failed; the results of the others are there.
        """
        check_arguments(self._given)
        root = self._given["default_root_dir"]
        prepared = prepare(self, model, datamodule, experiment, seeds, scale, output, root, report, figures, quiet)
        return run_experiment(prepared)

    def clone(
        self, folder: str | os.PathLike[str], more: list[Callback] | None = None, **changes: Any
    ) -> "FusionTrainer":
        """Return a trainer like this one, for another folder.

        Args:
            folder: Its `default_root_dir`.
            more: Callbacks besides copies of this trainer's; None: no callbacks at all.
            **changes: Other arguments that differ.
        """
        return type(self)(**stage_arguments(self._given, folder, more, changes))

    def training_settings(self) -> dict[str, Any]:
        """Return the settings that change what a network learns, as plain values by name."""
        synchronized = bool(self._given.get("sync_batchnorm"))
        return {**training_settings(self), "sync_batchnorm": synchronized, "processes": self.world_size}


def _say(results: dict[str, Any], in_words: Callable[[dict[str, Any]], None], quiet: bool, json: bool) -> None:
    if json:
        print(as_json(results), end="")
    elif not quiet:
        in_words(results)


def _best(folder: str, callbacks: list[Callback]) -> list[Callback]:
    """What keeps the best checkpoint, unless the user has a `ModelCheckpoint` of their own."""
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        return []
    return [
        ModelCheckpoint(dirpath=folder, filename="best", monitor="val_acc", mode="max", enable_version_counter=False)
    ]


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
