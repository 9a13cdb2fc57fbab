"""Made-up samples for a network that says or shows by itself which shape it takes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.tracing.exporting import Capture, shell
from clafusion.tracing.outputs import logits_in

#: The shape of a sample, which a network may carry as an attribute of this name.
INPUT_SHAPE = "clafusion_input"
#: Sizes of images that are tried in this order; the last one is what most networks are published for.
_SIZES = (32, 64, 96, 128, 224)
#: Of the largest logit, between two runs of one function in single precision.
_TOLERANCE = 1e-3


def example_for(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Two random samples of a shape that a network takes, and two more of another shape to compare its graph on.

    Args:
        model: left as it is.

    Returns:
        Samples of the shape that the network declares, and None. Otherwise of the numbers that its first Linear layer
        takes, or of the first common size of images that works, and of the last one if that works as well.

    Raises:
        FusionError: No such samples are found.
    """
    network = shell(model)
    for shape in _declared(model):
        if output_for(network, example := _random_for(model, shape)) is not None:
            return example, None
    guessed = list(_guessed(model))
    for shape in guessed:
        if output_for(network, example := _random_for(model, shape)) is not None:
            control = _random_for(model, guessed[-1])
            other = shape != guessed[-1] and output_for(network, control) is not None
            return example, control if other else None
    raise FusionError(
        f"Expected {type(model).__name__} to say which samples it takes, got none of the common shapes that it runs "
        f"on; set its {INPUT_SHAPE} to the shape of a sample, or pass samples"
    )


def example_of(capture: Capture) -> Tensor:
    """Two random samples of the shape that a network was captured with."""
    entry = next(node for node in capture.graph.nodes if node.name == capture.entry)
    return _random(entry.meta["shape"][1:], capture.reference)


def with_input_shape(network: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Let a network carry the shape of a sample, which copies of it keep; returns the network."""
    setattr(network, INPUT_SHAPE, list(shape))
    return network


def check_sizes(model: nn.Module, restored: nn.Module, control: Tensor) -> None:
    """Refuse a graph that computes something else than its network for images of another size.

    Args:
        model: the network.
        restored: its graph, captured with images of a guessed size.
        control: images of another size that the network takes.
    """
    expected, actual = output_for(shell(model), control), output_for(restored, control)
    if expected is None or actual is None or not _agree(expected, actual):
        raise FusionError(
            f"Expected samples to capture {type(model).__name__} with, which computes something else for every size of "
            "images, got none; pass example="
        )


def _agree(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape or expected.is_meta:
        return expected.shape == actual.shape
    return bool((expected - actual).abs().max() <= _TOLERANCE * expected.abs().max())


@torch.no_grad()
def output_for(network: nn.Module, samples: Tensor) -> Tensor | None:
    """The logits for some samples; None if the network does not take them."""
    try:
        return logits_in(network(samples))
    except Exception:  # whatever the network's own code raises
        return None


def _declared(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """The shapes of samples that a network says it takes."""
    carried = getattr(model, INPUT_SHAPE, None) or getattr(model, "_described", {}).get("input")
    if isinstance(carried, tuple | list):
        yield tuple(carried)
    channels = _channels(model)
    owners = (getattr(model, "config", None), model, getattr(model, "patch_embed", None))
    for owner in owners:
        for name in ("image_size", "img_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int | tuple | list):
                yield (channels, *((size, size) if isinstance(size, int) else size))
    settings: Any = getattr(model, "default_cfg", None)
    size = settings.get("input_size") if hasattr(settings, "get") else None
    if isinstance(size, tuple | list):
        yield (channels, *size[1:])


def _guessed(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """The shapes that fit the first Linear layer or the first convolution of a network; images come last."""
    linear = next((one for one in model.modules() if isinstance(one, nn.Linear)), None)
    if linear is not None:
        yield (linear.in_features,)
    convolution = _convolution(model)
    if convolution is not None:
        yield from ((_channels(model), *[size] * (convolution.weight.ndim - 2)) for size in _SIZES)


def _channels(model: nn.Module) -> int:
    first = _convolution(model)
    return 3 if first is None else first.weight.shape[1] * first.groups


def _convolution(model: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d | None:
    return next((one for one in model.modules() if isinstance(one, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)


def _random_for(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    tensors = (*model.parameters(), *model.buffers())
    return _random(shape, next((one for one in tensors if one.is_floating_point()), torch.zeros(())))


def _random(shape: Sequence[int], like: Tensor) -> Tensor:
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return example.to(like.device, like.dtype)
