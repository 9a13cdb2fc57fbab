"""An experiment that has been checked and laid out as jobs, before anything of it is computed or written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from clafusion.errors import FusionError
from clafusion.lightning import LightningDataModule, starts_workers_itself
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.experiments.parsing import from_plain
from clafusion.lightning_modules.experiments.plan import Plan, Stage, plan
from clafusion.lightning_modules.experiments.schema import Experiment, Scale, check_seeds
from clafusion.lightning_modules.experiments.stage_folder import claimed, finished
from clafusion.lightning_modules.experiments.stages import StageTrainer, Workshop, changed

#: Arguments of data modules that do not change what a network learns; the batch size is in the recipes.
_INDIFFERENT = frozenset({"batch_size", "eval_batch_size", "num_workers", "data_dir", "download"})


@dataclass(frozen=True)
class Job:
    """A stage for a seed, in its folder.

    Attributes:
        stage: what to do.
        seed: the experiment's.
        home: the folder of the seed.
        description: all that the result depends on besides the content of its inputs.
    """

    stage: Stage
    seed: int
    home: Path
    description: dict[str, Any]

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
        """What people call it."""
        return f"{self.stage.kind} {self.stage.subject}, seed {self.seed}"


@dataclass(frozen=True)
class Order:
    """An experiment that has been checked.

    Attributes:
        experiment: at the scale that was asked for.
        plan: its stages.
        seeds: for each of which it is carried out.
        scale: see `experiment`.
        output: its folder.
        workshop: what it is carried out with.
        figures: whether the figures of the report become files of their own.
    """

    experiment: Experiment
    plan: Plan
    seeds: tuple[int, ...]
    scale: Scale
    output: Path
    workshop: Workshop
    figures: bool = True

    @property
    def quiet(self) -> bool:
        """Whether to say only what fails."""
        return self.workshop.quiet

    @property
    def identity(self) -> dict[str, Any]:
        """What its folder is known by."""
        return {"experiment": self.experiment.name, "scale": self.scale}

    def jobs(self) -> Iterator[Job]:
        """Every stage for every seed, in order."""
        data = self.workshop.data
        kept = {name: value for name, value in data.hparams.items() if name not in _INDIFFERENT}
        common = {"data": {"class": type(data).__name__, **kept}, "trainer": self.workshop.trainer.influences()}
        for seed in self.seeds:
            for stage in self.plan.stages:
                settings = {**stage.settings}
                if "recipe" in settings:
                    size = settings["recipe"]["batch_size"] or data.hparams["batch_size"]
                    settings["recipe"] = {**settings["recipe"], "batch_size": size}
                own = {"kind": stage.kind, "settings": settings, "inputs": stage.inputs, "seed": stage.seed(seed)}
                yield Job(stage, seed, self.output / f"seed_{seed}", {**own, **common})


def prepare(
    trainer: StageTrainer,
    model: ImageClassifier,
    datamodule: LightningDataModule,
    experiment: dict[str, Any],
    seeds: Sequence[int] | None,
    scale: Scale,
    output: str | None,
    root: str,
    report: bool = True,
    quiet: bool = False,
) -> Order:
    """Checks everything that can be checked before anything is computed or written.

    Args:
        trainer: As for `FusionTrainer.pipeline`, and so are those below.
        model: Says only how to compute, not what.
        datamodule: The images.
        experiment: Fields of `Experiment`.
        seeds: Of the runs; None: the experiment's.
        scale: `full` or `small`.
        output: Folder of the results; None: named after the experiment, below `root`.
        root: See `output`.
        report: Whether to draw what came of it.
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
    whole, changes = from_plain(Experiment, experiment, "experiment").at(scale)
    data = changed(datamodule, changes)
    module = {"channels_last": model._channels_last, "compile": model._compiled, "fused": model._fused}
    workshop = Workshop(trainer, data, module, report, quiet)
    folder = Path(output) if output else Path(root) / whole.name
    chosen = tuple(whole.seeds if seeds is None else seeds)
    order = Order(whole, plan(whole, cast(ImageData, data)), chosen, scale, folder, workshop)
    recipes = [stage.settings["recipe"] for stage in order.plan.stages if "recipe" in stage.settings]
    own = [workshop.data_for(recipe) for recipe in recipes]
    # The other ranks are waiting for this one, or do not exist yet.
    if trainer.is_global_zero:
        _check_data([data, *(found for found, recipe in zip(own, recipes, strict=True) if recipe["data"])])
        _check_folders(order)
    return order


def _check_data(modules: list[LightningDataModule]) -> None:
    """Fetches and reads the images, of which some must be left to choose checkpoints by."""
    for data in modules:
        data.prepare_data()
        data.setup("fit")
        if cast(Any, data).val_size == 0:
            raise FusionError(
                "Expected validation images to choose the best epoch by, got none; raise --data.val_fraction"
            )


def _check_folders(order: Order) -> None:
    """Refuses the results of anything else, and files that are not as they were written."""
    if claimed(order.output, order.identity):
        for job in order.jobs():
            finished(job.folder, job.description, job.inputs)
