"""Files that are written whole or not at all."""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from clafusion.errors import FusionError

#: Called with the name of a file to write.
Writer = Callable[[str], object]


def write_atomically(path: str | os.PathLike[str], write: Writer) -> None:
    """Calls `write` with a temporary name next to `path`, then moves the file there: it is whole or not there.

    Raises:
        FusionError: The file cannot be written; nothing is left behind.
    """
    write_together({Path(path): write})


def write_together(files: Mapping[Path, Writer]) -> None:
    """Writes files as `write_atomically` does, and moves none to its place before all could be written.

    Raises:
        FusionError: One of them cannot be written; nothing is left behind.
    """
    path = Path()
    moves: dict[str, Path] = {}
    try:
        with ExitStack() as folders:
            for path, write in files.items():
                folder = folders.enter_context(TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent))
                temporary = os.path.join(folder, path.name)
                write(temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                moves[temporary] = path
            for temporary, path in moves.items():
                os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        raise FusionError(
            f"Expected a file that can be written, got {path}: {reason}; make room or choose another"
        ) from error


def why_not_written(error: Exception) -> str | None:
    """What the system says about a file that could not be written; None if the error is about something else.

    PyTorch's writers answer an error of the file with a RuntimeError of their own.
    """
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    return "the disk may be full" if "PytorchStreamWriter" in str(error) else None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text in UTF-8, whole or not at all.

    Raises:
        FusionError: The file cannot be written.
    """
    write_atomically(path, writer(text))


def writer(text: str) -> Writer:
    """What writes a text in UTF-8."""
    return lambda path: Path(path).write_text(text, encoding="utf-8", newline="")


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
