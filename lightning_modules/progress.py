"""The progress of a long command, shown on a terminal and nowhere else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from clafusion.tracking import tracking

#: Called with the next step, in words.
Step = Callable[[str], None]
#: The colour of Lightning's progress bars.
_COLOUR = "#6206E0"


@contextmanager
def steps(quiet: bool) -> Iterator[Step]:
    """Show the step that is being done and how long it has taken, in the style of Lightning's progress bars.

    While the library loops over layers, sets of neurons or batches, a bar shows how far it is.

    Args:
        quiet: Whether to show nothing on a terminal either.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        # Not left to `disable`: before version 15 rich ends what it does not show with an empty line.
        yield lambda words: None
        return
    bar = BarColumn(complete_style=_COLOUR, finished_style=_COLOUR, pulse_style=_COLOUR)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), bar, TextColumn("{task.fields[count]}"))
    # Transient: the results that follow stand alone.
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:

        def begin(words: str, total: int | None, count: str) -> TaskID:
            # A task that has a total cannot lose it.
            for task in progress.task_ids:
                progress.remove_task(task)
            return progress.add_task(words, total=total, count=count)

        def track(items: Iterable[Any], words: str, total: int) -> Iterator[Any]:
            task = begin(words, total, f"0/{total}")
            for number, item in enumerate(items, 1):
                yield item
                progress.update(task, completed=number, count=f"{number}/{total}")

        def step(words: str) -> None:
            begin(words, None, "")

        with tracking(track):
            yield step
