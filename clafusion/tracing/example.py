"""Samples made up for a network, where its user has given none."""

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.tracing.exporting import logits_of, shell


def example_for(model: nn.Module) -> Tensor:
    """Random samples of a shape that the network accepts, guessed from its first layer.

    Raises:
        FusionError: if the network has neither a Linear nor a Conv2d.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)
    if first is None:
        raise FusionError(f"Expected a network with a Linear or Conv2d, got {type(model).__name__}")
    generator = torch.Generator().manual_seed(0)
    if isinstance(first, nn.Linear):
        return torch.randn(2, first.in_features, generator=generator)
    network = shell(model)
    for size in (32, 64, 128):
        example = torch.randn(2, first.in_channels, size, size, generator=generator)
        try:
            with torch.no_grad():
                logits_of(network(example.to(first.weight)))
            return example
        except (FusionError, RuntimeError, ValueError, AssertionError, TypeError):
            continue
    return torch.randn(2, first.in_channels, 224, 224, generator=generator)
