"""The experiments that are installed with the package: by name, as a list, as arguments of the command line."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from clafusion import configs
from clafusion.errors import FusionError

FOLDER = configs.FOLDER / "experiments"


def names() -> list[str]:
    """Return the names of the experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of an experiment.

    Raises:
        FusionError: There is none of that name.
    """
    if name not in names():
        near = get_close_matches(name, names(), 3, 0.5)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        known = ", ".join(names())
        raise FusionError(
            f"Expected the name of an experiment (or --config FILE), got {name!r}; {guess}there are {known}"
        )
    return FOLDER / f"{name}.yaml"


def named(arguments: Sequence[str]) -> list[str]:
    """Replace the name of an experiment, which may follow the subcommand, by its file.

    Args:
        arguments: Those after the subcommand.

    Raises:
        FusionError: There is no experiment of that name.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    return ["--config", str(find(arguments[0])), *arguments[1:]]


def at_scale(arguments: Sequence[str]) -> list[str]:
    """Add the data module that an experiment has at its small scale, if that scale is asked for.

    It comes before what the user says about the data after naming the experiment, which therefore wins.

    Args:
        arguments: Those after the subcommand, the configurations by their files.
    """
    files = [_read(arguments[place + 1]) for place in _places(arguments, "--config") if place + 1 < len(arguments)]
    files += [_read(argument.partition("=")[2]) for argument in arguments if argument.startswith("--config=")]
    known = {key: value for config in files for key, value in config.items()}
    small = known.get("experiment", {}).get("small") if isinstance(known.get("experiment"), dict) else None
    data = small.get("data") if isinstance(small, dict) else None
    scales = [arguments[place + 1] for place in _places(arguments, "--scale") if place + 1 < len(arguments)]
    scales += [argument.partition("=")[2] for argument in arguments if argument.startswith("--scale=")]
    scale = scales[-1] if scales else known.get("scale")
    if scale != "small" or not isinstance(data, dict) or "class" not in data:
        return list(arguments)
    module = {"class_path": data["class"], "init_args": data.get("init_args", {})}
    last = max(place for place, argument in enumerate(arguments) if argument.partition("=")[0] == "--config")
    later = [place for place in range(last, len(arguments)) if arguments[place].startswith("--data")]
    place = min(later, default=len(arguments))
    return [*arguments[:place], f"--data={json.dumps(module)}", *arguments[place:]]


def check_plain(value: Any, where: str = "experiment") -> None:
    """Refuse anything but plain containers: the parser would make an object of a value that names a class.

    Raises:
        FusionError: Something else is there.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_plain(item, f"{where}.{name}")
    elif isinstance(value, list):
        for item in value:
            check_plain(item, where)
    elif not isinstance(value, str | int | float | None):
        raise FusionError(f"Expected plain values in {where}, got something with a class_path; leave it out")


def print_list() -> None:
    """Print what every experiment does and what it costs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("experiment", "what it does", "what it costs", show_lines=True)
    table.columns[0].no_wrap = True
    for name in names():
        experiment = _read(str(find(name)))["experiment"]
        table.add_row(name, experiment.get("description", ""), experiment.get("cost", ""))
    console = Console()
    console.print(table)
    console.print("clafusion pipeline NAME [--scale small] [--seeds '[0]']", highlight=False, soft_wrap=True)


def _places(arguments: Sequence[str], option: str) -> list[int]:
    return [place for place, argument in enumerate(arguments) if argument == option]


def _read(path: str) -> dict[str, Any]:
    """Return a configuration as plain containers; nothing of an unreadable one, which the parser refuses."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
