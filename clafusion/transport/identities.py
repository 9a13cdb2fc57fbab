"""The parameters of an identity that stands in a chain for a layer that a parent lacks."""

import torch
from torch import Tensor, fx

from clafusion.tracing.structure import Layer, Structure


def identity_value(parameter: str, layer: Layer, structure: Structure, size: int, like: Tensor) -> Tensor:
    """A parameter of the identity that stands for a unit of a chain, for a stream of `size` neurons.

    Args:
        parameter: its name in the template.
        layer: the only layer of the unit.
        structure: of the template.
        size: neurons of the stream.
        like: the template's parameter.
    """
    if parameter != layer.weight:
        return neutral_value(parameter, structure, like.new_zeros(size))
    inputs = 1 if layer.kind == "depthwise" else size
    weight = like.new_zeros(size, inputs, *like.shape[2:])
    # Of an even kernel with padding="same" the middle is the earlier one.
    middle = weight.movedim((0, 1), (-2, -1))[tuple((length - 1) // 2 for length in like.shape[2:])]
    middle.fill_(1) if layer.kind == "depthwise" else middle.fill_diagonal_(1)
    return weight


def neutral_value(parameter: str, structure: Structure, like: Tensor) -> Tensor:
    """A bias, or a parameter of a norm, that changes nothing.

    Args:
        parameter: its name.
        structure: of the network that it is in.
        like: has its shape.
    """
    for node in structure.capture.graph.nodes:
        names = [structure.capture.names.get(one.name) for one in node.args if isinstance(one, fx.Node)]
        if parameter not in names or not node.target.__name__.startswith(
            ("batch_norm", "layer_norm", "group_norm", "rms")
        ):
            continue
        first = next(number for number, name in enumerate(names) if name is not None)
        # Dividing by sqrt(variance + eps) must change nothing.
        values = (1.0, 0.0, 0.0, 1 - float(node.args[7]) if len(names) - first == 4 else 1.0)
        return torch.full_like(like, values[names.index(parameter) - first])
    return torch.zeros_like(like)
