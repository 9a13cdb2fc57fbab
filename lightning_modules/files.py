"""Files that commands and trainings write, whole or not at all, and their checksums."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from clafusion.errors import FusionError
from clafusion.formats import atomic
from clafusion.formats.atomic import Writer


def write_atomically(path: str | os.PathLike[str], write: Writer) -> None:
    """Write one file, see `write_together`."""
    write_together({Path(path): write})


def write_together(files: Mapping[Path, Writer]) -> None:
    """Write files, all of them or none, each whole.

    Args:
        files: What writes each file.

    Raises:
        FusionError: One of them cannot be written; earlier files are as they were, and nothing is left behind.
    """
    try:
        atomic.write_together(files)
    except OSError as error:
        raise FusionError(
            f"Expected a file that can be written, got {error.filename}: {error.strerror}; make room or choose another"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, see `write_together`."""
    write_atomically(path, writer(text))


def writer(content: str | bytes) -> Writer:
    """Return what writes a text in UTF-8, or bytes as they are, for `write_together`."""
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write(data)


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
