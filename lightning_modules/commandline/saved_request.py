"""What was asked of a command, kept beside its results, so that `--config FILE` repeats it."""

import copy
from pathlib import Path
from typing import Any

from clafusion.errors import FusionError

#: The first line of such a file.
REQUEST = "# What clafusion was asked for; --config with this file repeats it.\n"
_NAMES = {"fuse": "fusion.yaml", "transfer": "transfer.yaml"}


def request_path(command: str, config: Any) -> Path | None:
    """Where it goes; None for commands that keep none.

    Args:
        command: Of the command line.
        config: Its parsed arguments.
    """
    if command in _NAMES:
        return Path(config["output"]).parent / _NAMES[command]
    if command != "pipeline":
        return None
    folder = config["output"] or Path(config["trainer.default_root_dir"] or "runs") / config["experiment"]["name"]
    return Path(folder) / "pipeline.yaml"


def check_request(path: Path | None, overwrite: bool) -> None:
    """Refuses to replace a file of that name that the user has written.

    Raises:
        FusionError: There is one, and it may not be replaced.
    """
    if path is None or overwrite or not path.exists():
        return
    if not path.is_file() or not path.read_bytes().startswith(REQUEST.encode()):
        raise FusionError(f"Expected to write a new file, got {path}, which exists; give --overwrite, or a new folder")


def as_asked(config: Any) -> Any:
    """The arguments to keep, given the parsed ones.

    The small scale of an experiment may name other data. It has become `--data` by now, unless the user gave another,
    and must not take the place of that when the file is read again.
    """
    experiment = config.get("experiment")
    small = experiment.get("small") if isinstance(experiment, dict) else None
    if config.get("scale") != "small" or not isinstance(small, dict) or "class" not in (small.get("data") or {}):
        return config
    kept = copy.deepcopy(config)
    kept["experiment"]["small"].pop("data")
    return kept
