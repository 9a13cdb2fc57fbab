"""A whole experiment in one call: `clafusion pipeline`."""

from collections.abc import Mapping, Sequence
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import LightningDataModule, ModelCheckpoint, Strategy
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.experiments.jobs import prepare
from clafusion.lightning_modules.experiments.results_table import ExperimentResults
from clafusion.lightning_modules.experiments.runner import run_experiment
from clafusion.lightning_modules.experiments.schema import Scale
from clafusion.lightning_modules.trainer import FusionTrainer

#: Arguments that the experiment decides on, and what they are when nobody has given them.
_DECIDED: dict[str, Any] = {
    "max_epochs": (None,), "min_epochs": (None,), "max_steps": (None, -1), "min_steps": (None,), "max_time": (None,),
    "fast_dev_run": (None, False), "barebones": (None, False), "limit_test_batches": (None, 1.0),
}  # fmt: skip


def run_pipeline(
    trainer: FusionTrainer,
    model: ImageClassifier,
    datamodule: LightningDataModule,
    experiment: dict[str, Any],
    seeds: Sequence[int] | None = None,
    scale: Scale = "full",
    output: str | None = None,
    report: bool = True,
    figures: bool = True,
    quiet: bool = False,
) -> ExperimentResults:
    """Carry out a whole experiment: train parents, fuse, finetune, distil, evaluate, compare.

    Every stage has a folder of its own below the output. The same command goes on where it was interrupted, and
    does nothing again that is finished. When a stage fails, those that do not need it go on. The table of all
    networks is printed and lies in `results.json`, `results.csv` and `results.md`; `report.html` shows it all.

    Args:
        trainer: Makes the trainers of the stages.
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
    _check_arguments(trainer.arguments)
    root = trainer.arguments["default_root_dir"]
    prepared = prepare(trainer, model, datamodule, experiment, seeds, scale, output, root, report, figures, quiet)
    return run_experiment(prepared)


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments that stages cannot share, or that the experiment decides on.

    Raises:
        FusionError: Names the argument.
    """
    for name, absent in _DECIDED.items():
        if given.get(name) not in absent:
            raise FusionError(
                f"Expected the experiment to decide on {name}, got {given[name]}; leave out trainer.{name}"
            )
    if not isinstance(given["logger"], bool | None):
        raise FusionError("Expected a logger for each stage, got one for all; give trainer.logger true or false")
    if isinstance(given.get("strategy"), Strategy):
        raise FusionError(
            "Expected a strategy by its name, which every stage can make for itself, got an object; name it"
        )
    if any(isinstance(callback, ModelCheckpoint) for callback in given["callbacks"]):
        raise FusionError("Expected each stage to keep its best checkpoint, got a ModelCheckpoint; leave it out")
