"""Variants of a fusion or of a transfer: one entry of an experiment, or a grid of them, with readable names."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any, TypeVar

from clafusion import FusionOptions
from clafusion.errors import FusionError
from clafusion.lightning_modules.commands.transfer import Combine, TransferSettings
from clafusion.lightning_modules.experiments.parsing import from_plain

V = TypeVar("V", bound="Variants")


@dataclass(frozen=True, kw_only=True)
class Variants(FusionOptions):
    """The options of a fusion; with a grid, of one fusion for every combination of the grid's values.

    Attributes:
        grid: by the name of an option, the values that it takes; the first name changes slowest.
        balanced: whether the balanced networks are kept and shown, too.

    Raises:
        FusionError: on construction, for any value outside its domain, in any cell of the grid.

    Example:
        >>> list(cells({"align": Variants(grid={"layer_measure": ["cka", "index"], "pin_first": [0]})}))
        ['align cka pin_first=0', 'align index pin_first=0']
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    balanced: bool = True

    def __post_init__(self) -> None:
        if self.grid:
            # Each cell is checked when it is made, and what the grid replaces need not fit.
            self._cells()
        else:
            object.__setattr__(self, "weights", self.options.weights)

    @property
    def options(self) -> FusionOptions:
        """The options of the fusion alone."""
        return FusionOptions(**{option.name: getattr(self, option.name) for option in fields(FusionOptions)})

    def _cells(self: V) -> dict[str, V]:
        """Return one variant for each combination of the grid, by its values in words; without a grid, itself."""
        for name, values in self.grid.items():
            if not values or any(value in values[:place] for place, value in enumerate(values)):
                raise FusionError(f"Expected grid.{name} to be one or more different values, got {values}; change it")
        if "grid" in self.grid:
            raise FusionError("Expected a grid of options, got one of grids; make it one grid")
        if not self.grid:
            return {"": self}
        base, found = {**asdict(self), "grid": {}}, {}
        for cell in product(*self.grid.values()):
            chosen = dict(zip(self.grid, cell, strict=True))
            words = " ".join(_word(name, value) for name, value in chosen.items())
            found[words] = from_plain(type(self), {**base, **chosen}, "grid")
        return found


@dataclass(frozen=True, kw_only=True)
class Transfers(Variants):
    """How a parent is transferred into the architecture of another; the target is the first network in `weights`.

    Attributes:
        source: the parent to take from; None: the last one.
        target: the parent to write into; None: the first one.
        join: what becomes of the transferred network, as for `clafusion transfer --combine`.
        classifier: as for `clafusion.filter_transfer.transfer`, and so are those below.
        shortcuts: see `clafusion.filter_transfer.transfer`.
        reinitialize: see `clafusion.filter_transfer.transfer`.
    """

    source: str | None = None
    target: str | None = None
    join: Combine = "none"
    classifier: bool = False
    shortcuts: bool = False
    reinitialize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.grid:
            self.how()

    def how(self) -> TransferSettings:
        """Return what to do with the two networks.

        Raises:
            FusionError: The settings do not go together.
        """
        return TransferSettings(self.join, self.classifier, self.shortcuts, self.reinitialize, self.options)


def cells(entries: Mapping[str, V]) -> dict[str, V]:
    """Return every variant by its full name: that of its entry, and what the grid says of it.

    Args:
        entries: As an experiment has them, by name.

    Raises:
        FusionError: Two have the same name.
    """
    found: dict[str, V] = {}
    for entry, variants in entries.items():
        for words, variant in variants._cells().items():
            name = f"{entry} {words}".strip()
            if name in found:
                raise FusionError(f"Expected variants of different names, got two {name!r}; rename {entry}")
            found[name] = variant
    return found


def first_with(keys: Mapping[str, Hashable]) -> dict[str, bool]:
    """Return the first variant of each key, and whether its name must be told: not for the first key of all."""
    first: dict[Hashable, str] = {}
    for variant, key in keys.items():
        first.setdefault(key, variant)
    return {variant: number > 0 for number, variant in enumerate(first.values())}


def ratio(weights: Sequence[float]) -> str:
    """Return weights in words, such as `0.3:0.7`."""
    return ":".join(f"{weight:g}" for weight in weights)


def _word(name: str, value: Any) -> str:
    """Return a value of a grid in words: a choice speaks for itself, other values need the name of their option."""
    if isinstance(value, str):
        return value
    numbers = isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value)
    shown = ratio(value) if numbers else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{name}={shown}"
