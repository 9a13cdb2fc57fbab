"""Progress of long computations: a bar on a terminal or in a notebook, or told to whoever wants to know."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib.util import find_spec
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

T = TypeVar("T")
#: Called with the next step, in words.
Step = Callable[[str], None]
#: Seconds that work takes before a bar appears.
DELAY = 1.0
#: The colour of Lightning's progress bars.
_COLOUR = "#6206E0"


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
    """Report progress of the enclosed work to `tracker`, in the place of a bar.

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


@contextmanager
def bar(progress: bool | None, delay: float = DELAY) -> Iterator[Step]:
    """Show the step that is being done, how far it is and how long it has taken, as one line on standard error.

    Nothing is shown where a tracker is told of the work already, such as that of a bar around this one.

    Args:
        progress: whether to show it; None: on a terminal, and in a notebook with ipywidgets.
        delay: seconds before it appears.
    """
    told = _tracker.get() is not None
    console = None if told or progress is False else _console(progress)
    if console is not None:
        with _drawn(console, delay) as step:
            yield step
    else:
        # A bar inside of this one would not know that it is not wanted.
        with nullcontext() if told else tracking(lambda items, words, total: items):
            yield lambda words: None


def _console(progress: bool | None) -> "Console | None":
    """The console to draw on; None where nobody sees it."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        # Without ipywidgets a notebook shows nothing but rich's advice to install them.
        return console if progress or find_spec("ipywidgets") else None
    if progress:
        return Console(stderr=True, force_terminal=True, force_interactive=True)
    return console if console.is_interactive else None


@contextmanager
def _drawn(console: "Console", delay: float) -> Iterator[Step]:
    """A bar in the style of Lightning's."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    line = BarColumn(complete_style=_COLOUR, finished_style=_COLOUR, pulse_style=_COLOUR)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), line, TextColumn("{task.fields[count]}"))
    # Transient: the results that follow stand alone.
    progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    due = monotonic() + delay

    def appear() -> None:
        if monotonic() >= due:
            progress.start()

    def begin(words: str, total: int | None = None, count: str = "") -> "TaskID":
        appear()
        # A task that has a total cannot lose it.
        for task in progress.task_ids:
            progress.remove_task(task)
        return progress.add_task(words, total=total, count=count)

    def track(items: Iterable[Any], words: str, total: int) -> Iterator[Any]:
        task = begin(words, total, f"0/{total}")
        for number, item in enumerate(items, 1):
            yield item
            appear()
            progress.update(task, completed=number, count=f"{number}/{total}")

    def step(words: str) -> None:
        begin(words)

    try:
        with tracking(track):
            yield step
    finally:
        progress.stop()
