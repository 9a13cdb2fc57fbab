"""The plan of an experiment: its stages, each after those that it needs, before any of them runs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from clafusion.errors import FusionError
from clafusion.formats.files import restore
from clafusion.lightning import LightningDataModule
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData, check_images
from clafusion.lightning_modules.experiments.context import changed
from clafusion.lightning_modules.experiments.parsing import from_plain
from clafusion.lightning_modules.experiments.schema import Experiment, check_distinct
from clafusion.lightning_modules.experiments.stages.base import Draft, Role, Stage, check_known
from clafusion.lightning_modules.experiments.stages.evaluation import EvaluateStage
from clafusion.lightning_modules.experiments.stages.fusing import FuseStage, TransferStage
from clafusion.lightning_modules.experiments.stages.training import DistilStage, FinetuneStage, TrainStage

#: In the order of the plan: each kind may use the networks of those before it.
KINDS: tuple[type[Stage], ...] = (TrainStage, FuseStage, TransferStage, FinetuneStage, DistilStage, EvaluateStage)


@dataclass(frozen=True)
class Contestant:
    """A network of the table of results.

    Attributes:
        name: its name.
        role: its part in the comparison.
        evaluation: the name of the stage that evaluates it.
        maker: the name of the stage that makes it; None for a combination of the parents, which costs nothing to make.
    """

    name: str
    role: Role
    evaluation: str
    maker: str | None


@dataclass(frozen=True)
class Plan:
    """The stages of an experiment for one seed; every stage comes after those that it needs."""

    stages: tuple[Stage, ...]

    @property
    def contestants(self) -> list[Contestant]:
        """The networks of the table of results, in its order."""
        makers = {name: stage for stage in self.stages for name in stage.outputs}
        found = []
        for stage in self.stages:
            if isinstance(stage, EvaluateStage):
                maker = makers.get(stage.subject)
                role = maker.outputs[stage.subject].role if maker else "control"
                found.append(Contestant(stage.subject, role, stage.name, maker.name if maker else None))
        return found


def plan(experiment: Experiment, data: LightningDataModule) -> Plan:
    """Plan an experiment.

    Args:
        experiment: What to do.
        data: Says what shape the images have.

    Raises:
        FusionError: A network cannot be built, does not fit the data or the others, or a name is not that of a network.
    """
    known: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    built: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for group in ("parents", "controls"):
        for name, network in getattr(experiment, group).items():
            # Networks that are built alike are looked at once.
            key = repr((network.architecture, network.label_set))
            if key not in known:
                own = data if network.label_set is None else changed(data, {"label_set": network.label_set})
                known[key] = _built(network.architecture, own, f"experiment.{group}.{name}")
            built[name] = known[key]
    draft = Draft(
        experiment,
        data,
        {name: built[name][0] for name in experiment.parents},
        {name: architecture for name, (_, architecture) in built.items()},
    )
    for kind in KINDS:
        draft = replace(draft, stages=(*draft.stages, *kind.plan(draft)))
    check_distinct("names of stages", [stage.name for stage in draft.stages])
    planned = Plan(draft.stages)
    check_known(experiment.published, [row.name for row in planned.contestants], "experiment.published")
    return planned


def stage_from(record: Mapping[str, Any]) -> Stage:
    """Return the stage that a `stage.json` describes.

    Args:
        record: The content of the file.

    Raises:
        FusionError: It is not a record of a stage.
    """
    description = record["description"]
    kind = {kind.kind: kind for kind in KINDS}[description["kind"]]
    common = {"subject": record["name"], "inputs": description["inputs"], "outputs": record["outputs"]}
    return from_plain(kind, {**common, **description["settings"]}, "stage")


def _built(architecture: dict[str, Any], data: LightningDataModule, where: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that a stage will train, in eval mode, only to see what it is, and whether it fits the data.

    Returns:
        The network and its canonical architecture.
    """
    try:
        classifier = ImageClassifier(architecture)
    except FusionError as error:
        raise FusionError(f"{error} (in {where}.architecture)") from error
    images = cast(ImageData, data)
    check_images(cast(nn.Module, classifier.network).eval(), images, where)
    classifier.describe_for(images.image_shape)
    canonical = classifier.hparams["architecture"]
    return restore(canonical).eval(), canonical
