"""Lays the packages out in build/types as they are installed, by links, for tools that read the source by its names.

mypy and mkdocstrings look for clafusion.callbacks in clafusion/callbacks; setup.cfg says where it is.
"""

import shutil
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "types"


def lay_out() -> None:
    """Make the folder anew."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    mapped = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    shutil.rmtree(FOLDER, ignore_errors=True)
    whole = FOLDER / "clafusion"
    whole.mkdir(parents=True)
    for path in (ROOT / mapped.pop("clafusion")).iterdir():
        if path.name != "__pycache__":
            (whole / path.name).symlink_to(path)
    for name, top in mapped.items():
        whole.joinpath(*name.split(".")[1:]).symlink_to(ROOT / top)


if __name__ == "__main__":
    lay_out()
