"""Files that are written whole or not at all, one or several together."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

#: Writes the content of a file to where it is given.
Writer = Callable[[BinaryIO], object]


def write_together(files: Mapping[Path, Writer], suffix: str | None = None) -> None:
    """Write files under hidden names next to their own, force them onto the disk, and rename them when all are there.

    Until then files that exist are as they were, and there must be room for both. A symbolic link is replaced, not
    followed.

    Args:
        files: What writes each file.
        suffix: Of the hidden names. The next attempt overwrites what a kill has left there; two processes that write
            the same file at the same time need names of their own, which None gives them.

    Raises:
        OSError: A file cannot be written, its `filename`, for the reason `strerror`, also where PyTorch has answered
            with a RuntimeError of its own. Nothing is left behind.
    """
    temporaries = {path: path.with_name(f".{path.name}.{suffix or uuid.uuid4().hex}") for path in files}
    with ExitStack() as stack:
        for path, write in files.items():
            stack.callback(_remove, temporaries[path])
            with _told_of(path):
                _write(temporaries[path], write)
        for path, temporary in temporaries.items():
            with _told_of(path):
                os.replace(temporary, path)


def _write(path: Path, write: Writer) -> None:
    path.unlink(missing_ok=True)
    # A new file, and not one that somebody has linked to from there.
    with open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Raise every error of the file system as one about `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch's writers answer an error of the file with a RuntimeError, often while they handle it.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error
        if "PytorchStreamWriter" in str(error):
            raise OSError(errno.ENOSPC, "the disk may be full", str(path)) from error
        raise
