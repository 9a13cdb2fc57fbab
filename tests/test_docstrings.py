"""The examples in the docstrings of the core run and give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import clafusion


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
