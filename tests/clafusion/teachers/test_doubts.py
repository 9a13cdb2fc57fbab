"""Parents that add nothing are named, on digits, without their labels."""

import math
import warnings
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clafusion import FusionOptions, fuse
from clafusion.networks import MLP
from clafusion.teachers.doubts import INFORMATION, information, warn_of_doubts
from clafusion.teachers.teacher import teacher_of
from tests.helpers import accuracy, trained

DISJOINT = (range(5), range(5, 10))


@cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


@cache
@torch.enable_grad()
def parent(labels: range, steps: int = 60) -> nn.Module:
    """A network that was trained on some digits; with 0 steps, an untrained one."""
    x, y = digits()
    own = torch.isin(y, torch.tensor(list(labels)))
    torch.manual_seed(labels[0])
    return trained(MLP(64, [32, 24], 10, bias=True), x[own], y[own], steps)


@torch.no_grad()
def told(parents: list[nn.Module], kind: str = "auto", weights: tuple[float, ...] = ()) -> list[str]:
    """The warnings about parents."""
    logits = [one(digits()[0]) for one in parents]
    weights = weights or (1 / len(parents),) * len(parents)
    teacher = teacher_of(logits, weights, kind, 1.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_doubts(teacher, logits, tuple(teacher.shares(logits).mean(0).tolist()))
    return [str(one.message) for one in found]


def test_parents_that_know_disjoint_classes_raise_no_doubt():
    parents = [parent(labels) for labels in DISJOINT]
    assert told(parents) == told(parents, "mean") == []
    assert told([parent(range(10)), parent(range(10), steps=30)]) == []
    with torch.no_grad():
        half, least = (information(one(digits()[0])) for one in (parents[0], parent(range(10), steps=6)))
    # Even one that has hardly begun says more than chance.
    assert half > 100 * INFORMATION and least > 3 * INFORMATION
    assert 0.3 < accuracy(parent(range(10), steps=6), *digits()) < 0.7


@pytest.mark.parametrize("kind", ["mean", "gated"])
def test_an_untrained_parent_is_named(kind):
    good, untrained = parent(range(10)), parent(range(10), steps=0)
    for parents, number in (([good, untrained], 1), ([untrained, good, parent(range(5))], 0)):
        [message] = told(parents, kind)
        assert message.startswith(f"Expected trained parents, got parent {number}, whose answers do not depend")
        assert message.endswith("give it weight 0 or leave it out")
    assert told([good, untrained], kind, (1.0, 0.0)) == []
    assert told([untrained, untrained], kind) == []
    assert told([untrained, parent(range(9), steps=0)], kind) == []  # nothing speaks for either


def test_a_collapsed_parent_is_named():
    constant = nn.Linear(64, 10)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(100 * torch.eye(10)[3])
    assert "got parent 0" in told([constant, parent(range(10))])[0]


def test_a_parent_that_the_gate_hardly_trusts_is_named():
    x = digits()[0]
    logits = [parent(labels)(x).detach() for labels in DISJOINT]
    teacher = teacher_of(logits, (0.98, 0.02), "gated", 1.0)
    trust = tuple(teacher.shares(logits).mean(0).tolist())
    assert 0 < trust[1] < 0.05
    with pytest.warns(UserWarning, match=r"parent 1 is trusted on only [\d.]+% of the samples \(parent 0: 9\d"):
        warn_of_doubts(teacher, logits, trust)


def test_fuse_gives_the_warning():
    options = FusionOptions(teacher="gated", num_samples=300)
    with pytest.warns(UserWarning, match="Expected trained parents, got parent 1"):
        fuse([parent(range(10)), parent(range(10), steps=0)], [digits()[0]], options)


def test_information_is_that_of_sample_and_answer():
    assert information(torch.randn(1, 4).expand(9, 4)) == pytest.approx(0, abs=1e-12)
    # Half of the samples surely of one class, half of another, out of four.
    assert information(100 * torch.eye(4)[[0, 1] * 5]) == pytest.approx(math.log(2) / math.log(4))
