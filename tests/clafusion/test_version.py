"""The version: the package says it, and its metadata take it from there."""

from configparser import ConfigParser
from importlib.metadata import version

import clafusion
from tests.helpers import ROOT


def test_the_version_is_that_of_the_package():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: clafusion.__version__"
    assert clafusion.__version__ == version("clafusion")
    assert not [name for name in vars(clafusion) if name in ("version", "explain_old_names")]
