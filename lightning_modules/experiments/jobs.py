"""An experiment that has been checked and laid out as jobs, before anything of it is computed or written."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from clafusion.errors import FusionError
from clafusion.lightning import LightningDataModule, data_settings, starts_workers_itself
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.experiments.context import RunContext, changed
from clafusion.lightning_modules.experiments.parsing import from_plain
from clafusion.lightning_modules.experiments.plan import Plan, plan
from clafusion.lightning_modules.experiments.schema import Experiment, Scale, check_seeds
from clafusion.lightning_modules.experiments.stage_folder import StageRecord, claimed, finished
from clafusion.lightning_modules.experiments.stages.base import Stage, StageResult
from clafusion.lightning_modules.experiments.stages.training import TrainingStage
from clafusion.lightning_modules.trainer import FusionTrainer


@dataclass(frozen=True)
class Job:
    """A stage for a seed, in its folder.

    Attributes:
        stage: what to do.
        seed: the experiment's.
        home: the folder of the seed.
        circumstances: what the result of any stage depends on besides the stage, its seed and the files of its inputs.
    """

    stage: Stage
    seed: int
    home: Path
    circumstances: dict[str, Any]

    @property
    def key(self) -> tuple[int, str]:
        """The key of the job among those of an experiment."""
        return self.seed, self.stage.name

    @property
    def folder(self) -> Path:
        """The folder of the stage."""
        return self.home / self.stage.name

    @property
    def inputs(self) -> dict[str, Path]:
        """The files of the networks that it needs."""
        return {network: self.home / file for network, file in self.stage.inputs.items()}

    @property
    def words(self) -> str:
        """The job as messages call it."""
        return f"{self.stage.words}, seed {self.seed}"

    @property
    def description(self) -> dict[str, Any]:
        """All that the result depends on besides the content of the inputs, as plain values."""
        stage = self.stage
        own = {"kind": stage.kind, "settings": stage.settings, "inputs": stage.inputs, "seed": stage.seed(self.seed)}
        return {**own, **self.circumstances}

    @property
    def record(self) -> StageRecord:
        """The content of `stage.json`, from which `stage_from` makes the stage again."""
        outputs = {name: asdict(network) for name, network in self.stage.outputs.items()}
        return {"name": self.stage.subject, "outputs": outputs, "description": self.description}

    def run(self, context: RunContext) -> StageResult:
        """Run the stage, on all ranks; its files are in its folder then.

        Raises:
            FusionError: It cannot be done.
        """
        return self.stage.run(context, self.folder, self.inputs, self.stage.seed(self.seed))


@dataclass(frozen=True)
class PreparedExperiment:
    """An experiment that has been checked.

    Attributes:
        experiment: at the scale that was asked for.
        plan: its stages.
        seeds: for each of which it is carried out.
        scale: see `experiment`.
        output: its folder.
        context: what it is carried out with.
        figures: whether the figures of the report become files of their own.
    """

    experiment: Experiment
    plan: Plan
    seeds: tuple[int, ...]
    scale: Scale
    output: Path
    context: RunContext
    figures: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the experiment's folder."""
        return {"experiment": self.experiment.name, "scale": self.scale}

    def jobs(self) -> Iterator[Job]:
        """Yield every stage for every seed, in order."""
        data, trainer = self.context.data, self.context.trainer
        arguments = {name: value for name, value in data_settings(data).items() if name != "batch_size"}
        circumstances = {
            "data": {"class": type(data).__name__, **arguments},
            "trainer": trainer.training_settings(),
        }
        for seed in self.seeds:
            for stage in self.plan.stages:
                yield Job(stage, seed, self.output / f"seed_{seed}", circumstances)


def prepare(
    trainer: FusionTrainer,
    model: ImageClassifier,
    datamodule: LightningDataModule,
    experiment: dict[str, Any],
    seeds: Sequence[int] | None,
    scale: Scale,
    output: str | None,
    root: str,
    report: bool = True,
    figures: bool = True,
    quiet: bool = False,
) -> PreparedExperiment:
    """Check everything that can be checked before anything is computed or written.

    Args:
        trainer: As for `run_pipeline`, and so are those below.
        model: Says only how to compute, not what.
        datamodule: The images.
        experiment: Fields of `Experiment`.
        seeds: Of the runs; None: the experiment's.
        scale: `full` or `small`.
        output: Folder of the results; None: named after the experiment, below `root`.
        root: See `output`.
        report: Whether to draw a report.
        figures: Whether its figures become files of their own.
        quiet: Whether to say only what fails.

    Raises:
        FusionError: Something cannot be used.
    """
    if seeds is not None:
        check_seeds(seeds)
    if model.network is not None or dict(model.hparams) != dict(ImageClassifier().hparams):
        raise FusionError("Expected the experiment to say what is trained and how, got --model; leave it out")
    if starts_workers_itself(trainer.strategy):
        raise FusionError("Expected a strategy that starts its processes by running the command, got another; use ddp")
    scaled, changes = from_plain(Experiment, experiment, "experiment").at(scale)
    data = changed(datamodule, changes)
    module = {"channels_last": model._channels_last, "compile": model._compiled, "fused": model._fused}
    prepared = PreparedExperiment(
        experiment=scaled,
        plan=plan(scaled, data),
        seeds=tuple(scaled.seeds if seeds is None else seeds),
        scale=scale,
        output=Path(output) if output else Path(root) / scaled.name,
        context=RunContext(trainer, data, module, report, quiet),
        figures=figures and report,
    )
    recipes = [stage.recipe for stage in prepared.plan.stages if isinstance(stage, TrainingStage)]
    modules = [prepared.context.data_for(recipe) for recipe in recipes]
    # The other ranks are waiting for this one, or do not exist yet.
    if trainer.is_global_zero:
        _check_data([data, *(module for module, recipe in zip(modules, recipes, strict=True) if recipe.data)])
        _check_folders(prepared)
    return prepared


def _check_data(modules: list[LightningDataModule]) -> None:
    """Fetch and read the images, some of which must be left to choose checkpoints by."""
    for data in modules:
        data.prepare_data()
        data.setup("fit")
        if cast(Any, data).val_size == 0:
            raise FusionError(
                "Expected validation images to choose the best epoch by, got none; raise --data.val_fraction"
            )


def _check_folders(prepared: PreparedExperiment) -> None:
    """Refuse the results of anything else, and files that are not as they were written."""
    if claimed(prepared.output, prepared.identity):
        for job in prepared.jobs():
            finished(job.folder, job.description, job.inputs)
