"""The request that a command was given, kept beside its results, so that `--config FILE` repeats it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import LightningArgumentParser
from clafusion.lightning_modules.experiments.runner import ExperimentFailed
from clafusion.lightning_modules.files import write_text

#: The first line of such a file.
_HEADER = "# What clafusion was asked for; --config with this file repeats it.\n"
#: The commands that keep it beside their output, under its name.
_BESIDE = frozenset({"fuse", "transfer"})


@contextmanager
def saving_request(command: str, config: Any, parser: LightningArgumentParser, writes: bool) -> Iterator[None]:
    """Save the request once the enclosed work is done, also if stages of an experiment have failed.

    Args:
        command: Of the command line.
        config: Its parsed arguments.
        parser: Its parser.
        writes: Whether this is the process that writes.

    Raises:
        FusionError: The user has written a file of that name, and it may not be replaced; nothing is done then.
    """
    path = None if config.get("align_only") else _path(command, config)
    if path is not None and path.exists() and not config.get("overwrite", False) and not _is_request(path):
        raise FusionError(f"Expected to write a new file, got {path}, which exists; give --overwrite, or a new folder")
    failure = None
    try:
        yield
    except ExperimentFailed as error:
        failure = error
    if path is not None and writes:
        write_text(path, _HEADER + parser.dump(_as_asked(config)))
    if failure is not None:
        raise failure


def _path(command: str, config: Any) -> Path | None:
    """Return where the request goes; None for commands that keep none."""
    if command in _BESIDE:
        return Path(config["output"]).with_suffix(".yaml")
    if command != "pipeline":
        return None
    folder = config["output"] or Path(config["trainer.default_root_dir"] or "runs") / config["experiment"]["name"]
    return Path(folder) / "pipeline.yaml"


def _is_request(path: Path) -> bool:
    """Whether a file is one of ours."""
    return path.is_file() and path.read_bytes().startswith(_HEADER.encode())


def _as_asked(config: Any) -> Any:
    """Return the arguments to keep, given the parsed ones.

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
