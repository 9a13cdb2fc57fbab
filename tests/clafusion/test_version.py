"""The version: setup.cfg says it, and everything else takes it from there."""

from configparser import ConfigParser

import clafusion
from tests.helpers import ROOT


def test_the_version_is_that_of_the_package():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert clafusion.__version__ == setup["metadata"]["version"]
    assert not [name for name in vars(clafusion) if name in ("version", "explain_old_names")]
