"""Evaluate a network, or what the parents are together without being fused, on the test images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from clafusion import Ensemble, average
from clafusion.lightning_modules.checkpoints.reading import load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.stages.base import Draft, EvaluationResult, Stage, files_of
from clafusion.lightning_modules.experiments.variants import cells, first_with, ratio

Combination = Literal["ensemble", "naive average"]


@dataclass(frozen=True)
class EvaluateStage(Stage):
    """Evaluate a network, or what the parents are together without being fused.

    Attributes:
        combination: what is made of several networks; None: there is one.
        weights: the weight of each of them; None: equal.
    """

    kind: ClassVar[str] = "evaluate"
    combination: Combination | None = None
    weights: list[float] | None = None

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["EvaluateStage"]:
        """Yield one stage for each network: parents, their combinations, then the others in the order of the plan."""
        networks = draft.networks
        for name in draft.parents:
            yield cls(name, files_of(networks, [name]), {})
        yield from cls._combinations(draft)
        for name in networks:
            if name not in draft.parents:
                yield cls(name, files_of(networks, [name]), {})

    @classmethod
    def _combinations(cls, draft: Draft) -> Iterator["EvaluateStage"]:
        """Yield one stage for each combination of the parents, and each kind of weights that the fusions have."""
        inputs = files_of(draft.networks, draft.parents)
        described = list(draft.architectures.values())
        alike = all(other == described[0] for other in described)
        weights_of = {variant: how.weights for variant, how in cells(draft.experiment.fusions).items()} or {"": None}
        combinations: list[Combination] = ["ensemble", "naive average"] if alike else ["ensemble"]
        for combination in combinations:
            for variant, told in first_with(weights_of).items():
                weights = weights_of[variant]
                word = f" weights={'equal' if weights is None else ratio(weights)}" if told else ""
                yield cls(f"{combination}{word}", inputs, {}, combination, None if weights is None else list(weights))

    @property
    def settings(self) -> dict[str, Any]:
        """The combination of the networks; nothing for one network."""
        return super().settings if self.combination else {}

    def _run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> EvaluationResult:
        """Measure the accuracy on the test images."""
        network = self._network([load_parent(path) for path in inputs.values()])
        classifier = ImageClassifier(**context.module)
        # Not set_network: an ensemble has no description, and this classifier is never saved.
        classifier.network = network
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = context.trainer.clone(folder, None, **quiet)
        [measured] = trainer.test(classifier, datamodule=context.data, verbose=False)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return {"test_acc": measured["test_acc"], "parameters": parameters}

    def _network(self, networks: list[nn.Module]) -> nn.Module:
        """Return the network itself, or what several are together."""
        if self.combination is None:
            return networks[0]
        return (Ensemble if self.combination == "ensemble" else average)(networks, self.weights)
