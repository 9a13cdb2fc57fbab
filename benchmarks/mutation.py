"""Would the tests notice? Changes one thing at a time in the heart of the library and runs the tests of that package.

    pip install cosmic-ray
    python benchmarks/mutation.py --mutants_each 40            # a seeded choice of changes for every package
    python benchmarks/mutation.py --packages '[alignment]' --mutants_each 1000

The changes are those of Cosmic Ray (operators, comparisons, numbers, keywords, decorators). The tests run in a fork of
this process, which has imported what they need: without that, starting Python would take most of the time. A change
that no test notices is printed; it is either without effect or a test is missing.
"""

import difflib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy  # noqa: F401
import ot  # noqa: F401
import pytest
import pytorch_lightning  # noqa: F401
import scipy.optimize  # noqa: F401
import torch
import torchvision  # noqa: F401
from common import print_table
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from jsonargparse import auto_cli

ROOT = Path(__file__).parents[1]
#: The packages to change; the tests in the folder of that name must notice. The first that fails ends the run.
PACKAGES = ("alignment", "balancing", "transport", "fusion", "correction")
#: Seconds after which a run of tests counts as having noticed: an endless loop.
TIMEOUT = 900


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a given source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Only that module."""
        return importlib.util.spec_from_loader(name, self, origin="changed") if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the source."""
        exec(compile(self.source, f"{self.name} (changed)", "exec"), module.__dict__)


def mutants(source: str) -> list[tuple[str, str]]:
    """All changed sources, with the name of what was changed; type hints are left alone."""
    found = []
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or "BitOr" in name:
            continue
        for occurrence in range(10_000):
            changed = mutate_code(source, operator(), occurrence)
            if changed is None:
                break
            found.append((name.partition("/")[2], changed))
    return found


def modules_of(package: str) -> dict[str, Path]:
    """The source files of a package and of those inside it, by the names that they are imported by."""
    paths = sorted((ROOT / "clafusion" / package).rglob("*.py"))
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if path.stem != "__init__"}
    if not named or not list((ROOT / "tests" / "clafusion" / package).glob("test_*.py")):
        raise SystemExit(f"Expected a package with modules and tests, got {package!r}; choose from {PACKAGES}")
    return named


def noticed(package: str, module: str, source: str) -> bool:
    """Whether a test of a package fails when one of its modules has this source."""
    child = os.fork()
    if child == 0:
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        sys.meta_path.insert(0, Changed(module, source))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        signal.alarm(TIMEOUT)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"tests/clafusion/{package}"])
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    return status != 0


def difference(source: str, changed: str) -> str:
    """The lines that differ."""
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in list(lines)[2:])


def main(packages: Sequence[str] = PACKAGES, mutants_each: int = 40, seed: int = 0) -> None:
    """Print what survives, and a table.

    Args:
        packages: Of `clafusion`.
        mutants_each: Changes to try in each, at most.
        seed: Of their choice.
    """
    torch.set_num_threads(1)
    rows = []
    for package in packages:
        sources = {module: path.read_text() for module, path in modules_of(package).items()}
        if noticed(package, *next(iter(sources.items()))):
            raise SystemExit(f"Expected the tests of {package} to pass as it is, got a failure; repair it first")
        everything = [(module, *mutant) for module, source in sources.items() for mutant in mutants(source)]
        chosen = random.Random(seed).sample(everything, min(mutants_each, len(everything)))
        survivors = 0
        for module, name, changed in chosen:
            if not noticed(package, module, changed):
                survivors += 1
                print(f"{module}: {name} is not noticed\n{difference(sources[module], changed)}\n", flush=True)
        rows.append({
            "package": package, "changes there are": len(everything), "tried": len(chosen),
            "noticed": len(chosen) - survivors, "%": 100 * (1 - survivors / len(chosen)),
        })  # fmt: skip
    print_table("Changes that a test notices", rows)


if __name__ == "__main__":
    auto_cli(main)
