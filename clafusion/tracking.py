"""Progress of long computations, for whoever wants to know: nobody by default."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Tracker(Protocol):
    """A function that passes items on and shows how many of them have been taken."""

    def __call__(self, items: Iterable[Any], words: str, total: int) -> Iterable[Any]:
        """Return the items, unchanged and in order.

        Args:
            items: what is worked on, one by one.
            words: what is done with them.
            total: how many there are.
        """
        ...


_tracker: ContextVar[Tracker | None] = ContextVar("tracker", default=None)


@contextmanager
def tracking(tracker: Tracker) -> Iterator[None]:
    """Report progress of the enclosed work to `tracker`.

    Args:
        tracker: called for every loop over layers, sets of neurons or batches, such as one around a progress bar.

    Example:
        >>> import torch
        >>> from clafusion import FusionOptions, fuse
        >>> from clafusion.networks import MLP
        >>> def say(items, words, total):
        ...     print(f"{words}: {total}")
        ...     return items
        >>> with tracking(say):
        ...     parents = [MLP(8, [6, 5, 4], 3), MLP(8, [6, 4], 3)]
        ...     fusion = fuse(parents, [torch.randn(32, 8)], FusionOptions(targets="matched"))
        measuring neurons: 1
        matching neurons: 3
        refitting layers: 4
    """
    token = _tracker.set(tracker)
    try:
        yield
    finally:
        _tracker.reset(token)


def tracked(items: Iterable[T], words: str, total: int) -> Iterable[T]:
    """The items, by way of the tracker if there is one."""
    tracker = _tracker.get()
    return items if tracker is None else tracker(items, words, total)
