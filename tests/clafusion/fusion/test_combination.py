"""The plain average and the prediction ensemble."""

import copy
import math

import pytest
import torch
from torch import nn

from clafusion import Ensemble, FusionError, average
from tests import helpers
from tests.helpers import images, mlp, resnet, vectors

BAD_WEIGHTS = [
    [1.0], [1, 2, 3], [-1, 2], [0, 0],
    [math.nan, 1],
    [1, math.nan],
    [1, math.inf],
]  # fmt: skip


@pytest.fixture
def pair():
    return mlp([6, 5], 0, bias=True, batch_norm=True), mlp([6, 5], 1, bias=True, batch_norm=True)


@pytest.mark.parametrize("weights", [None, [1, 1], [3, 1], [0, 2]])
def test_average_is_the_weighted_mean_of_every_parameter_and_buffer(pair, weights):
    shares = [w / sum(weights) for w in weights] if weights else [0.5, 0.5]
    states = [model.state_dict() for model in pair]
    for name, value in average(pair, weights).state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, shares[0] * states[0][name] + shares[1] * states[1][name], rtol=1e-14)
        else:
            assert torch.equal(value, states[0][name])


def test_average_leaves_networks_as_they_are_and_shares_nothing(pair):
    pair[0].train().requires_grad_(False)
    pair[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(pair)
    network = average(pair)
    assert not network.training and all(p.requires_grad for p in network.parameters())
    assert not network._forward_hooks and len(pair[0]._forward_hooks) == 1
    for model, kept in zip(pair, before, strict=True):
        assert model.training == kept.training and helpers.largest_difference(model, kept) == 0
        assert not {t.data_ptr() for t in network.parameters()} & {t.data_ptr() for t in model.parameters()}
    assert not pair[0].fc1.weight.requires_grad


def test_average_of_one_network_is_it(pair):
    assert helpers.largest_difference(average(pair[:1]), pair[0]) == 0


def test_average_of_many(pair):
    models = [resnet([1, 1], seed, batch_norm=True) for seed in range(4)]
    expected = sum(model.conv1.weight for model in models) / 4
    assert torch.allclose(average(models).conv1.weight, expected)
    assert average(models)(images(2, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mlp([7, 5], bias=True, batch_norm=True), r"one architecture, got 'fc1.weight' of shapes \[6, 12\], \[7, 12\]"),
        (mlp([6, 5], batch_norm=True), r"one architecture, got 'fc1.bias' of shapes \[6\], none"),
        (
            mlp([6, 5, 5], bias=True, batch_norm=True),
            r"one architecture, got 'fc3.weight' of shapes \[4, 5\], \[5, 5\]",
        ),
    ],
)
def test_average_refuses_other_architectures(pair, other, message):
    with pytest.raises(FusionError, match=message):
        average([pair[0], other])


@pytest.mark.parametrize("weights", BAD_WEIGHTS)
@pytest.mark.parametrize("function", [average, Ensemble])
def test_refuses_weights_that_are_no_shares(pair, function, weights):
    with pytest.raises(FusionError, match="Expected 2 weights of at least 0 with a positive sum, got"):
        function(pair, weights)


@pytest.mark.parametrize("function", [average, Ensemble])
def test_refuses_no_networks(function):
    with pytest.raises(FusionError, match="Expected"):
        function([])


@pytest.mark.parametrize("weights", [None, [3, 1], [1, 0]])
def test_the_ensemble_averages_probabilities_or_logits(pair, weights):
    shares = [w / sum(weights) for w in weights] if weights else [0.5, 0.5]
    x = vectors(7)
    logits = [model(x) for model in pair]
    mean = sum(share * values.softmax(1) for share, values in zip(shares, logits, strict=True))
    assert torch.allclose(Ensemble(pair, weights)(x), mean.log())
    expected = sum(share * values for share, values in zip(shares, logits, strict=True))
    assert torch.allclose(Ensemble(pair, weights, space="logits")(x), expected)


def test_the_ensemble_is_a_module_that_keeps_its_members(pair):
    ensemble = Ensemble(pair)
    assert list(ensemble.models) == list(pair)
    assert sum(p.numel() for p in ensemble.parameters()) == 2 * sum(p.numel() for p in pair[0].parameters())


def test_the_ensemble_stands_large_logits_and_gradients():
    members = [nn.Linear(2, 3), nn.Linear(2, 3)]
    out = Ensemble(members, [1, 0])(torch.full((4, 2), 1e4))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in members[0].parameters())


def test_the_ensemble_refuses_another_space(pair):
    with pytest.raises(FusionError, match="space probability, logits, gated or auto, got 'labels'"):
        Ensemble(pair, space="labels")
