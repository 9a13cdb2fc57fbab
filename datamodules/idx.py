"""The IDX format of MNIST (http://yann.lecun.com/exdb/mnist/), plain or compressed with gzip."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from clafusion.errors import FusionError

_UNSIGNED_BYTES = 0x08
#: Values in a file at most: twenty times as many as MNIST has.
_LARGEST = 2**30


def locate_idx(folder: Path, name: str) -> Path | None:
    """Return the path of `name` or `name.gz` in a folder, the plain one first; None if there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes.

    The format: two zero bytes, the type (8), the number of dimensions, each size as a big-endian 32-bit integer, then
    the values in row-major order.

    Args:
        path: The file; a name that ends in `.gz` is decompressed.
        dimensions: How many dimensions it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 tensor of the sizes that the header names.

    Raises:
        FusionError: The file cannot be read, is truncated, or is not such a file; the message names it.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            sizes = _sizes(header, dimensions, path)
            expected = math.prod(sizes)
            # One value more than expected and no more: a small file may unpack to any size.
            content = file.read(min(expected, _LARGEST) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FusionError(f"Expected an intact file {path}, got {error}; fetch it again") from error
    if len(content) != expected or not expected:
        count = f"{len(content)}" if len(content) < expected else "more"
        raise FusionError(f"Expected {expected} values {list(sizes)} in {path}, got {count}; fetch it again")
    # A bytearray, because torch warns about tensors over read-only memory.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(sizes)


def _sizes(header: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    """Return the sizes in the header of an IDX file."""
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        raise FusionError(
            f"Expected an IDX file of unsigned bytes in {dimensions} dimensions, "
            f"got {path} that begins with {header[:4].hex() or 'nothing'}; fetch it again"
        )
    return struct.unpack(f">{dimensions}I", header[4:])
