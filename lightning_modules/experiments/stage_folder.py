"""What a stage leaves in its folder, and whether a folder is that of a stage: begun, finished, or of something else.

`stage.json` is written first: the stage, and the checksums of its inputs. `done.json` is written last: the checksums of
its files, and its result. Both are whole or not there.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, cast

from clafusion.errors import FusionError
from clafusion.lightning_modules.checkpoints.reading import read_checkpoint
from clafusion.lightning_modules.commands.records import write_results
from clafusion.lightning_modules.files import sha256

#: What stages did before these settings could be given.
EARLIER = {
    "settings.options.teacher": "mean",
    "settings.options.gate_temperature": 1.0,
    "settings.options.targets": "matched",
    "settings.options.width": 1.0,
    "settings.options.budget": "none",
    "settings.teacher": "mean",
    "settings.gate_temperature": 1.0,
}
REMEDY = "choose another --output, or move {} away to run this stage again"


class StageRecord(TypedDict):
    """The content of `stage.json`, besides the checksums of the inputs.

    Only the description is compared: it says all that the result depends on. The first version wrote nothing else.
    """

    name: str
    outputs: dict[str, dict[str, str]]
    description: dict[str, Any]


def slug(name: str) -> str:
    """Return a name that a file can have."""
    return name.replace(", ", "_").replace(" ", "_").replace("=", "").replace(":", "-")


def finished(folder: Path, description: dict[str, Any], inputs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Return the result that a finished stage recorded; None if there is still something to do.

    Args:
        folder: Of the stage; it need not exist.
        description: All that the result of the stage depends on, as plain values.
        inputs: The files it reads, by name; those that are not there yet are not compared.

    Raises:
        FusionError: The folder belongs to something else, an input has changed, a file is not the recorded one, or what
            an interrupted training would go on from is no checkpoint of its own.
    """
    if not _begun(folder):
        return None
    begun = _read(folder / "stage.json")
    _check_same(folder, _flat(begun["description"]), _flat(json.loads(json.dumps(description))))
    for name, path in inputs.items():
        if path.is_file() and begun["inputs"].get(name) != checksum(path):
            raise FusionError(
                f"Expected {folder} to come from {path} as it is, got another {name}; {REMEDY.format(folder)}"
            )
    if not (folder / "done.json").exists():
        _check_resumable(folder)
        return None
    done = _read(folder / "done.json")
    for name, digest in done["outputs"].items():
        if not (folder / name).is_file() or checksum(folder / name) != digest:
            found = "another one" if (folder / name).is_file() else "none"
            raise FusionError(f"Expected {folder / name} as this stage wrote it, got {found}; {REMEDY.format(folder)}")
    return cast(dict[str, Any], done["result"])


def begin(folder: Path, record: StageRecord, inputs: Mapping[str, Path]) -> None:
    """Make the folder of a stage, unless it has been begun before.

    Args:
        folder: Of the stage.
        record: The stage.
        inputs: The files it reads, by name.

    Raises:
        FusionError: An input is missing, or the folder cannot be written.
    """
    if _begun(folder):
        return
    for name, path in inputs.items():
        if not path.is_file():
            raise FusionError(f"Expected {name} in {path}, got no such file; run its stage again")
    make_folder(folder)
    checksums = {name: checksum(path) for name, path in inputs.items()}
    write_results({**record, "inputs": checksums}, folder / "stage.json")


def finish(folder: Path, files: Iterable[str], result: Mapping[str, Any]) -> None:
    """Record that a stage is done: the last thing that it does.

    Args:
        folder: Of the stage.
        files: The files that others read, in the folder.
        result: As plain values.

    Raises:
        FusionError: The record cannot be written.
    """
    checksums = {name: checksum(folder / name) for name in files}
    write_results({"outputs": checksums, "result": result}, folder / "done.json")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        FusionError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FusionError(f"Expected a folder for results, got {folder}: {error.strerror}; change --output") from error


def claimed(folder: Path, experiment: dict[str, Any]) -> bool:
    """Whether a folder is that of an experiment.

    Args:
        folder: The folder of the experiment; it need not exist.
        experiment: Plain values that it is known by.

    Raises:
        FusionError: It is that of another experiment, or holds other files.
    """
    record = folder / "experiment.json"
    if record.is_file():
        _check_same(folder, _flat(_read(record)), _flat(experiment))
        return True
    if _visible(folder):
        raise FusionError(
            f"Expected an empty folder, or one of this experiment, got {folder} with other files; "
            "choose another --output"
        )
    return False


def claim(folder: Path, experiment: dict[str, Any]) -> None:
    """Make a folder that of an experiment, unless it is already.

    Raises:
        FusionError: As `claimed`, or it cannot be written.
    """
    if not claimed(folder, experiment):
        make_folder(folder)
        write_results(experiment, folder / "experiment.json")


def checksum(path: Path) -> str:
    """Return the SHA-256 checksum of a file, computed once as long as the file stays the same."""
    status = path.stat()
    return _checksum(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=4096)
def _checksum(path: Path, *version: int) -> str:
    return sha256(path)


def _begun(folder: Path) -> bool:
    """Whether a stage was begun here.

    Raises:
        FusionError: Something else was.
    """
    if (folder / "stage.json").is_file():
        return True
    if _visible(folder):
        raise FusionError(f"Expected {folder} to be a stage's, got one without stage.json; {REMEDY.format(folder)}")
    return False


def _check_resumable(folder: Path) -> None:
    """Refuse what Lightning would load, and what it would load instead."""
    for foreign in folder.glob("hpc_ckpt*"):
        raise FusionError(f"Expected no checkpoint besides those of this stage, got {foreign}; move it away")
    if (folder / "last.ckpt").exists():
        read_checkpoint(folder / "last.ckpt")


def _visible(folder: Path) -> bool:
    """Whether there is anything there, besides what a kill leaves of a file that was being written."""
    if folder.exists() and not folder.is_dir():
        return True
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FusionError(f"Expected a readable record, got {path}; {REMEDY.format(path.parent)}") from error
    wanted = {"stage.json": ("description", "inputs"), "done.json": ("outputs", "result")}.get(path.name, ())
    if not isinstance(content, dict) or any(not isinstance(content.get(name), dict) for name in wanted):
        raise FusionError(f"Expected a record of a stage, got {path}; {REMEDY.format(path.parent)}")
    return content


def _flat(values: Any, where: str = "") -> dict[str, Any]:
    """Return nested values by their path."""
    if not isinstance(values, dict) or not values:
        return {where: values}
    return {
        path: leaf
        for name, value in values.items()
        for path, leaf in _flat(value, f"{where}.{name}" if where else str(name)).items()
    }


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    before = {**{name: setting for name, setting in EARLIER.items() if name in now}, **before}
    names = [name for name in (before | now) if before.get(name) != now.get(name)]
    if names:
        shown = ", ".join(f"{name} {before.get(name)} instead of {now.get(name)}" for name in names[:3])
        more = f" and {len(names) - 3} more differences" if len(names) > 3 else ""
        raise FusionError(
            f"Expected {folder} to be of this experiment, got one with {shown}{more}; {REMEDY.format(folder)}"
        )
