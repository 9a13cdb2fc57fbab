"""How each kind of stage is carried out: with a trainer of its own, in a folder of its own."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from clafusion import Ensemble, FusionOptions, average
from clafusion.errors import FusionError
from clafusion.lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from clafusion.lightning_modules.checkpoints.reading import load_fusion, load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.fuse import drawn, fuse_checkpoints, seeds
from clafusion.lightning_modules.commands.records import (
    peak_memory,
    reset_peak_memory,
    save_as,
    versions,
    write_results,
)
from clafusion.lightning_modules.commands.transfer import Plan as TransferPlan
from clafusion.lightning_modules.compatibility import ImageData, load_alike
from clafusion.lightning_modules.distiller import Distiller
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.experiments.plan import Stage, slug
from clafusion.lightning_modules.progress import steps


class StageTrainer(Protocol):
    """What a pipeline needs of the trainer that it is given: further ones like it."""

    @property
    def strategy(self) -> Any:
        """How the processes work together."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes and speaks."""
        ...

    def influences(self) -> dict[str, Any]:
        """The settings that change what is learnt, as plain values."""
        ...

    def another(self, folder: Path, more: list[Callback] | None, **changes: Any) -> Trainer:
        """A trainer with the same settings, besides those that change; no more callbacks than None: none at all."""
        ...


@dataclass(frozen=True)
class Workshop:
    """What all stages are carried out with.

    Attributes:
        trainer: Makes the trainers.
        data: Images; what a training changes about them is in its recipe.
        module: Arguments of every module that have no influence on the result.
        report: Whether fusions are measured for the report as well.
        quiet: Whether to show nothing of what is being done.
    """

    trainer: StageTrainer
    data: LightningDataModule
    module: dict[str, Any] = field(default_factory=dict)
    report: bool = True
    quiet: bool = False

    def data_for(self, recipe: Mapping[str, Any]) -> LightningDataModule:
        """A data module of its own for a training; its batches are shared by the processes.

        Raises:
            FusionError: There is no such argument, or the batch size cannot be shared.
        """
        total = recipe["batch_size"] or self.data.hparams["batch_size"]
        size, rest = divmod(total, self.trainer.world_size)
        if rest:
            raise FusionError(
                f"Expected a batch_size that {self.trainer.world_size} processes can share, got {total}; change it"
            )
        return changed(self.data, {**recipe["data"], "batch_size": size})


def changed(data: LightningDataModule, changes: Mapping[str, Any]) -> LightningDataModule:
    """A new data module of the same class, with some arguments changed.

    Raises:
        FusionError: There is no such argument, or the value is not one of it.
    """
    try:
        return type(data)(**{**data.hparams, **changes})
    except TypeError as error:
        raise FusionError(
            f"Expected data to be arguments of {type(data).__name__}, got {dict(changes)}: {error}; change them"
        ) from error


class Cost(Callback):
    """Seconds and peak memory of a training, those before an interruption included."""

    def __init__(self) -> None:
        self._before, self._peak = 0.0, 0
        self._started = time.perf_counter()
        self._device = torch.device("cpu")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins to count."""
        self._device = trainer.strategy.root_device
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What the training has cost so far."""
        seconds = self._before + time.perf_counter() - self._started
        return {"seconds": seconds, "peak_memory_bytes": max(self._peak, peak_memory(self._device))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what it had cost."""
        self._before, self._peak = state_dict["seconds"], state_dict["peak_memory_bytes"]


def run_stage(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path], seed: int) -> dict[str, Any]:
    """Carries out a stage, on all ranks; its files are in its folder then.

    Args:
        workshop: What to do it with.
        stage: What to do.
        folder: Where its files go, and where it goes on from if it was interrupted.
        inputs: The files of the networks that it needs.
        seed: Of the stage.

    Returns:
        What the table of results takes from it, as plain values.

    Raises:
        FusionError: It cannot be done.
    """
    seed_everything(seed, verbose=False)
    reset_peak_memory(workshop.trainer.strategy.root_device)
    return _RUNS[stage.kind](workshop, stage, folder, inputs)


def _train(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    architecture = stage.settings["architecture"]
    return _fit(workshop, stage, folder, ImageClassifier(architecture, **_recipe(stage), **workshop.module))


def _finetune(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    [path] = inputs.values()
    classifier = ImageClassifier(**_recipe(stage), **workshop.module)
    classifier.set_network(load_parent(path).float().train())
    classifier.fusion = load_fusion(path)
    return _fit(workshop, stage, folder, classifier)


def _distil(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    settings = stage.settings
    distiller = Distiller(
        teachers=[str(inputs[name]) for name in settings["teachers"]],
        student=None if settings["architecture"] else str(inputs[settings["student"]]),
        architecture=settings["architecture"],
        **{name: settings[name] for name in ("temperature", "alpha", "reduction")},
        **_recipe(stage),
        **workshop.module,
    )
    return _fit(workshop, stage, folder, distiller)


def _recipe(stage: Stage) -> dict[str, Any]:
    names = ("lr", "momentum", "weight_decay", "milestones", "gamma")
    return {name: stage.settings["recipe"][name] for name in names}


def _fit(workshop: Workshop, stage: Stage, folder: Path, module: ImageClassifier) -> dict[str, Any]:
    """Trains from the beginning, or from where it was interrupted, to the end."""
    recipe, cost, last = stage.settings["recipe"], Cost(), folder / "last.ckpt"
    data = workshop.data_for(recipe)
    trainer = workshop.trainer.another(folder, [cost], max_epochs=recipe["epochs"], enable_checkpointing=True)
    begun = on_rank_zero(workshop.trainer.strategy, last.is_file)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if begun else None, weights_only=True)
    result = cost.state_dict()
    # Weights that are not finite are the failure of this stage, not of those that would use them.
    load_parent(folder / "best.ckpt")
    return result


def _fuse(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    strategy = workshop.trainer.strategy

    def compute() -> dict[str, Any]:
        options = FusionOptions(**stage.settings["options"])
        paths, data = [str(path) for path in inputs.values()], cast(ImageData, workshop.data)
        with steps(workshop.quiet) as step:
            step(f"fusing {len(paths)} networks")
            made = fuse_checkpoints(paths, data, options, strategy.root_device)
            step("measuring for the report")
            more = {"report": drawn(made, data)} if workshop.report else {}
        fusion, record = made.fusion, {**made.record, **more}
        save_as(ImageClassifier(), fusion.model, record, folder / "fused.ckpt")
        for name in stage.settings["balanced"]:
            balanced = fusion.balanced[list(inputs).index(name)]
            save_as(ImageClassifier(), balanced, None, folder / f"balanced_{slug(name)}.ckpt")
        write_results(record, folder / "fusion.json")
        return {name: record[name] for name in ("seconds", "peak_memory_bytes")}

    return on_rank_zero(strategy, compute)


def _transfer(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    strategy, data = workshop.trainer.strategy, cast(ImageData, workshop.data)
    device = strategy.root_device

    def compute() -> dict[str, Any]:
        options = FusionOptions(**stage.settings["options"])
        plan = TransferPlan(**{**stage.settings, "options": options})
        # The source comes first, as in the plan of the stage.
        source, target = load_alike([str(path) for path in inputs.values()], data, "source and target")
        batches = [batch.to(device) for batch in data.alignment_batches(options.num_samples, options.seed)]
        started = time.perf_counter()
        with steps(workshop.quiet) as step:
            step(f"transferring {stage.subject}")
            made, how = plan.run(source.to(device), target.to(device), batches)
        cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory(device)}
        record = {**stage.settings, **how, **cost, "seeds": seeds(options), "versions": versions()}
        save_as(ImageClassifier(), made["result"], record, folder / "transferred.ckpt")
        write_results(record, folder / "transfer.json")
        return cost

    return on_rank_zero(strategy, compute)


def _evaluate(workshop: Workshop, stage: Stage, folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    networks = [load_parent(path) for path in inputs.values()]
    classifier = ImageClassifier(**workshop.module)
    # Not set_network: an ensemble has no description, and this classifier is never saved.
    classifier.network = _combined(networks, stage.settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = workshop.trainer.another(folder, None, **quiet)
    [found] = trainer.test(classifier, datamodule=workshop.data, verbose=False)
    parameters = sum(parameter.numel() for parameter in classifier.network.parameters())
    return {"test_acc": found["test_acc"], "parameters": parameters}


def _combined(networks: list[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """The network itself, or what several become without being fused."""
    combination = settings.get("combination")
    if combination is None:
        return networks[0]
    return (Ensemble if combination == "ensemble" else average)(networks, settings["weights"])


_Run = Callable[[Workshop, Stage, Path, dict[str, Path]], dict[str, Any]]
_RUNS: dict[str, _Run] = {
    "train": _train,
    "fuse": _fuse,
    "transfer": _transfer,
    "finetune": _finetune,
    "distil": _distil,
    "evaluate": _evaluate,
}
