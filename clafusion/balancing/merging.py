"""Balancing by merging: the deep network shrinks to the shallow one's depth, layers folded into their successors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clafusion.alignment.stages import Alignment
from clafusion.balancing.correspondence import matched_units
from clafusion.errors import FusionError
from clafusion.statistics.batches import Batches, Inputs
from clafusion.statistics.samples import check_features, chunks, collect
from clafusion.tracing.execution import GraphRunner, as_input
from clafusion.tracing.parameters import State, load_state, state_of
from clafusion.tracing.reading import structure_of
from clafusion.tracing.resizing import room_for
from clafusion.tracing.structure import Structure, Unit


@torch.no_grad()
def merge_layers(
    deep: nn.Module,
    shallow: nn.Module,
    alignment: Alignment,
    batches: Batches,
    relu: str = "sum",
    num_samples: int = 500,
    *,
    inputs: Inputs = None,
) -> nn.Module:
    """Shrink a chain of Linear layers to the depth of another one.

    An unmatched layer `h = ReLU(W x + b)` is replaced by `D (W x + b)` and folded into the next matched layer; D is the
    diagonal that stands for the ReLU, estimated from the layer's pre-activations over the samples.

    Args:
        deep: the network to shrink; left as it is.
        shallow: the network whose depth (and layer names) the result has; left as it is.
        alignment: per stage, the unit of `deep` that each unit of `shallow` stands for.
        batches: unlabelled samples, as for `fuse`.
        relu: per neuron `sum` (1 where the sum over samples is positive), `majority` (1 where it is active in at
            least half of them) or `average` (the share in which it is active).
        num_samples: samples to use, at most.
        inputs: the part of a batch that the networks take, as for `fuse`.

    Returns:
        A network of the class of `shallow`, with the widths of the matched layers of `deep`, in eval mode.

    Raises:
        FusionError: if the networks do not fit, or a layer to be merged is no Linear with ReLU.
    """
    samples = collect(batches, num_samples, inputs)
    a, b = structure_of(deep, samples), structure_of(shallow, samples)
    return merged(shallow, a, b, alignment, samples, relu)


def merged(
    shallow: nn.Module, a: Structure, b: Structure, alignment: Alignment, samples: Tensor, relu: str
) -> nn.Module:
    """`merge_layers` from structures and collected samples."""
    partners = matched_units(a, b, alignment, "the shallow network", merging=True)
    dropped = [unit for unit in a.units if unit.name not in partners]
    _check_mergeable(a, dropped)
    gates = _gates(a, [unit.features for unit in dropped], samples, relu)
    source = a.capture.tensors
    sizes = dict(b.sizes)
    state: dict[str, Tensor] = {}
    carried: tuple[Tensor, Tensor] | None = None
    for unit in a.units:
        if unit.name not in partners:
            carried = _fold(source, unit, carried, gates[unit.features])
            continue
        theirs = partners[unit.name]
        sizes.update(_sizes(a, b, unit, theirs))
        copied = dict(zip(theirs.parameters, (source[name] for name in unit.parameters), strict=True))
        state.update(copied if carried is None else _folded_into(copied, theirs, carried))
        carried = None
    network, _ = room_for(shallow, b, sizes, samples)
    return load_state(network, {**state_of(network), **state}).requires_grad_(True)


def _sizes(a: Structure, b: Structure, unit: Unit, theirs: Unit) -> dict[str, int]:
    """The widths that a unit of the deep network brings to the shallow one."""
    sizes = {}
    for name, other in zip(unit.parameters, theirs.parameters, strict=True):
        axis, another = a.axes[name][0], b.axes[other][0]
        for space, own in zip(another.spaces, axis.spaces, strict=True) if axis and another else ():
            sizes[space] = a.sizes[own]
    return sizes


def _check_mergeable(structure: Structure, dropped: Sequence[Unit]) -> None:
    order = structure.units
    followers = [order[order.index(unit) + 1] for unit in dropped]
    for unit in (*dropped, *followers):
        bare = len(unit.parameters) == sum((one.weight is not None) + (one.bias is not None) for one in unit.layers)
        if (
            [layer.kind for layer in unit.layers] != ["linear"]
            or not bare
            or (unit in dropped and unit.layers[-1].activation != "relu")
        ):
            kinds = ", ".join([layer.kind for layer in unit.layers] + ([] if bare else ["norm"]))
            raise FusionError(
                f"Expected to merge Linear layers with ReLU, got {unit.name!r} ({kinds}, activation "
                f"{unit.layers[-1].activation if unit.layers else None}); balance this pair with insert"
            )


def _gates(structure: Structure, nodes: Sequence[str], samples: Tensor, relu: str) -> dict[str, Tensor]:
    """The factors in [0, 1] that stand for the ReLU of each merged layer, per neuron."""
    sums: dict[str, Tensor] = {}
    runner = GraphRunner(structure.capture)
    for chunk in chunks(samples):
        for name, value in runner.observe(as_input(chunk, structure.capture), nodes):
            part = torch.stack([value.double().sum(0), (value > 0).double().sum(0)])
            sums[name] = sums[name] + part if name in sums else part
    check_features(*sums.values())
    rules = {
        "sum": lambda total, active: (total > 0).double(),
        "majority": lambda total, active: (active >= len(samples) / 2).double(),
        "average": lambda total, active: active / len(samples),
    }
    if relu not in rules:
        raise FusionError(f"Expected relu to be one of {', '.join(rules)}, got {relu!r}")
    return {name: rules[relu](*part) for name, part in sums.items()}


def _fold(source: State, unit: Unit, carried: tuple[Tensor, Tensor] | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map of the merged layers so far, [n, inputs] and [n]."""
    weight = source[f"{unit.name}.weight"].double()
    bias = source.get(f"{unit.name}.bias", weight.new_zeros(weight.shape[0])).double()
    if carried is not None:
        weight, bias = weight @ carried[0], weight @ carried[1] + bias
    return gate[:, None] * weight, gate * bias


def _folded_into(state: Mapping[str, Tensor], unit: Unit, carried: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    weight = state[f"{unit.name}.weight"].double()
    result = {f"{unit.name}.weight": weight @ carried[0]}
    if f"{unit.name}.bias" in state:
        result[f"{unit.name}.bias"] = weight @ carried[1] + state[f"{unit.name}.bias"]
    elif carried[1].any():
        raise FusionError(
            f"Expected {unit.name!r} to have a bias, since layers with one are merged into it, got none; balance this "
            "pair with insert"
        )
    return result
