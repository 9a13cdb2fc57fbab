"""Inspection of the files of `torch.save` before and after they are read: tensors and plain containers, nothing else.

`torch.load(weights_only=True)` runs no code of a file. It still fills as much memory as a few bytes ask for (a
compressed archive, `bytearray(10**11)`), and returns objects that take for ever to walk through (a list that holds
another one twice, and so on a hundred times). The functions here refuse such files.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

#: The names in the pickles of networks and trainings; argparse's is replaced by a stand-in where it is read at all.
_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.set|argparse\.Namespace"
    r"|torch\.(Size|device|[A-Z][A-Za-z0-9]*Storage|(b?float|u?int|bool|complex)[a-z0-9_]*)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter"
)
#: Containers in a file at most, counted as often as they are referred to, and levels of containers in each other.
_MOST_CONTAINERS, _DEEPEST = 1_000_000, 64
#: Number of times that a file may use the same object or numbers, as layers that share their weights do.
_SHARED = 16
_ZIP = b"PK\x03\x04"
#: The pickles that a file in PyTorch's format before 1.6 begins with: magic number, protocol, system, content, keys.
_LEGACY_PICKLES = 5


class Foreign(Exception):
    """A file holds something else than tensors and plain values; the message names it."""


def check_file(path: Path) -> None:
    """Inspect a file of `torch.save` without reading its content.

    Args:
        path: A local file.

    Raises:
        Foreign: It names a class or function that a checkpoint does not need.
        Exception: It is damaged, or would take more memory than it has bytes.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            _inspect_archive(path)
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _inspect_pickle(file)


def check_content(content: Any, size: int) -> None:
    """Refuse content that cannot be walked through, or whose tensors have more numbers than the file.

    Args:
        content: The content as `torch.load` returned it.
        size: The bytes of the file.

    Raises:
        Foreign: A container is in itself, or too many are in each other; a tensor is not dense, or has more numbers
            than the file.
    """
    count, numbers = 0, 0
    # Not recursive, so that a container in itself ends, too.
    open_containers: list[Iterator[Any]] = [iter([content])]
    while open_containers:
        value = next(open_containers[-1], open_containers)
        if value is open_containers:
            open_containers.pop()
        elif isinstance(value, Tensor):
            numbers += _bytes_of(value)
        elif isinstance(value, dict | list | tuple | set):
            count += 1
            open_containers.append(_parts(value))
        if count > _MOST_CONTAINERS or len(open_containers) > _DEEPEST:
            raise Foreign("containers in containers without end")
        if numbers > _SHARED * size:
            raise Foreign("tensors that share their numbers many times over")


def _inspect_archive(path: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.lower() for entry in entries}
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        # PyTorch compresses nothing, uses no name twice and begins at the first byte; a bomb breaks one of these.
        if not stored or len(names) < len(entries) or min(entry.header_offset for entry in entries) != 0:
            raise zipfile.BadZipFile("not as PyTorch writes it")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("more content than file")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                _inspect_pickle(io.BytesIO(archive.read(entry)))


def _inspect_pickle(file: IO[bytes]) -> None:
    """Follow the instructions of a pickle as the unpickler would, with the sizes of objects instead of the objects."""
    stack: list[list[int]] = []
    marks: list[int] = []
    memo: dict[int, list[int]] = {}
    for opcode, argument, position in pickletools.genops(file):
        name = opcode.name
        if name == "GLOBAL" and not _NAMES.fullmatch(str(argument).replace(" ", ".")):
            raise Foreign(f"pickled objects, which were not run ({str(argument).replace(' ', '.')})")
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("PUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[int(argument or 0)])
        elif name != "PROTO" and name != "FRAME":
            before = opcode.stack_before
            start = marks.pop() if pickletools.markobject in before else len(stack) - len(before)
            # The list or dict that is filled lies under the mark.
            start -= before.index(pickletools.markobject) if pickletools.markobject in before else 0
            stack[start:] = [[1 + sum(part[0] for part in stack[start:])]] if opcode.stack_after else []
            # A dict needs time for a key in proportion to its size, shared parts counted each time.
            if name.startswith("TUPLE") and stack[-1][0] > _SHARED * (position or 0):
                raise Foreign("containers in containers without end")
        if name == "STOP":
            return


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return (part for item in value.items() for part in item)
    return iter(value)


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes that the numbers of a dense tensor take."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise Foreign(f"a tensor that is not dense ({'meta' if tensor.is_meta else tensor.layout})")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        raise Foreign("a tensor with more numbers than there are")
    return size
