"""The names that packages had in version 0.1: an import of one says what to write instead, and nothing else changes."""

import importlib
import importlib.util
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import clafusion
from clafusion.old_names import NEW_NAMES
from tests.helpers import ROOT


def line_of(name: str) -> str:
    """What an import of an old name says."""
    present = NEW_NAMES[name]
    return f"Expected {present}, got {name}; write `from {present} import ...`"


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder in which a program runs that finds clafusion installed, not a checkout."""
    monkeypatch.chdir(tmp_path)
    others = [path for path in sys.path if Path(path).resolve() != ROOT and path != ""]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    yield tmp_path
    for name in list(sys.modules):
        if name.partition(".")[0] in NEW_NAMES:
            del sys.modules[name]


@pytest.mark.parametrize("name", NEW_NAMES)
def test_in_a_checkout_an_old_import_names_the_present_one(name):
    assert importlib.util.find_spec(name).origin.startswith(str(ROOT))
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(name)
    assert str(error.value) == line_of(name)


@pytest.mark.parametrize("name", NEW_NAMES)
@pytest.mark.parametrize("more", ["", ".fusion"])
def test_where_it_is_installed_an_old_import_names_the_present_one(installed, name, more):
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(name + more)
    assert str(error.value) == line_of(name) and error.value.name == name


def test_a_program_ends_with_the_line(tmp_path):
    code = "import clafusion\nfrom callbacks import FusionCallback"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {line_of('callbacks')}"


def test_tools_that_ask_for_an_old_name_are_told_that_there_is_none(installed):
    assert [importlib.util.find_spec(name) for name in NEW_NAMES] == [None] * len(NEW_NAMES)


def test_other_names_are_not_found_as_before(installed):
    with pytest.raises(ModuleNotFoundError, match="^No module named 'callback'$"):
        importlib.import_module("callback")


def test_there_is_one_finder():
    importlib.reload(clafusion)
    assert [type(finder).__name__ for finder in sys.meta_path].count("OldNames") == 1


@pytest.mark.parametrize("marker", ["__init__.py", "other.py"], ids=["package", "namespace package"])
@pytest.mark.parametrize("name", NEW_NAMES)
def test_a_package_of_the_users_own_is_theirs(installed, name, marker):
    (installed / name).mkdir()
    (installed / name / marker).touch()
    (installed / name / "mine.py").write_text("HERE = 1\n")
    assert importlib.import_module(f"{name}.mine").HERE == 1


def test_a_finder_that_comes_later_is_asked_too(installed, monkeypatch):
    (installed / "hidden").mkdir()
    (installed / "hidden/callbacks.py").write_text("HERE = 1\n")

    class Later:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return PathFinder.find_spec(name, [str(installed / "hidden")])

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Later])
    assert importlib.import_module("callbacks").HERE == 1
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module("datamodules")
    assert str(error.value) == line_of("datamodules")
