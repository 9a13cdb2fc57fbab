"""Corresponding units and layers of two networks, and the state of one under the names of the other."""

from torch import Tensor, nn

from clafusion.alignment.layer_maps import Alignment
from clafusion.errors import FusionError
from clafusion.tracing.parameters import State, state_of
from clafusion.tracing.structure import Layer, Structure, Unit, check_same_stages


def matched_units(deep: Structure, shallow: Structure, alignment: Alignment) -> dict[str, Unit]:
    """The unit of the shallow network that stands in each matched unit of the deep one, by the latter's name.

    Raises:
        FusionError: if the alignment is not a strictly increasing map per stage, or matched units have other layers.
    """
    check_same_stages(deep, shallow)
    if len(alignment) != len(deep.stages):
        raise FusionError(f"Expected an alignment of {len(deep.stages)} stages, got {len(alignment)}")
    partners: dict[str, Unit] = {}
    for ours, theirs, places in zip(deep.stages, shallow.stages, alignment, strict=True):
        increasing = all(low < high for low, high in zip(places, places[1:], strict=False))
        if len(places) != len(theirs) or not increasing or not all(0 <= place < len(ours) for place in places):
            raise FusionError(
                f"Expected {len(theirs)} strictly increasing indices below {len(ours)}, got {list(places)} for the "
                f"stage of {ours[0].name!r}"
            )
        for unit, place in zip(theirs, places, strict=True):
            partners[ours[place].name] = unit
    return partners


def match_layers(ours: Unit, theirs: Unit, shortcuts: bool = True) -> list[tuple[Layer, Layer]]:
    """Pair the layers of two units; an inserted residual unit has no shortcut, whatever its model has.

    Args:
        ours: a unit of one network.
        theirs: a unit of the other.
        shortcuts: whether to pair the layers of our projection shortcut, too.

    Raises:
        FusionError: if the units have other layers.
    """
    sides = [[layer for layer in unit.layers if not layer.shortcut] for unit in (ours, theirs)]
    projections = [[layer for layer in unit.layers if layer.shortcut] for unit in (ours, theirs)]
    if shortcuts and projections[0]:
        sides = [side + projection for side, projection in zip(sides, projections, strict=True)]
    kinds = [[layer.kind for layer in side] for side in sides]
    if kinds[0] != kinds[1]:
        raise FusionError(
            f"Expected matched units with the same layers, got {', '.join(kinds[0])} in {ours.name!r} and "
            f"{', '.join(kinds[1])} in {theirs.name!r}"
        )
    return list(zip(*sides, strict=True))


def copied_state(a: Structure, b: Structure, ours: Unit, theirs: Unit, source: State) -> dict[str, Tensor]:
    """The state of a matched unit, under the deep network's names."""
    state = {}
    if any(layer.shortcut for layer in ours.layers) != any(layer.shortcut for layer in theirs.layers):
        raise FusionError(
            f"Expected both of {ours.name!r} and {theirs.name!r} to have a projection shortcut, or neither"
        )
    for layer, other in match_layers(ours, theirs):
        _check_geometry(a.module.get_submodule(layer.name), b.module.get_submodule(other.name), layer, other)
        names = [key.removeprefix(f"{other.name}.") for key in source if key.rpartition(".")[0] == other.name]
        state.update({f"{layer.name}.{name}": source[f"{other.name}.{name}"] for name in names})
    return state


def _check_geometry(ours: nn.Module, theirs: nn.Module, layer: Layer, other: Layer) -> None:
    for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "eps"):
        values = getattr(ours, key, None), getattr(theirs, key, None)
        if values[0] != values[1]:
            raise FusionError(
                f"Expected matched layers of equal {key}, got {values[0]} in {layer.name!r} and {values[1]} in "
                f"{other.name!r}"
            )


def check_shapes(network: nn.Module, state: State) -> None:
    """Refuse a state that does not have exactly the tensors of a network.

    Raises:
        FusionError: if a tensor is missing, left over, or of another shape.
    """
    for name, tensor in state_of(network).items():
        if name not in state:
            raise FusionError(f"Expected both networks to have {name!r}, got it in the deeper one only (bias or norm)")
        if state[name].shape != tensor.shape:
            raise FusionError(f"Expected {name!r} of shape {list(tensor.shape)}, got {list(state[name].shape)}")
    extra = next((name for name in state if name not in state_of(network)), None)
    if extra is not None:
        raise FusionError(f"Expected both networks to have {extra!r}, got it in the shallower one only (bias or norm)")
