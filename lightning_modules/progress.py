"""What a long command is at, on a terminal; nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with what is done next, in words.
Step = Callable[[str], None]


@contextmanager
def steps(quiet: bool) -> Iterator[Step]:
    """Shows the step that is being done and how long all have taken, in the style of Lightning's progress bars.

    Args:
        quiet: Whether to show nothing on a terminal either.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        # Not left to `disable`: before version 15 rich ends what it does not show with an empty line.
        yield lambda words: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Transient: the results that follow stand alone.
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda words: progress.update(task, description=words)
