"""The output layer with few samples: its ridge is chosen on some that it is not fitted to."""

import torch

from clafusion import Ensemble, FusionOptions, fuse
from clafusion.correction import refit
from clafusion.networks import MLP
from tests.helpers import randomised


def divergence(samples, test, monkeypatch, ridges):
    """How far a fused network is from the ensemble of its parents, and its output layer."""
    monkeypatch.setattr(refit, "RIDGES", ridges)
    parents = [randomised(MLP(16, [30], 3, bias=True), seed) for seed in range(2)]
    fused = fuse(parents, [samples], FusionOptions(num_samples=len(samples))).model
    with torch.no_grad():
        wanted = Ensemble(parents)(test).log_softmax(1)
        terms = wanted.exp() * (wanted - fused(test).log_softmax(1))
    return float(terms.sum(1).mean()), fused.fc2.weight.detach()


def test_few_samples_take_a_larger_ridge_and_many_the_given_one(monkeypatch):
    draws = torch.randn(1600, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    test = draws[600:]
    given, _ = divergence(draws[:60], test, monkeypatch, (1.0,))
    chosen, _ = divergence(draws[:60], test, monkeypatch, (1.0, 10.0, 100.0, 1000.0))
    assert chosen < 0.8 * given
    enough = 10 * 31  # inputs of the output layer and its constant
    weights = [divergence(draws[:enough], test, monkeypatch, ridges)[1] for ridges in ((1.0,), (1000.0,))]
    assert torch.equal(*weights)


def test_an_output_layer_that_is_right_is_kept():
    """The parents are one: its own output layer, where the regression begins, is right at any ridge."""
    samples = torch.randn(60, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = randomised(MLP(16, [30], 3, bias=True))
    fused = fuse([network, network], [samples], FusionOptions()).model
    assert torch.allclose(fused.fc2.weight, network.fc2.weight, atol=1e-6)
