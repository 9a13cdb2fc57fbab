"""Files are written whole or not at all, several of them together."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from clafusion.formats.atomic import write_together


def fail(error: Exception) -> Callable[[BinaryIO], None]:
    """What writes half a file and fails."""

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [None, "part"])
def test_all_files_are_written_or_none(tmp_path, suffix):
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: lambda file: file.write(b"1"), second: lambda file: file.write(b"2")}, suffix)
    assert contents(tmp_path) == {"first": b"1", "second": b"2"}
    for error in (OSError(28, "No space left on device"), KeyError("x")):
        with pytest.raises(type(error)):
            write_together({first: lambda file: file.write(b"3"), second: fail(error)}, suffix)
        assert contents(tmp_path) == {"first": b"1", "second": b"2"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    fsync = os.fsync

    def watched(number: int) -> None:
        seen.append((os.fstat(number).st_size, path.exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", watched)
    write_together({path: lambda file: file.write(b"content")})
    assert seen == [(7, False)] and path.read_bytes() == b"content"


def test_what_a_kill_has_left_under_the_hidden_name_is_overwritten(tmp_path):
    (tmp_path / ".file.part").write_bytes(b"left by a kill, and longer")
    write_together({tmp_path / "file": lambda file: file.write(b"new")}, "part")
    assert contents(tmp_path) == {"file": b"new"}


def test_two_who_write_the_same_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"

    def write(file: BinaryIO) -> None:
        file.write(b"fir")
        write_together({path: lambda other: other.write(b"second")})
        assert path.read_bytes() == b"second"
        file.write(b"st")

    write_together({path: write})
    assert contents(tmp_path) == {"file": b"first"}


def test_links_are_replaced_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for name in ("file", ".file.part"):
        (tmp_path / name).symlink_to(precious)
    write_together({tmp_path / "file": lambda file: file.write(b"new")}, "part")
    assert contents(tmp_path) == {"precious": b"precious", "file": b"new"}
    assert not (tmp_path / "file").is_symlink()


class Full:
    """A file on a full disk."""

    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda file: torch.save({"a": torch.zeros(3)}, Full()), "No space left on device"),
        (fail(RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file")), "the disk may be full"),
        (fail(OSError("in words alone")), "in words alone"),
    ],
    ids=["torch", "text", "no number"],
)
def test_errors_of_the_file_are_told_with_its_name(tmp_path, write, reason):
    path = tmp_path / "file"
    with pytest.raises(OSError) as caught:
        write_together({path: write})
    assert (caught.value.filename, caught.value.strerror) == (str(path), reason)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["missing/file", "a" * 300, "folder"])
def test_a_place_that_cannot_be_written_is_told(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_together({tmp_path / name: lambda file: file.write(b"new")})
    assert caught.value.filename == str(tmp_path / name) and caught.value.strerror
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="an operator that is not known"):
        write_together({tmp_path / "file": fail(RuntimeError("an operator that is not known"))})
    assert contents(tmp_path) == {}
