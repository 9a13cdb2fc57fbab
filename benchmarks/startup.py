"""What it costs to begin: imports and the help of the command line, against what they cannot do without.

python benchmarks/startup.py
"""

import resource
import statistics
import subprocess
import sys

from common import print_machine, print_table

COMMANDS = {
    "import torch, scipy, ot": ["-c", "import torch, scipy, ot"],
    "import clafusion": ["-c", "import clafusion"],
    "import pytorch_lightning, jsonargparse": ["-c", "import pytorch_lightning, jsonargparse"],
    "clafusion --help": ["-m", "clafusion", "--help"],
}
#: What each of ours is compared with.
FLOORS = {
    "import clafusion": "import torch, scipy, ot",
    "clafusion --help": "import pytorch_lightning, jsonargparse",
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of one fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(rounds: int = 5) -> None:
    """The table."""
    print_machine()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            taken[name].append(cpu_seconds(arguments))
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    print_table(
        f"Start-up, median of {rounds}",
        [
            {"": name, "CPU s": value, "ratio": value / seconds[FLOORS[name]] if name in FLOORS else ""}
            for name, value in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
