"""The plan of an experiment: which stages there are, what each needs and what it gives, before any of them runs."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from clafusion import FusionOptions, map_units
from clafusion.alignment.parents import template_of, trace_all
from clafusion.errors import FusionError
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.compatibility import ImageData, check_images
from clafusion.lightning_modules.experiments.schema import Experiment, check_distinct
from clafusion.lightning_modules.experiments.variants import cells, ratio

Kind = Literal["train", "fuse", "transfer", "finetune", "distil", "evaluate"]
#: The options that a balanced network depends on.
_BALANCING = (
    *("layer_measure", "debiased", "pin_first", "pin_last", "mapping", "balance", "relu"),
    *("streams", "anchor", "many", "num_samples", "seed"),
)


@dataclass(frozen=True)
class Stage:
    """One step of an experiment, for one seed.

    Attributes:
        kind: what is done.
        subject: what it is done to, or what it makes, in words.
        settings: how, as plain values.
        inputs: by the name of the network, the file it is in, relative to the folder of the seed.
        outputs: by the name of the network, the file it leaves in its folder.
    """

    kind: Kind
    subject: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]

    @property
    def name(self) -> str:
        """The name of the stage's folder."""
        return slug(f"{self.kind} {self.subject}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the stages whose files it reads."""
        return tuple(dict.fromkeys(file.partition("/")[0] for file in self.inputs.values()))

    @property
    def files(self) -> dict[str, str]:
        """Where others find its networks, relative to the folder of the seed."""
        return {network: f"{self.name}/{file}" for network, file in self.outputs.items()}

    def seed(self, seed: int) -> int:
        """The seed of the stage in the run of a seed: parents differ, what is to be compared shares its order."""
        purpose = self.name if self.kind == "train" else self.kind
        return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Plan:
    """The stages in their order, and what of their results is shown.

    Attributes:
        stages: for one seed; every stage comes after those that it needs.
        makers: by the name of a network, the name of the stage that makes it.
    """

    stages: tuple[Stage, ...]
    makers: dict[str, str]

    @property
    def evaluations(self) -> dict[str, str]:
        """By the name of a network, the name of the stage that evaluates it, in the order of the table."""
        return {stage.subject: stage.name for stage in self.stages if stage.kind == "evaluate"}


def slug(name: str) -> str:
    """A name that a file can have."""
    return name.replace(", ", "_").replace(" ", "_").replace("=", "").replace(":", "-")


def plan(experiment: Experiment, data: ImageData) -> Plan:
    """Plans an experiment.

    Args:
        experiment: What to do.
        data: Says what shape the images have.

    Raises:
        FusionError: A network cannot be built, does not fit the data or the others, or a name is not that of a network.
    """
    built: dict[str, ImageClassifier] = {}
    for name, parent in experiment.parents.items():
        # Parents that are built alike are looked at once.
        if repr(parent.architecture) not in built:
            built[repr(parent.architecture)] = _built(parent.architecture, data, f"experiment.parents.{name}")
    networks = {name: built[repr(parent.architecture)] for name, parent in experiment.parents.items()}
    architectures = {name: classifier.hparams["architecture"] for name, classifier in networks.items()}
    stages = [
        Stage("train", name, {"recipe": parent.plain(), "architecture": architectures[name]}, {}, {name: "best.ckpt"})
        for name, parent in experiment.parents.items()
    ]
    parents = _files(stages)
    stages += _fusions(experiment, networks, data, parents)
    stages += _transfers(experiment, networks, parents)
    stages += _finetunings(experiment, _files(stages))
    stages += _distillations(experiment, _files(stages), architectures)
    stages += _evaluations(experiment, stages, architectures)
    check_distinct("names of stages", [stage.name for stage in stages])
    made = {network: stage.name for stage in stages for network in stage.outputs}
    found = Plan(tuple(stages), made)
    for name in experiment.published:
        _check_known(name, found.evaluations, "experiment.published")
    return found


def _files(stages: Iterable[Stage]) -> dict[str, str]:
    """Where each network is that has a file of its own."""
    return {network: file for stage in stages for network, file in stage.files.items()}


def _fusions(
    experiment: Experiment, networks: dict[str, ImageClassifier], data: ImageData, parents: dict[str, str]
) -> list[Stage]:
    """The stages that fuse; what balances the parents in the same way leaves its balanced networks only once."""
    variants = cells(experiment.fusions)
    structures: dict[str, Any] = {}
    kept = {variant: _balancing(options) for variant, options in variants.items() if options.balanced}
    written = _first_with(kept)
    stages = []
    for variant, options in variants.items():
        outputs = {f"fused {variant}": "fused.ckpt"}
        changed = _balanced(variant, networks, data, options, structures)
        if variant in written:
            word = f" {variant}" if written[variant] else ""
            outputs |= {f"balanced {name}{word}": f"balanced_{slug(name)}.ckpt" for name in changed}
        settings = {"options": options.options.to_dict(), "balanced": changed if variant in written else []}
        stages.append(Stage("fuse", variant, settings, parents, outputs))
    return stages


def _balancing(options: FusionOptions) -> tuple[Any, ...]:
    """What a balanced network depends on; one after another, parents are balanced with what the weights made."""
    weights = options.weights if options.many == "iterative" else None
    return weights, *(getattr(options, name) for name in _BALANCING)


def _first_with(keys: Mapping[str, Any]) -> dict[str, bool]:
    """The first variant of each key, and whether names must tell it: the first one of all needs no word for it."""
    found: dict[Any, str] = {}
    for variant, key in keys.items():
        found.setdefault(key, variant)
    return {variant: number > 0 for number, variant in enumerate(found.values())}


def _balanced(
    variant: str, networks: dict[str, ImageClassifier], data: ImageData, options: FusionOptions, known: dict[str, Any]
) -> list[str]:
    """The names of the parents that balancing changes; what is `known` of their structures is told to the next call.

    Raises:
        FusionError: The parents cannot be fused.
    """
    # The random numbers that it draws are nobody's: every stage begins with a seed of its own.
    modules = [_network(classifier).eval() for classifier in networks.values()]
    try:
        known["structures"] = known.get("structures") or trace_all(modules, torch.zeros(2, *data.image_shape))
        template = template_of(known["structures"], options)
    except FusionError as error:
        numbered = ", ".join(f"parent {number}: {name}" for number, name in enumerate(networks))
        raise FusionError(f"{error} (in experiment.fusions.{variant}; {numbered})") from error
    depths = [[len(stage) for stage in structure.stages] for structure in known["structures"]]
    return [name for name, depth in zip(networks, depths, strict=True) if depth != depths[template]]


def _transfers(experiment: Experiment, networks: dict[str, ImageClassifier], parents: dict[str, str]) -> list[Stage]:
    """The stages that transfer one parent into the architecture of another.

    Raises:
        FusionError: A pair has layers that do not correspond.
    """
    stages = []
    mapped: set[tuple[str, str]] = set()
    for variant, how in cells(experiment.transfers).items():
        target, source = how.target or list(parents)[0], how.source or list(parents)[-1]
        try:
            # Whether the pair corresponds is the same for all variants.
            if (source, target) not in mapped:
                map_units(_network(networks[source]).eval(), _network(networks[target]).eval(), "chain")
        except FusionError as error:
            raise FusionError(f"{error} (in experiment.transfers.{variant})") from error
        mapped.add((source, target))
        inputs = {name: parents[name] for name in (source, target)}
        made = {f"transferred {variant}": "transferred.ckpt"}
        stages.append(Stage("transfer", variant, how.settings(), inputs, made))
    return stages


def _finetunings(experiment: Experiment, files: dict[str, str]) -> list[Stage]:
    """The stages that train networks on."""
    recipe = experiment.finetune
    if recipe is None:
        return []
    names = list(files) if recipe.networks is None else recipe.networks
    check_distinct("experiment.finetune.networks", names)
    for name in names:
        _check_known(name, files, "experiment.finetune.networks")
    settings = {"recipe": recipe.plain()}
    return [
        Stage("finetune", name, settings, {name: files[name]}, {f"{name}, finetuned": "best.ckpt"}) for name in names
    ]


def _distillations(experiment: Experiment, files: dict[str, str], architectures: dict[str, Any]) -> list[Stage]:
    """The stages that distil."""
    recipe = experiment.distill
    if recipe is None:
        return []
    teachers = list(experiment.parents) if recipe.teachers is None else recipe.teachers
    check_distinct("experiment.distill.teachers", teachers)
    for name in teachers:
        _check_known(name, files, "experiment.distill.teachers")
    for name in recipe.students:
        _check_known(name, [*files, "scratch"], "experiment.distill.students")
    scratch = recipe.scratch or list(architectures)[-1]
    _check_known(scratch, architectures, "experiment.distill.scratch")
    stages = []
    for student, temperature, alpha in recipe.grid():
        settings = {
            "recipe": recipe.plain(),
            "teachers": teachers,
            "student": student,
            "architecture": architectures[scratch] if student == "scratch" else None,
            "temperature": temperature,
            "alpha": alpha,
            "reduction": recipe.reduction,
        }
        inputs = {name: files[name] for name in (*teachers, student) if name != "scratch"}
        name = f"{student} T={temperature:g} alpha={alpha:g}"
        stages.append(Stage("distil", name, settings, inputs, {f"{name}, distilled": "best.ckpt"}))
    return stages


def _evaluations(experiment: Experiment, stages: list[Stage], architectures: dict[str, Any]) -> list[Stage]:
    """One stage for each network: the parents, what needs no training, then the others as they came about."""
    files = _files(stages)
    parents = {name: files[name] for name in experiment.parents}
    first = [Stage("evaluate", name, {}, {name: file}, {}) for name, file in parents.items()]
    described = list(architectures.values())
    kinds = ["ensemble", *(["naive average"] if all(other == described[0] for other in described) else [])]
    weights_of = {variant: options.weights for variant, options in cells(experiment.fusions).items()} or {"": None}
    for kind in kinds:
        for variant, told in _first_with(weights_of).items():
            weights = weights_of[variant]
            settings = {"combination": kind, "weights": None if weights is None else list(weights)}
            word = f" weights={'equal' if weights is None else ratio(weights)}" if told else ""
            first.append(Stage("evaluate", f"{kind}{word}", settings, parents, {}))
    others = {name: file for name, file in files.items() if name not in parents}
    return first + [Stage("evaluate", name, {}, {name: file}, {}) for name, file in others.items()]


def _built(architecture: dict[str, Any], data: ImageData, where: str) -> ImageClassifier:
    """A network that is built only to see what it is, and whether it fits the data."""
    try:
        classifier = ImageClassifier(architecture)
    except FusionError as error:
        raise FusionError(f"{error} (in {where}.architecture)") from error
    check_images(_network(classifier), data, where)
    return classifier


def _network(classifier: ImageClassifier) -> nn.Module:
    assert classifier.network is not None
    return classifier.network


def _check_known(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        raise FusionError(f"Expected {where} to name one of {'; '.join(known)}, got {name!r}; change it")
