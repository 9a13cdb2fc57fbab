"""Does the data fit the network, is there a checkpoint to resume? Asked before anything is computed."""

import copy
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from clafusion.errors import FusionError


class ImageData(Protocol):
    """What fusing needs of a Lightning data module: the shape (C, H, W) of its images, and some without labels."""

    image_shape: tuple[int, int, int]
    num_classes: int

    def alignment_batches(self, num_samples: int, seed: int) -> Iterable[Tensor]:
        """That many training images, chosen by the seed, in batches as the network gets them."""
        ...


def check_images(network: nn.Module, data: ImageData, owner: str) -> int:
    """Runs two blank images through a copy of the network.

    Args:
        network: Left as it is.
        data: Says what shape the images have and how many classes there are.
        owner: What to call the network in the message.

    Returns:
        The network's number of classes.

    Raises:
        FusionError: The network does not take images of that shape, or has fewer classes than the data.
    """
    shape = "x".join(map(str, data.image_shape))
    name = type(data).__name__
    probe = copy.deepcopy(network).eval()
    like = next(iter(probe.parameters()), torch.zeros(()))
    try:
        with torch.no_grad():
            output = probe(torch.zeros(2, *data.image_shape, dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, TypeError) as error:
        raise FusionError(
            f"Expected images with {_input_of(network)}, as {owner} takes, got {shape} from {name}; "
            "choose the data it was trained on (--data)"
        ) from error
    if output.ndim != 2 or output.shape[1] < data.num_classes:
        raise FusionError(
            f"Expected at least {data.num_classes} classes for {name}, got output of shape {list(output.shape[1:])} "
            f"from {owner}; choose the data it was trained on (--data)"
        )
    return output.shape[1]


def resumes_from(trainer: Trainer) -> Any:
    """The checkpoint that a trainer is going to restore, or has restored; None if it begins anew.

    Lightning's own trainers do not know it before `on_fit_start`; a `FusionTrainer` does.
    """
    return getattr(trainer, "restores", None) or trainer.ckpt_path


def _input_of(network: nn.Module) -> str:
    """What the first layer with weights takes, in words."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            return f"{module.in_features} values"
        if isinstance(module, nn.Conv2d):
            return f"{module.in_channels} channels of sufficient size"
    return "another shape"
