"""What of a batch is the network's input: batches come as tensors, arrays, tuples and dicts."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clafusion.errors import FusionError

#: Says which part of a batch is the input: a key, a place, or a function of the batch; None: see `inputs_of`.
Inputs = str | int | Callable[[Any], Any] | None
#: The keys under which inputs are found, the first that is there.
KEYS = ("pixel_values", "image", "images", "img", "x", "input", "inputs")


def inputs_of(batch: Any, inputs: Inputs = None) -> Tensor:
    """Return the network's input, which is a part of a batch.

    Args:
        batch: what a loader yields: a tensor or an array [batch, ...], a tuple or list that begins with one, or a
            mapping.
        inputs: which part of it. None: the batch itself, the first of a tuple, of a mapping the entry named
            `pixel_values`, `image`, `images`, `img`, `x`, `input` or `inputs`, or else its only floating-point tensor.

    Raises:
        FusionError: if there is no such part, or it is no tensor [batch, ...].

    Example:
        >>> inputs_of({"image": torch.zeros(4, 3), "label": torch.zeros(4)}).shape
        torch.Size([4, 3])
        >>> inputs_of({"left": torch.zeros(4, 3), "right": torch.zeros(4, 2)}, "right").shape
        torch.Size([4, 2])
    """
    found = _chosen(batch, inputs) if inputs is not None else _usual(batch)
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise FusionError(
            f"Expected batches of samples [batch, ...], got {_in_words(batch)}; say with `inputs` which part of a "
            "batch the network takes: a key, a place, or a function of the batch"
        )
    return found


def _chosen(batch: Any, inputs: str | int | Callable[[Any], Any]) -> Any:
    """The part that the user named."""
    if callable(inputs):
        return inputs(batch)
    try:
        return batch[inputs]
    except (KeyError, IndexError, TypeError) as error:
        raise FusionError(f"Expected inputs={inputs!r} to be in each batch, got {_in_words(batch)}") from error


def _usual(batch: Any) -> Any:
    """The part where inputs usually are; the batch itself where there is none."""
    if isinstance(batch, tuple | list) and batch:
        return _usual(batch[0])
    if not isinstance(batch, Mapping):
        return batch
    named = next((batch[key] for key in KEYS if key in batch), None)
    if named is not None:
        return _usual(named)
    floating = [one for one in batch.values() if _is_floating(one)]
    return floating[0] if len(floating) == 1 else batch


def _is_floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def _in_words(batch: Any) -> str:
    """A batch in a few words: its type, and what is in it."""
    name = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{name} with {', '.join(repr(key) for key in batch)}"
    if isinstance(batch, tuple | list):
        return f"{name} of {', '.join(type(one).__name__ for one in batch) or 'nothing'}"
    return f"{name} of shape {list(batch.shape)}" if isinstance(batch, Tensor | np.ndarray) else name
