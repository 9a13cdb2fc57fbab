"""The progress of a long command, shown on a terminal and in a notebook."""

from contextlib import AbstractContextManager

from clafusion.tracking import Step, bar

__all__ = ["Step", "steps"]


def steps(quiet: bool) -> AbstractContextManager[Step]:
    """Show from the beginning the step that is being done and how long it has taken.

    While the library loops over layers, sets of neurons or batches, a bar shows how far it is.

    Args:
        quiet: Whether to show nothing on a terminal either.
    """
    return bar(False if quiet else None, delay=0)
