"""Train a student to answer as its teachers do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clafusion.distillation import Reduction
from clafusion.lightning_modules.distiller import Distiller
from clafusion.lightning_modules.experiments.schema import check_distinct
from clafusion.lightning_modules.experiments.stages.base import Draft, Network, Role, check_known, files_of
from clafusion.lightning_modules.experiments.stages.training import TrainingStage


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
    """

    kind: ClassVar[str] = "distil"
    teachers: list[str]
    student: str
    architecture: dict[str, Any] | None
    temperature: float
    alpha: float
    reduction: Reduction

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["DistilStage"]:
        """Yield one stage for each student, temperature and alpha.

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
        for student, temperature, alpha in distill.grid():
            begun = networks.get(student)
            role: Role = begun.role_when_trained if begun else "control"
            subject = f"{student} T={temperature:g} alpha={alpha:g}"
            yield cls(
                subject=subject,
                inputs=files_of(networks, [*teachers, student] if begun else teachers),
                outputs={f"{subject}, distilled": Network("best.ckpt", role)},
                recipe=draft.recipe(distill),
                teachers=teachers,
                student=student,
                architecture=None if begun else draft.architectures[scratch],
                temperature=temperature,
                alpha=alpha,
                reduction=distill.reduction,
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
            **arguments,
        )
