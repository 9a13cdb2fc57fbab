"""The experiments that are installed with the package, by name and as a list."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

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
        experiment = read(str(find(name)))["experiment"]
        table.add_row(name, experiment.get("description", ""), experiment.get("cost", ""))
    console = Console()
    console.print(table)
    console.print("clafusion pipeline NAME [--scale small] [--seeds '[0]']", highlight=False, soft_wrap=True)


def read(path: str) -> dict[str, Any]:
    """Return a configuration as plain containers; nothing of an unreadable one, which the parser refuses."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
