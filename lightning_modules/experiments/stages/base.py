"""The base of all kinds of stages: frozen values that are planned, written to `stage.json`, and run."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, cast

import torch
from torch import Tensor, nn

from clafusion import FusionOptions
from clafusion.errors import FusionError
from clafusion.lightning import LightningDataModule, seed_everything
from clafusion.lightning_modules.commands.records import reset_peak_memory
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.schema import Experiment, Recipe
from clafusion.lightning_modules.experiments.stage_folder import slug

#: The part that a network has in the comparison. `fused`: before any training; `finetuned`: a fused or transferred
#: network after finetuning or distillation; `control`: all that these are compared with, besides the parents.
Role = Literal["parent", "fused", "finetuned", "transferred", "control"]


class MakingResult(TypedDict):
    """The result of a stage that makes networks: what it has cost."""

    seconds: float
    peak_memory_bytes: int


class EvaluationResult(TypedDict):
    """The result of a stage that evaluates a network."""

    test_acc: float
    parameters: int


StageResult = MakingResult | EvaluationResult


@dataclass(frozen=True)
class Network:
    """A network with a file of its own.

    Attributes:
        file: where it is: in the folder of its stage, or relative to the folder of the seed.
        role: its part in the comparison.
    """

    file: str
    role: Role

    @property
    def role_when_trained(self) -> Role:
        """The part that it has after finetuning or distillation."""
        return "control" if self.role in ("parent", "control") else "finetuned"


@dataclass(frozen=True)
class Stage(ABC):
    """One step of an experiment, for one seed. Each kind is a subclass, whose further fields are its settings.

    Attributes:
        kind: the name of the kind, in `stage.json` and in the names of folders.
        subject: the name of what is done, or of the network that it is done to.
        inputs: by the name of the network, its file, relative to the folder of the seed.
        outputs: the networks that it leaves in its folder, by name.
    """

    kind: ClassVar[str]
    subject: str
    inputs: dict[str, str]
    outputs: dict[str, Network]

    @classmethod
    @abstractmethod
    def plan(cls, draft: "Draft") -> Iterator["Stage"]:
        """Yield the stages of this kind that an experiment has.

        Raises:
            FusionError: The experiment asks for something that cannot be done.
        """

    def run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path], seed: int) -> StageResult:
        """Do it, on all ranks, and leave the files of `outputs` in the folder.

        Args:
            context: What to do it with.
            folder: Where its files go, and where it goes on from if it was interrupted.
            inputs: The files of the networks that it needs, by name.
            seed: The seed of the stage.

        Raises:
            FusionError: It cannot be done.
        """
        seed_everything(seed, verbose=False)
        reset_peak_memory(context.trainer.strategy.root_device)
        return self._run(context, folder, inputs)

    @abstractmethod
    def _run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> StageResult:
        """Do it; `run` has seeded the random numbers."""

    @property
    def words(self) -> str:
        """The stage as messages call it."""
        return f"{self.kind} {self.subject}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return slug(self.words)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of its kind, as plain values."""
        common = {field.name for field in fields(Stage)}
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name not in common}

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the stages whose files it reads."""
        return tuple(dict.fromkeys(file.partition("/")[0] for file in self.inputs.values()))

    @property
    def files(self) -> list[str]:
        """The files that it leaves in its folder."""
        return [network.file for network in self.outputs.values()]

    @property
    def networks(self) -> dict[str, Network]:
        """Its outputs, as other stages find them: their files are relative to the folder of the seed."""
        return {name: Network(f"{self.name}/{made.file}", made.role) for name, made in self.outputs.items()}

    def seed(self, seed: int) -> int:
        """Return the seed of the stage in the run of a seed: stages that are compared share the order of the images."""
        return int.from_bytes(hashlib.sha256(f"{seed} {self._purpose}".encode()).digest()[:4], "big")

    @property
    def _purpose(self) -> str:
        """Stages of one purpose have one seed."""
        return self.kind


@dataclass(frozen=True)
class Draft:
    """An experiment that is being planned.

    Attributes:
        experiment: what to plan.
        data: the images.
        parents: the parents by name, built and not trained, in eval mode.
        architectures: the canonical architectures of parents and controls.
        stages: what has been planned so far.
    """

    experiment: Experiment
    data: LightningDataModule
    parents: dict[str, nn.Module]
    architectures: dict[str, dict[str, Any]]
    stages: tuple[Stage, ...] = ()

    @property
    def blank_images(self) -> Tensor:
        """Two images of the shape of the data."""
        return torch.zeros(2, *cast(ImageData, self.data).image_shape)

    @property
    def networks(self) -> dict[str, Network]:
        """The networks with files of their own, by name; the files are relative to the folder of the seed."""
        return {name: network for stage in self.stages for name, network in stage.networks.items()}

    def label_sets(self, names: Iterable[str]) -> list[list[int]] | None:
        """Return per network the labels of the data that its outputs stand for; None if they are all of them."""
        own = [parent and parent.label_set for parent in map(self.experiment.parents.get, names)]
        every = list(range(cast(ImageData, self.data).num_classes))
        return [labels or every for labels in own] if any(own) else None

    def check_all_classes(self, names: Iterable[str], where: str) -> None:
        """Refuse networks that know some of the data's classes alone.

        Raises:
            FusionError: Names the first of them.
        """
        for name in names:
            if self.label_sets([name]) is not None:
                raise FusionError(
                    f"Expected networks with all classes of the data in {where}, got {name!r} with a label_set; "
                    "name others"
                )

    def recipe(self, given: Recipe) -> Recipe:
        """Return a recipe without what is trained by it, and with the batch size of the data if it names none."""
        values = {field.name: getattr(given, field.name) for field in fields(Recipe)}
        return Recipe(**{**values, "batch_size": given.batch_size or self.data.hparams["batch_size"]})


def files_of(networks: Mapping[str, Network], names: Iterable[str]) -> dict[str, str]:
    """Return the files of some networks by name."""
    return {name: networks[name].file for name in names}


def check_known(names: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse names that are not among the known ones.

    Raises:
        FusionError: Lists these.
    """
    for name in names:
        if name not in known:
            raise FusionError(f"Expected {where} to name one of {'; '.join(known)}, got {name!r}; change it")


def _plain(value: Any) -> Any:
    if isinstance(value, FusionOptions):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
