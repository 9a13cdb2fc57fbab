"""Which nodes, parameters and neurons of a parent stand for those of the template, the parent that has every unit.

Nothing is built: a unit that the parent lacks is an identity, so that the parent's stream before it stands for the
stream behind it.
"""

from clafusion.alignment.stages import Alignment, pair_stages
from clafusion.errors import FusionError
from clafusion.tracing.signatures import first_difference
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Structure, Unit
from clafusion.transport.balanced import Correspondence


def itself(structure: Structure) -> Correspondence:
    """The template seen from itself."""
    names = [node.name for node in structure.capture.graph.nodes]
    return Correspondence(
        structure,
        {unit.name: unit for unit in structure.units},
        dict(zip(names, names, strict=True)),
        {name: name for name in structure.capture.tensors},
        {name: name for name in structure.spaces.spaces},
    )


def correspond(template: Structure, parent: Structure, alignment: Alignment, called: str) -> Correspondence:
    """Pair a parent with the template.

    Args:
        template: the structure of the parent that has every unit.
        parent: the structure of another one.
        alignment: per stage of the template, the unit of it that each unit of the parent's stage stands for.
        called: what messages call the parent.

    Raises:
        FusionError: if matched units do not do the same, no identity can stand for a missing one, or neurons do not
            correspond one to one.
    """
    units = matched_units(template, parent, alignment, called)
    draft = _Draft(template, parent, called)
    stages = pair_stages(template, parent, called)
    for number, (ours, _) in enumerate(stages):
        draft.add_transition(ours[0], next(theirs[0] for _, theirs in stages[number:] if theirs))
        for unit in ours:
            if unit.name in units:
                draft.add_unit(unit, units[unit.name])
            else:
                draft.add_identity(unit)
    draft.nodes[template.capture.logits] = parent.capture.logits
    draft.add_blocks()
    return Correspondence(parent, units, draft.nodes, draft.parameters, draft.spaces, draft.identities)


def matched_units(
    template: Structure, parent: Structure, alignment: Alignment, called: str, merging: bool = False
) -> dict[str, Unit]:
    """By unit of the template the unit of the parent that stands for it.

    Args:
        template: the deeper structure.
        parent: the shallower one.
        alignment: per stage of the template, the unit of it that each unit of the parent stands for.
        called: what messages call the parent.
        merging: whether a unit of the template without a partner is folded into its successor.

    Raises:
        FusionError: if the alignment is not a strictly increasing map per stage, or matched units do not do the same.
    """
    stages = pair_stages(template, parent, called)
    if len(alignment) != len(stages):
        raise FusionError(f"Expected an alignment of {len(stages)} stages, got {len(alignment)}")
    units: dict[str, Unit] = {}
    for (ours, theirs), rows in zip(stages, alignment, strict=True):
        increasing = all(low < high for low, high in zip(rows, rows[1:], strict=False))
        if len(rows) != len(theirs) or not increasing or not all(0 <= row < len(ours) for row in rows):
            raise FusionError(
                f"Expected {len(theirs)} strictly increasing indices below {len(ours)}, got {list(rows)} for the stage "
                f"of {ours[0].name!r}"
            )
        for unit, row in zip(theirs, rows, strict=True):
            if ours[row].signature != unit.signature:
                raise FusionError(unlike(ours[row], unit, called))
            units[ours[row].name] = unit
    if merging:
        return units
    missing = next((unit for unit in template.units if unit.name not in units and not unit.insertable), None)
    if missing is not None:
        raise FusionError(
            f"Expected {called} to have a unit for {missing.name!r} of the deepest parent, got none, and no identity "
            "can stand in its place: only ReLU-like activations pass an identity; choose parents of equal depth there"
        )
    return units


def unlike(ours: Unit, theirs: Unit, called: str) -> str:
    """The message that two units do not do the same."""
    a, b = first_difference(ours.signature, theirs.signature)
    return f"Expected {called} to do in {theirs.name!r} what the deepest parent does in {ours.name!r}, got {b} for {a}"


class _Draft:
    """A correspondence under construction."""

    def __init__(self, template: Structure, parent: Structure, called: str) -> None:
        self.template, self.parent, self.called = template, parent, called
        self.nodes: dict[str, str] = {template.capture.entry: parent.capture.entry}
        self.parameters: dict[str, str] = {}
        self.spaces: dict[str, str] = {}
        self.identities: dict[str, str] = {}

    def add_transition(self, unit: Unit, other: Unit) -> None:
        """Pair the operations before a stage with those before the parent's next unit, which may lack the stage."""
        ours, theirs = self.template.transitions[unit.name], self.parent.transitions[other.name]
        if not ours.nodes and (not theirs.nodes or theirs.nodes[0] in self.nodes.values()):
            return
        if ours.signature != theirs.signature:
            a, b = first_difference(ours.signature, theirs.signature)
            raise FusionError(
                f"Expected {self.called} to do before {other.name!r} what the deepest parent does before "
                f"{unit.name!r}, got {b} for {a}"
            )
        self.nodes.update(zip(ours.nodes, theirs.nodes, strict=True))

    def add_unit(self, ours: Unit, theirs: Unit) -> None:
        """Pair what is in two units that do the same."""
        self.nodes.update(zip(ours.nodes, theirs.nodes, strict=True))
        self.nodes.setdefault(ours.input, theirs.input)
        if ours.resolution != theirs.resolution:
            raise FusionError(
                f"Expected {self.called} to give {list(ours.resolution)} positions or tokens behind {theirs.name!r}, "
                f"as the deepest parent does behind {ours.name!r}, got {list(theirs.resolution)}; choose parents of "
                "one input size"
            )
        if len(ours.parameters) != len(theirs.parameters):
            raise FusionError(
                f"Expected {theirs.name!r} of {self.called} to have {len(ours.parameters)} parameters as {ours.name!r} "
                f"has, got {len(theirs.parameters)} (bias or norm)"
            )
        for name, other in zip(ours.parameters, theirs.parameters, strict=True):
            self.parameters[name] = other
            axes = zip(self.template.axes[name], self.parent.axes[other], strict=False)
            if len(self.template.axes[name]) != len(self.parent.axes[other]):
                raise FusionError(f"Expected {other!r} of {self.called} to have as many dimensions as {name!r}")
            for axis, their_axis in axes:
                self._pair_axes(name, other, axis, their_axis)

    def add_identity(self, unit: Unit) -> None:
        """Let the stream before a unit that the parent lacks stand for the stream behind it."""
        stream = self.nodes[unit.input]
        self.nodes[unit.output] = self.nodes[unit.features] = stream
        ends = [node for layer in unit.layers for node in (layer.total, layer.pre, layer.post) if node is not None]
        if unit.kind == "residual":
            ends = [node for node in ends if node == unit.features or node == unit.output]
        self.nodes.update(dict.fromkeys(ends, stream))
        if unit.kind != "plain":
            return
        layer = unit.layers[0]
        before, behind = self.template.read(layer), self.template.written(layer)
        assert behind is not None
        ours = behind.spaces[0] if before is None else before.spaces[0]
        self.identities[unit.name] = self.spaces[ours]
        self._pair(behind.spaces[0], self.spaces[ours], unit.name, unit.name)
        self.nodes[layer.node] = stream

    def add_blocks(self) -> None:
        """Pair the spaces of blocks, such as attention heads, by what is in them."""
        for name, other in list(self.spaces.items()):
            ours, theirs = self.template.spaces.spaces[name].parent, self.parent.spaces.spaces[other].parent
            while ours is not None and theirs is not None:
                self._pair(ours, theirs, name, other)
                ours, theirs = self.template.spaces.spaces[ours].parent, self.parent.spaces.spaces[theirs].parent
            if (ours is None) != (theirs is None):
                raise FusionError(
                    f"Expected the neurons of {other!r} of {self.called} to be in blocks as those of {name!r} are, got "
                    "them otherwise (heads or groups)"
                )

    def _pair_axes(self, name: str, other: str, ours: Axis | None, theirs: Axis | None) -> None:
        patterns = [_pattern(axis) for axis in (ours, theirs)]
        if patterns[0] != patterns[1]:
            raise FusionError(
                f"Expected {other!r} of {self.called} to index its neurons as {name!r} does, got "
                f"{_in_words(patterns[1])} for {_in_words(patterns[0])}"
            )
        if ours is not None and theirs is not None:
            for one, another in zip(ours.spaces, theirs.spaces, strict=True):
                self._pair(one, another, name, other)

    def _pair(self, ours: str, theirs: str, name: str, other: str) -> None:
        if self.spaces.setdefault(ours, theirs) != theirs:
            raise FusionError(
                f"Expected the neurons of {other!r} of {self.called} to be tied as those of {name!r} are, got them in "
                f"{theirs!r} and {self.spaces[ours]!r}"
            )


def _pattern(axis: Axis | None) -> tuple[tuple[int, ...], int] | None:
    """The number of times that the neurons of each space occur along an axis, and how many entries are fixed."""
    if axis is None:
        return None
    turns = tuple(int(axis.turn[axis.of == place].max()) + 1 for place in range(len(axis.spaces)))
    return turns, int((axis.of < 0).sum())


def _in_words(pattern: tuple[tuple[int, ...], int] | None) -> str:
    if pattern is None:
        return "fixed entries"
    fixed = f" and {pattern[1]} fixed entries" if pattern[1] else ""
    return f"{len(pattern[0])} sets of neurons, {', '.join(map(str, pattern[0]))} entries each{fixed}"
