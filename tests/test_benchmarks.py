"""The benchmarks reach into the library; one case of the one that reaches furthest is run."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("options", ["none", "paper"])
def test_streamed_transport_costs_are_those_of_one_sample_at_a_time(options):
    case = {"models": ["resnet34_eighth", "resnet18_eighth"], "samples": 40, "options": options, "compare": True}
    command = [sys.executable, str(ROOT / "benchmarks" / "fusion.py"), "--case", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["difference"] < 1e-5
