"""Balancing by insertion: the shallow network grows to the depth of the deep one and computes what it did before.

An alignment names, for every stage (the head included), the unit of the deep network that each unit of the shallow one
stands for.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from clafusion.alignment.layer_maps import Alignment
from clafusion.balancing.correspondence import check_shapes, copied_state, match_layers, matched_units
from clafusion.balancing.verification import check_inserted
from clafusion.errors import FusionError
from clafusion.tracing.execution import Bypass
from clafusion.tracing.parameters import load_state, resized, state_of
from clafusion.tracing.structure import Layer, Structure, Unit, structure_of


@torch.no_grad()
def insert_identities(
    shallow: nn.Module,
    deep: nn.Module,
    alignment: Alignment,
    example: Tensor | None = None,
    zero_branches: bool = False,
) -> nn.Module:
    """Grow a network to the depth of another one; it computes what it did before.

    Every unmatched unit becomes an identity. Plain: `eye` or Dirac weight, neutral norm, zero bias. Residual: the layer
    that closes the branch is zero and the inner ones are Dirac, so that finetuning can wake the branch.

    Args:
        shallow: the network to grow; left as it is.
        deep: the network whose depth (and layer names) the result has; left as it is.
        alignment: per stage, the unit of `deep` that each unit of `shallow` becomes.
        example: samples [batch, ...]; None: made up from the first layer.
        zero_branches: make the inner layers of an inserted residual unit zero as well, as published.

    Returns:
        A network of the class of `deep`, with the widths of `shallow`, in eval mode.

    Raises:
        FusionError: if the networks do not fit, if an unmatched unit cannot be an identity, or if the result differs
            from `shallow` as a function (its activations are not ReLU-like).
    """
    example = example_for(shallow) if example is None else example
    a, b = structure_of(deep, example), structure_of(shallow, example)
    network = inserted(deep, a, b, alignment, zero_branches)
    check_inserted(structure_of(network, example), b, alignment, example, "the network")
    return network


def inserted(deep: nn.Module, a: Structure, b: Structure, alignment: Alignment, zero_branches: bool) -> nn.Module:
    """`insert_identities` from structures, without the check of the function."""
    partners = matched_units(a, b, alignment)
    for unit in a.units:
        if unit.name not in partners and not unit.insertable:
            raise FusionError(
                f"Expected unit {unit.name!r} to be matched, since no identity can stand in its place; pin it"
            )
    network = resized(deep, a, _inserted_sizes(a, b, partners))
    source = state_of(b.module)
    state: dict[str, Tensor] = {}
    for unit in a.units:
        if unit.name in partners:
            state.update(copied_state(a, b, unit, partners[unit.name], source))
        else:
            state.update(_identity(network, unit, zero_branches))
    check_shapes(network, state)
    return load_state(network, state)


def _inserted_sizes(a: Structure, b: Structure, partners: Mapping[str, Unit]) -> dict[str, int]:
    """The width that every space of the deep network has once the shallow one's units are in it."""
    sizes = {a.input: b.sizes[b.input]}
    for stage in a.stages:
        known = [partners[unit.name] for unit in stage if unit.name in partners]
        for unit in stage:
            # An inserted block is as wide inside as the shallow network's block before it (or after, if there is none).
            model = partners.get(unit.name, known[0])
            known = [model] if unit.name in partners else known
            if unit.kind == "residual" or unit.name in partners:
                for layer, theirs in match_layers(unit, model):
                    sizes.setdefault(layer.space, b.sizes[theirs.space])
            else:
                sizes.setdefault(unit.output.space, sizes[_input_space(a, unit)])
    return sizes


def _input_space(structure: Structure, unit: Unit) -> str:
    axis = structure.axes[f"{unit.branch[0].name}.weight"][1]
    return structure.input if axis is None else axis.space


def _identity(network: nn.Module, unit: Unit, zero_branches: bool) -> dict[str, Tensor]:
    """The state of an inserted unit."""
    state: dict[str, Tensor] = {}
    for layer in unit.layers:
        module = network.get_submodule(layer.name)
        silent = _is_silent(unit, layer, zero_branches)
        for key, value in state_of(module).items():
            state[f"{layer.name}.{key}"] = _identity_value(module, layer, key, value, silent)
    return state


def _is_silent(unit: Unit, layer: Layer, zero_branches: bool) -> bool:
    """Whether a layer of an inserted unit gives nothing but zeros."""
    return unit.kind == "residual" and (layer.name == unit.closing or (zero_branches and layer.weighted))


def _identity_value(module: nn.Module, layer: Layer, key: str, value: Tensor, silent: bool) -> Tensor:
    fresh = torch.zeros_like(value)
    if layer.kind == "norm":
        # Dividing by sqrt(var + eps) must change nothing.
        neutral = {"weight": 0.0 if silent else 1.0, "running_var": 1 - getattr(module, "eps", 0.0)}
        return fresh.fill_(neutral[key]) if key in neutral else fresh
    if key != "weight" or silent:
        return fresh
    if layer.kind == "linear":
        return nn.init.eye_(fresh)
    # As `nn.init.dirac_`, at once instead of filter by filter; a depthwise filter has one input.
    middle = fresh[:, :, fresh.shape[2] // 2, fresh.shape[3] // 2]
    middle.fill_diagonal_(1) if getattr(module, "groups", 1) == 1 else middle.fill_(1)
    return fresh


def bypass_of(structure: Structure, inserted_units: Collection[str], zero_branches: bool) -> dict[str, Bypass]:
    """The nodes of inserted units that need not be computed. Valid where `check_inserted` has found nothing.

    Args:
        structure: of a network that `inserted` has made.
        inserted_units: the names of the units that are identities.
        zero_branches: as it was inserted with.
    """
    inputs = {node.name: node.all_input_nodes for node in structure.module.graph.nodes}
    bypass: dict[str, Bypass] = {}
    for unit in structure.units:
        if unit.name not in inserted_units:
            continue
        for layer in (layer for layer in unit.layers if layer.weighted):
            if _is_silent(unit, layer, zero_branches):
                bypass[layer.node] = Bypass(unit.input, silent=True)
            elif unit.kind == "plain":
                bypass[layer.node] = Bypass(inputs[layer.node][0].name)
        if unit.kind == "residual":
            bypass[unit.output.post] = Bypass(unit.output.pre)
            bypass[unit.output.pre] = Bypass(unit.input)  # the same node where no activation follows
    return bypass


def example_for(model: nn.Module) -> Tensor:
    """Random samples of a shape that the network accepts, guessed from its first layer."""
    first = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
    if first is None:
        raise FusionError(f"Expected a network with a Linear or Conv2d, got {type(model).__name__}")
    generator = torch.Generator().manual_seed(0)
    if isinstance(first, nn.Linear):
        return torch.randn(2, first.in_features, generator=generator)
    for size in (32, 64, 128):
        example = torch.randn(2, first.in_channels, size, size, generator=generator)
        try:
            structure_of(model, example)
            return example
        except FusionError:
            continue
    return torch.randn(2, first.in_channels, 224, 224, generator=generator)
