"""The schema of an experiment: frozen values that a file describes, checked before anything is computed."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

from clafusion import FusionOptions
from clafusion.distillation import Reduction, check_distillation
from clafusion.errors import FusionError
from clafusion.lightning_modules.distiller import TeacherKind
from clafusion.lightning_modules.experiments.parsing import from_plain
from clafusion.lightning_modules.experiments.variants import Transfers, Variants, cells

Scale = Literal["full", "small"]
#: Words that names of parents and of variants may not be, because networks are called by them.
RESERVED = frozenset({"balanced", "ensemble", "finetuned", "fused", "gated", "naive", "scratch", "transferred"})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained with SGD.

    Attributes:
        epochs: length of the training.
        lr: learning rate.
        momentum: momentum.
        weight_decay: weight decay.
        milestones: epochs at which the learning rate is multiplied by `gamma`.
        gamma: see `milestones`.
        batch_size: images per step, on all processes together; None: as the data says.
        data: arguments of the data module that differ for this training.

    Raises:
        FusionError: on construction, for a number out of range.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    batch_size: int | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise FusionError(f"Expected {name} of at least 1, got {getattr(self, name)}; change {name}")
        if "batch_size" in self.data:
            raise FusionError("Expected no batch_size in data, got one; give the recipe's batch_size")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise FusionError(f"Expected {name} of at least 0, got {getattr(self, name)}; change {name}")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `ImageClassifier`."""
        names = ("lr", "momentum", "weight_decay", "milestones", "gamma")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Parent(Recipe):
    """A network to be trained from scratch.

    Attributes:
        architecture: as for `ImageClassifier`.
    """

    architecture: dict[str, Any]

    @property
    def label_set(self) -> list[int] | None:
        """The labels of the experiment's data that its outputs stand for; None: all of them."""
        return self.data.get("label_set")


@dataclass(frozen=True, kw_only=True)
class Finetune(Recipe):
    """How networks are trained on, all of them for the same budget.

    Attributes:
        networks: names as in the table of results: a parent's, `fused VARIANT`, `balanced PARENT`,
            `transferred VARIANT`; None: all of these.
    """

    networks: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Distill(Recipe):
    """How students learn from teachers: each student with each temperature, each alpha and each length.

    Attributes:
        students: names as for `Finetune` (`NAME, finetuned` as well), or `scratch`.
        teachers: such names; several teach as an ensemble. None: the parents.
        scratch: the parent whose architecture `scratch` has; None: the last parent.
        temperatures: see `clafusion.distillation_loss`.
        alphas: see `clafusion.distillation_loss`.
        reduction: see `clafusion.distillation_loss`.
        teacher: what several teachers say together: `mean`, `gated` or `auto`, as for `Distiller`.
        gate_temperature: of the gate, as for `Distiller`.
        lengths: multiples of `epochs` and `milestones`.
    """

    students: list[str]
    teachers: list[str] | None = None
    scratch: str | None = None
    temperatures: list[float] = field(default_factory=lambda: [4.0])
    alphas: list[float] = field(default_factory=lambda: [0.9])
    reduction: Reduction = "batchmean"
    teacher: TeacherKind = "mean"
    gate_temperature: float = 1.0
    lengths: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self) -> None:
        super().__post_init__()
        FusionOptions(teacher=self.teacher, gate_temperature=self.gate_temperature)
        for temperature in self.temperatures:
            for alpha in self.alphas:
                check_distillation(temperature, alpha, self.reduction)
        for name in ("students", "temperatures", "alphas", "lengths"):
            check_distinct(name, getattr(self, name))
        if min(self.lengths) < 1:
            raise FusionError(f"Expected lengths of at least 1, got {min(self.lengths)}; change lengths")

    def grid(self) -> Iterator[tuple[str, float, float, int]]:
        """Return each student with each temperature, each alpha and each length."""
        return product(self.students, self.temperatures, self.alphas, self.lengths)

    def times(self, length: int) -> "Distill":
        """Return the recipe of a training that is so many times as long."""
        milestones = [length * milestone for milestone in self.milestones]
        return replace(self, epochs=length * self.epochs, milestones=milestones)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Parents, how they are fused, and how the results are trained on and compared.

    Attributes:
        name: of the experiment, and of its folder.
        parents: by name, in the order in which they are fused.
        controls: networks by name that are trained from scratch like the parents, and not fused.
        description: what it does, for people who choose one.
        cost: what it costs, in words.
        seeds: for each of which it is carried out.
        fusions: options by the name of the variant, or of a grid of variants.
        transfers: likewise, how one parent is transferred into the architecture of another.
        finetune: None: no finetuning.
        distill: None: no distillation.
        published: published test accuracies in percent, by the name of the network in the table.
        small: what is different with `--scale small`: any of the above, and `data`: arguments of the data module, or
            (`class`, `init_args`) another data module, which is for whoever makes them, the command line.

    Raises:
        FusionError: on construction: a name or a number cannot be used.
    """

    name: str
    parents: dict[str, Parent]
    controls: dict[str, Parent] = field(default_factory=dict)
    description: str = ""
    cost: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    fusions: dict[str, Variants] = field(default_factory=lambda: {"default": Variants()})
    transfers: dict[str, Transfers] = field(default_factory=dict)
    finetune: Finetune | None = None
    distill: Distill | None = None
    published: dict[str, float] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.parents) < 2:
            raise FusionError(f"Expected two or more parents, got {len(self.parents)}; add to experiment.parents")
        check_distinct("names of parents and controls", [*self.parents, *self.controls])
        for name in (self.name, *self.parents, *self.controls, *self.fusions, *self.transfers):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in RESERVED:
                raise FusionError(
                    f"Expected names of letters, digits, '-', '_' and '.', none of {', '.join(sorted(RESERVED))}, "
                    f"got {name!r}; change it"
                )
        check_seeds(self.seeds)
        for name, options in cells(self.fusions).items():
            self._check_fit(f"fusions.{name}", options, self.parents)
        for name, variant in cells(self.transfers).items():
            ends = [variant.target or list(self.parents)[0], variant.source or list(self.parents)[-1]]
            if ends[0] == ends[1] or not set(ends) <= self.parents.keys():
                raise FusionError(
                    f"Expected two of {', '.join(self.parents)} as target and source of transfers.{name}, got "
                    f"{' and '.join(ends)}; change them"
                )
            self._check_fit(f"transfers.{name}", variant, ends)

    def _check_fit(self, where: str, options: Variants, networks: Collection[str]) -> None:
        """Refuse options for another number of networks."""
        count, weights = len(networks), options.weights
        anchor = options.options.for_parents(list(networks)).anchor
        out_of_range = isinstance(anchor, int) and anchor >= count
        if out_of_range or (weights is not None and len(weights) != count):
            raise FusionError(
                f"Expected {where} to fit {count} parents, got anchor {options.anchor} and weights "
                f"{None if weights is None else list(weights)}; change them"
            )

    def at(self, scale: Scale) -> tuple["Experiment", dict[str, Any]]:
        """Return the experiment at a scale, and the arguments of the given data module that differ there.

        Raises:
            FusionError: `small` names something unknown, or a value of the wrong type.
        """
        # Checked at any scale: a mistake should not wait until the other one is run.
        changes = dict(self.small)
        data = changes.pop("data", None) or {}
        if "small" in changes or not isinstance(data, dict):
            raise FusionError("Expected experiment.small to hold changes, those of data by name; change it")
        small = from_plain(Experiment, _merged(_plain(self), changes), "experiment.small")
        # Another class of data is not an argument of the given one, which may be that other one already.
        own = {} if "class" in data or scale != "small" else data
        return (small if scale == "small" else self), own


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds, equal seeds, and negative ones.

    Raises:
        FusionError: Names them.
    """
    check_distinct("seeds", seeds)
    if min(seeds) < 0:
        raise FusionError(f"Expected seeds of at least 0, got {min(seeds)}; change --seeds")


def check_distinct(name: str, values: Iterable[Any]) -> None:
    """Refuse no values, and equal values.

    Raises:
        FusionError: Names them.
    """
    values = list(values)
    if not values or len(set(values)) < len(values):
        raise FusionError(f"Expected {name} to be one or more different values, got {values}; change {name}")


def _plain(experiment: Experiment) -> dict[str, Any]:
    """Return an experiment without its other scale, as plain containers."""
    found = asdict(experiment)
    del found["small"]
    return found


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values at any depth; an architecture as a whole, because it is another network then."""
    both = {
        name: _merged(old[name], value)
        if isinstance(value, dict) and isinstance(old.get(name), dict) and name != "architecture"
        else value
        for name, value in new.items()
    }
    return {**old, **both}
