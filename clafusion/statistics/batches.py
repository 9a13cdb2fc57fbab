"""The forms that samples come in: tensors, data sets, loaders; and what of a batch is the network's input."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from clafusion.errors import FusionError, first_line, in_words


class Rows(Protocol):
    """A data set of single samples, such as those of Hugging Face."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


#: What samples are given as; see `batches_of`.
Batches = Iterable[Any] | Dataset[Any] | Rows

#: Says which part of a batch is the input: a key, a place, or a function of the batch; None: see `inputs_of`.
Inputs = str | int | Callable[[Any], Any] | None
#: The keys under which inputs are found, the first that is there.
KEYS = ("pixel_values", "image", "images", "img", "x", "input", "inputs")
#: Samples of a data set that make a batch, at most.
DRAWN = 64


def batches_of(samples: Batches, num_samples: int) -> Iterable[Any]:
    """Return samples of any form as batches.

    Args:
        samples: a tensor or an array [samples, ...], or a mapping with one, is one batch; a data set of PyTorch, or
            anything else with a length and items that is no sequence, is read in its order; of anything else that can
            be iterated, such as a DataLoader, a list or a generator, each item is a batch already.
        num_samples: how many are needed.

    Raises:
        FusionError: if they are nothing of this.

    Example:
        >>> [len(batch) for batch in batches_of(torch.zeros(5, 3), 4)]
        [4]
        >>> [len(batch) for batch in batches_of([torch.zeros(3, 3), torch.zeros(2, 3)], 4)]
        [3, 2]
    """
    if isinstance(samples, Tensor | np.ndarray):
        return [samples[:num_samples] if samples.ndim else samples]
    if isinstance(samples, Mapping):
        return [samples]
    if isinstance(samples, nn.Module | str):
        raise _unusable(samples)
    if isinstance(samples, IterableDataset) or _has_rows(samples):
        # With a generator of its own, drawing leaves the random numbers of others as they are.
        own: Any = samples
        return DataLoader(own, min(DRAWN, num_samples), collate_fn=_collated, generator=torch.Generator())
    if not isinstance(samples, Iterable):
        raise _unusable(samples)
    return samples


def _has_rows(samples: Any) -> bool:
    return hasattr(samples, "__len__") and hasattr(samples, "__getitem__") and not isinstance(samples, Sequence)


def _collated(rows: list[Any]) -> Any:
    """Put samples of a data set together, as a DataLoader does by default."""
    try:
        return default_collate(rows)
    except (TypeError, RuntimeError) as error:
        raise FusionError(
            f"Expected a data set whose samples make a batch of tensors, got {in_words(rows[0])}: {first_line(error)}; "
            "transform them into tensors of one shape, or pass a DataLoader with a collate_fn"
        ) from error


def _unusable(samples: Any) -> FusionError:
    return FusionError(
        f"Expected samples as a tensor, a data set with a length, a DataLoader or batches, got {in_words(samples)}; "
        "pass unlabelled inputs"
    )


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
    found = _as_tensor(found) if isinstance(found, np.ndarray) else found
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise FusionError(
            f"Expected batches of samples [batch, ...], got {in_words(batch)}; say with `inputs` which part of a "
            "batch the network takes: a key, a place, or a function of the batch"
        )
    return found


def _chosen(batch: Any, inputs: str | int | Callable[[Any], Any]) -> Any:
    """The part that the user named."""
    if callable(inputs):
        return inputs(batch)
    # What stands in a tensor at a place is one of its samples.
    parts: Any = () if isinstance(batch, Tensor | np.ndarray) else batch
    try:
        return parts[inputs]
    except (KeyError, IndexError, TypeError) as error:
        raise FusionError(f"Expected inputs={inputs!r} to be in each batch, got {in_words(batch)}") from error


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy, since a tensor cannot share the memory of a read-only array or a view that runs backward."""
    try:
        return torch.tensor(np.ascontiguousarray(array))
    except TypeError as error:
        raise FusionError(f"Expected arrays of numbers, got one of {array.dtype}; convert them") from error


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
