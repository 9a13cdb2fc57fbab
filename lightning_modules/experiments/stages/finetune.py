"""Train a network on: a fused one, or one that it is compared with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clafusion.lightning_modules.checkpoints.reading import load_fusion, load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.experiments.schema import check_distinct
from clafusion.lightning_modules.experiments.stages.base import Draft, Network, check_known, files_of
from clafusion.lightning_modules.experiments.stages.training import TrainingStage


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
