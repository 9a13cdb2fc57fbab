"""Evaluate a network, or what the parents are together without being fused, on the test images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from clafusion import Ensemble, average
from clafusion.lightning_modules.checkpoints.reading import load_parent
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.evaluation import Widened
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.stages.base import Draft, EvaluationResult, Stage, files_of
from clafusion.lightning_modules.experiments.variants import cells, first_with, ratio

Combination = Literal["ensemble", "gated ensemble", "oracle gate", "naive average"]


@dataclass(frozen=True)
class GateSettings:
    """What the gate of an ensemble is learned from, and how; see `FusionOptions`.

    Attributes:
        gate_temperature: of the gate.
        num_samples: unlabelled training images, at most.
        seed: of their choice.
    """

    gate_temperature: float
    num_samples: int
    seed: int


class Oracle(ImageClassifier):
    """Several networks, of which the one that is right is asked for every image: no gate between them does better."""

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to `test_acc`."""
        images, labels = batch
        said = torch.stack([network(images).argmax(1) for network in cast(Ensemble, self.network).models])
        right = (said == labels).any(0)
        accuracy = self._metric("test_acc")
        accuracy.update(torch.where(right, labels, said[0]), labels)
        self.log("test_acc", accuracy, on_epoch=True)


@dataclass(frozen=True)
class EvaluateStage(Stage):
    """Evaluate a network, or what the parents are together without being fused.

    Attributes:
        combination: what is made of several networks; None: there is one.
        weights: the weight of each of them; None: equal.
        gate: of a gated ensemble.
        classes: per network the labels that its outputs stand for; None: those of the data.
    """

    kind: ClassVar[str] = "evaluate"
    combination: Combination | None = None
    weights: list[float] | None = None
    gate: GateSettings | None = None
    classes: list[list[int]] | None = None

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["EvaluateStage"]:
        """Yield one stage for each network: parents, their combinations, then the others in the order of the plan."""
        networks = draft.networks
        for name in draft.parents:
            yield cls(name, files_of(networks, [name]), {}, classes=draft.label_sets([name]))
        yield from cls._combinations(draft)
        for name in networks:
            if name not in draft.parents:
                yield cls(name, files_of(networks, [name]), {})

    @classmethod
    def _combinations(cls, draft: Draft) -> Iterator["EvaluateStage"]:
        """Yield one stage for each combination of the parents, and each kind of weights that the fusions have.

        The parents have a gate, and an oracle in its place, where a fusion is told to have one.
        """
        inputs, classes = files_of(draft.networks, draft.parents), draft.label_sets(draft.parents)
        described = [draft.architectures[name] for name in draft.parents]
        alike = classes is None and all(other == described[0] for other in described)
        fusions = cells(draft.experiment.fusions)
        weights_of = {variant: how.weights for variant, how in fusions.items()} or {"": None}
        gated = {variant: how for variant, how in fusions.items() if how.teacher == "gated"}
        gates = {v: GateSettings(how.gate_temperature, how.num_samples, how.seed) for v, how in gated.items()}
        combinations: list[Combination] = ["ensemble", "naive average"] if alike else ["ensemble"]
        for combination in combinations:
            for variant, told in first_with(weights_of).items():
                word = f" weights={_words(weights_of[variant])}" if told else ""
                yield cls(f"{combination}{word}", inputs, {}, combination, _plain(weights_of[variant]), None, classes)
        for variant, told in first_with({v: (weights_of[v], gate) for v, gate in gates.items()}).items():
            subject, weights = f"gated ensemble{f' {variant}' if told else ''}", _plain(weights_of[variant])
            yield cls(subject, inputs, {}, "gated ensemble", weights, gates[variant], classes)
        if gates:
            yield cls("oracle gate", inputs, {}, "oracle gate", None, None, classes)

    @property
    def settings(self) -> dict[str, Any]:
        """The combination of the networks; for one network its labels, if they are not those of the data."""
        if self.combination:
            return super().settings
        return {} if self.classes is None else {"classes": self.classes}

    def _run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> EvaluationResult:
        """Measure the accuracy on the test images."""
        networks = [load_parent(path) for path in inputs.values()]
        network = self._network(networks, cast(ImageData, context.data))
        classifier = (Oracle if self.combination == "oracle gate" else ImageClassifier)(**context.module)
        # Not set_network: an ensemble has no description, and this classifier is never saved.
        classifier.network = network
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = context.trainer.clone(folder, None, **quiet)
        [measured] = trainer.test(classifier, datamodule=context.data, verbose=False)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return {"test_acc": measured["test_acc"], "parameters": parameters}

    def _network(self, networks: list[nn.Module], data: ImageData) -> nn.Module:
        """Return the network itself, or what several are together."""
        if self.combination == "naive average":
            return average(networks, self.weights)
        if self.combination == "ensemble":
            return Ensemble(networks, self.weights, classes=self.classes)
        if self.gate is not None:
            samples = torch.cat(list(data.alignment_batches(self.gate.num_samples, self.gate.seed)))
            temperature = self.gate.gate_temperature
            return Ensemble(networks, self.weights, "gated", samples, temperature, self.classes)
        if self.classes is not None:
            pairs = zip(networks, self.classes, strict=True)
            networks = [Widened(network, torch.tensor(own), data.num_classes) for network, own in pairs]
        return Ensemble(networks) if self.combination == "oracle gate" else networks[0]


def _plain(weights: Sequence[float] | None) -> list[float] | None:
    return None if weights is None else list(weights)


def _words(weights: Sequence[float] | None) -> str:
    return "equal" if weights is None else ratio(weights)
