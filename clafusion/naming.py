"""The names of parents in messages: by number, unless whoever called knows better ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_names: ContextVar[Sequence[str]] = ContextVar("names", default=())


@contextmanager
def named_parents(names: Sequence[str]) -> Iterator[None]:
    """Give the parents of the enclosed work names, which errors and warnings use.

    Args:
        names: one per parent, such as the names of their files.

    Example:
        >>> with named_parents(["deep.ckpt", "shallow.ckpt"]):
        ...     parent_name(1)
        'shallow.ckpt'
        >>> parent_name(1)
        'parent 1'
    """
    token = _names.set(tuple(names))
    try:
        yield
    finally:
        _names.reset(token)


def parent_name(k: int) -> str:
    """Return what to call parent `k`, counted from 0, in a message."""
    names = _names.get()
    return names[k] if k < len(names) else f"parent {k}"
