"""The stages that train: parents from scratch, networks on, students of teachers."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from clafusion.distillation import Reduction
from clafusion.lightning import Callback, LightningModule, Trainer
from clafusion.lightning_modules.checkpoints.reading import load_fusion, load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.records import peak_memory
from clafusion.lightning_modules.distiller import Distiller, TeacherKind
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.schema import Recipe, check_distinct
from clafusion.lightning_modules.experiments.stages.base import (
    Draft,
    MakingResult,
    Network,
    Role,
    Stage,
    check_known,
    files_of,
)


class Cost(Callback):
    """Seconds and peak memory of a training, those before an interruption included."""

    def __init__(self) -> None:
        self._before, self._peak = 0.0, 0
        self._started = time.perf_counter()
        self._device = torch.device("cpu")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count."""
        self._device = trainer.strategy.root_device
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return what the training has cost so far."""
        return dict(self.so_far())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what it had cost."""
        self._before, self._peak = state_dict["seconds"], state_dict["peak_memory_bytes"]

    def so_far(self) -> MakingResult:
        """Return what the training has cost so far."""
        seconds = self._before + time.perf_counter() - self._started
        return {"seconds": seconds, "peak_memory_bytes": max(self._peak, peak_memory(self._device))}


@dataclass(frozen=True)
class TrainingStage(Stage):
    """A stage that trains a network, and goes on from where it was interrupted.

    Attributes:
        recipe: how to train.
    """

    recipe: Recipe

    @abstractmethod
    def module(self, inputs: Mapping[str, Path], arguments: dict[str, Any]) -> ImageClassifier:
        """Return the module to train.

        Args:
            inputs: The files of the networks that it needs, by name.
            arguments: Arguments of `ImageClassifier`.
        """

    def _run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> MakingResult:
        """Train from the beginning, or from where it was interrupted, to the end."""
        module = self.module(inputs, {**self.recipe.arguments(), **context.module})
        cost, last = Cost(), folder / "last.ckpt"
        data = context.data_for(self.recipe)
        trainer = context.trainer.clone(folder, [cost], max_epochs=self.recipe.epochs, enable_checkpointing=True)
        begun = on_rank_zero(context.trainer.strategy, last.is_file)
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if begun else None, weights_only=True)
        result = cost.so_far()
        # Weights that are not finite are the failure of this stage, not of those that would use them.
        load_parent(folder / "best.ckpt")
        return result


@dataclass(frozen=True)
class TrainStage(TrainingStage):
    """Train a parent, or a control, from scratch.

    Attributes:
        architecture: as for `ImageClassifier`.
    """

    kind: ClassVar[str] = "train"
    architecture: dict[str, Any]

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["TrainStage"]:
        """Yield one stage for each parent, then one for each control."""
        for name, network in (draft.experiment.parents | draft.experiment.controls).items():
            outputs = {name: Network("best.ckpt", "parent" if name in draft.parents else "control")}
            yield cls(name, {}, outputs, draft.recipe(network), draft.architectures[name])

    def module(self, inputs: Mapping[str, Path], arguments: dict[str, Any]) -> ImageClassifier:
        """Return a network with fresh weights."""
        return ImageClassifier(self.architecture, **arguments)

    @property
    def _purpose(self) -> str:
        # Each parent begins with weights of its own.
        return self.name


@dataclass(frozen=True)
class FinetuneStage(TrainingStage):
    """Train a network on, for the same budget as all others."""

    kind: ClassVar[str] = "finetune"

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["FinetuneStage"]:
        """Yield one stage for each network to finetune; without names, for all that have a file.

        Raises:
            FusionError: There is no network of that name.
        """
        finetune, networks = draft.experiment.finetune, draft.networks
        if finetune is None:
            return
        names = list(networks) if finetune.networks is None else finetune.networks
        check_distinct("experiment.finetune.networks", names)
        check_known(names, networks, "experiment.finetune.networks")
        draft.check_all_classes(names, "experiment.finetune.networks")
        for name in names:
            outputs = {f"{name}, finetuned": Network("best.ckpt", networks[name].role_when_trained)}
            yield cls(name, files_of(networks, [name]), outputs, draft.recipe(finetune))

    def module(self, inputs: Mapping[str, Path], arguments: dict[str, Any]) -> ImageClassifier:
        """Return the network, with the record of its fusion if it has one."""
        [path] = inputs.values()
        classifier = ImageClassifier(**arguments)
        classifier.set_network(load_parent(path).float().train())
        classifier.fusion = load_fusion(path)
        return classifier


@dataclass(frozen=True)
class DistilStage(TrainingStage):
    """Train a student to answer as its teachers do.

    Attributes:
        teachers: the names of the teachers.
        student: the name of the network that the student starts from, or `scratch`.
        architecture: of a student from scratch; None: that of its network.
        temperature: see `clafusion.distillation_loss`.
        alpha: see `clafusion.distillation_loss`.
        reduction: see `clafusion.distillation_loss`.
        teacher: see `Distiller`.
        gate_temperature: see `Distiller`.
        classes: per teacher the labels that its outputs stand for; None: those of the data.
    """

    kind: ClassVar[str] = "distil"
    teachers: list[str]
    student: str
    architecture: dict[str, Any] | None
    temperature: float
    alpha: float
    reduction: Reduction
    teacher: TeacherKind = "mean"
    gate_temperature: float = 1.0
    classes: list[list[int]] | None = None

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["DistilStage"]:
        """Yield one stage for each student, temperature, alpha and length.

        Raises:
            FusionError: There is no network of that name.
        """
        distill, networks = draft.experiment.distill, draft.networks
        if distill is None:
            return
        teachers = list(draft.parents) if distill.teachers is None else distill.teachers
        check_distinct("experiment.distill.teachers", teachers)
        check_known(teachers, networks, "experiment.distill.teachers")
        check_known(distill.students, [*networks, "scratch"], "experiment.distill.students")
        scratch = distill.scratch or list(draft.parents)[-1]
        check_known([scratch], draft.parents, "experiment.distill.scratch")
        begun_at = [scratch if student == "scratch" else student for student in distill.students]
        draft.check_all_classes(begun_at, "experiment.distill.students")
        for student, temperature, alpha, length in distill.grid():
            begun = networks.get(student)
            role: Role = begun.role_when_trained if begun else "control"
            subject = f"{student} T={temperature:g} alpha={alpha:g}{'' if length == 1 else f' x{length}'}"
            yield cls(
                subject=subject,
                inputs=files_of(networks, [*teachers, student] if begun else teachers),
                outputs={f"{subject}, distilled": Network("best.ckpt", role)},
                recipe=draft.recipe(distill.times(length)),
                teachers=teachers,
                student=student,
                architecture=None if begun else draft.architectures[scratch],
                temperature=temperature,
                alpha=alpha,
                reduction=distill.reduction,
                teacher=distill.teacher,
                gate_temperature=distill.gate_temperature,
                classes=draft.label_sets(teachers),
            )

    def module(self, inputs: Mapping[str, Path], arguments: dict[str, Any]) -> Distiller:
        """Return the student with its teachers."""
        return Distiller(
            teachers=[str(inputs[name]) for name in self.teachers],
            student=None if self.architecture else str(inputs[self.student]),
            architecture=self.architecture,
            temperature=self.temperature,
            alpha=self.alpha,
            reduction=self.reduction,
            teacher=self.teacher,
            gate_temperature=self.gate_temperature,
            classes=self.classes,
            **arguments,
        )
