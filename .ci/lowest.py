"""Prints the lowest versions that setup.cfg admits, as constraints for pip."""

import re
from configparser import ConfigParser
from pathlib import Path

config = ConfigParser()
config.read(Path(__file__).parents[1] / "setup.cfg")
for line in config["options"]["install_requires"].split():
    found = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line)
    assert found, f"Expected NAME>=VERSION in setup.cfg, got {line}"
    print(f"{found[1]}=={found[2]}")
