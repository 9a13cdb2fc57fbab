"""Train a parent from scratch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.experiments.stages.base import Draft, Network
from clafusion.lightning_modules.experiments.stages.training import TrainingStage


@dataclass(frozen=True)
class TrainStage(TrainingStage):
    """Train a parent from scratch.

    Attributes:
        architecture: as for `ImageClassifier`.
    """

    kind: ClassVar[str] = "train"
    architecture: dict[str, Any]

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["TrainStage"]:
        """Yield one stage for each parent."""
        for name, parent in draft.experiment.parents.items():
            outputs = {name: Network("best.ckpt", "parent")}
            yield cls(name, {}, outputs, draft.recipe(parent), draft.architectures[name])

    def module(self, inputs: Mapping[str, Path], arguments: dict[str, Any]) -> ImageClassifier:
        """Return a network with fresh weights."""
        return ImageClassifier(self.architecture, **arguments)

    @property
    def _purpose(self) -> str:
        # Each parent begins with weights of its own.
        return self.name
