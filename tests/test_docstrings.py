"""The examples in the docstrings of the core run and give what they show."""

import ast
import doctest
import importlib
import pkgutil

import pytest

import clafusion
from tests.helpers import ROOT


@pytest.mark.parametrize(
    "module", sorted(info.name for info in pkgutil.walk_packages(clafusion.__path__, "clafusion."))
)
def test_examples_give_what_they_show(module):
    loaded = importlib.import_module(module)
    # An example may use what its module has at hand, as in a session that began with the module's imports.
    result = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_examples():
    assert doctest.testmod(importlib.import_module("clafusion.alignment.dynamic_programming")).attempted > 0


def first_words() -> dict[str, str]:
    """The first words of all docstrings of functions, each with a place where it stands."""
    words = {}
    for top in ("clafusion", "lightning_modules", "datamodules", "callbacks", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                    words[text.split()[0].strip(".,:;`")] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return words


def test_docstrings_have_one_mood():
    words = first_words()
    assert {"Return", "Write", "Run"} <= words.keys()
    # "Writes" where another begins with "Write"; these are nouns, and a conjunction.
    others = {"As", "Numbers"}
    twice = {word: place for word, place in words.items() if word.endswith("s") and word[:-1] in words}
    assert not {word: place for word, place in twice.items() if word not in others}


def test_only_a_question_begins_with_whether():
    assert not {word: place for word, place in first_words().items() if word in ("What", "Where", "Which", "How", "Of")}
