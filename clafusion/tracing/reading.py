


def trace(model: nn.Module, example: Tensor) -> Structure:
    """Read the neuron spaces, units and stages of a network off its graph.

    Args:
        model: a classifier whose forward takes one tensor and returns logits [samples, classes].
        example: a batch that it accepts, [samples, ...].

    Raises:
        FusionError: if torch.export cannot capture the network, its graph is not the same function, or for the first
            operation or parameter that is not understood, by name.

    Example:
        >>> import torch
        >>> from clafusion.networks import MLP
        >>> structure = trace(MLP(4, [3, 2], num_classes=2), torch.zeros(1, 4))
        >>> [[unit.name for unit in stage] for stage in structure.stages]
        [['fc1', 'fc2'], ['fc3']]
        >>> structure.free_spaces
        ('fc1', 'fc2')
    """
    captured, logits = capture(model, example)
    spaces = find_spaces(captured)
    stages, transitions = find_units(captured, spaces)
    return Structure(spaces, stages, transitions, captured, logits)


def structure_of(model: nn.Module, samples: Tensor) -> Structure:
    """`trace`, on as few of the samples as it takes.

    Args:
        model: what `trace` accepts.
        samples: of any device and floating dtype.
    """
    reference = next((one for one in model.parameters() if one.is_floating_point()), None)
    return trace(model, samples[:EXAMPLES] if reference is None else samples[:EXAMPLES].to(reference))
