"""Samples that are made up for a network, and the shape of them that a network carries."""

import copy

import pytest
import torch
from torch import nn

from clafusion import FusionError, FusionOptions, describe, fuse, networks
from clafusion.formats.files import check_saved
from clafusion.tracing.example import example_for, example_of, with_input_shape
from clafusion.tracing.fingerprints import fingerprint
from tests.lightning_modules.normed import Normed

SAMPLES = torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def parents() -> list[nn.Module]:
    return [Normed(depth, 8, side=6).eval() for depth in (2, 1)]


def test_a_fused_network_carries_the_shape_of_its_samples():
    result = fuse(parents(), [SAMPLES], FusionOptions(num_samples=20, correction="none"))
    for network in (result.model, copy.deepcopy(result.model), result.balanced[1]):
        assert describe(network)["input"] == [1, 6, 6]
    assert example_of(result.structure.capture).shape == (2, 1, 6, 6)


def test_a_network_of_ours_carries_nothing():
    pair = [networks.MLP(36, hidden, 3).eval() for hidden in ([5, 4], [5])]
    result = fuse(pair, [SAMPLES.flatten(1)], FusionOptions(num_samples=20, correction="none"))
    assert vars(result.model).keys() == vars(pair[0]).keys()


def test_the_shape_is_no_part_of_what_a_network_computes():
    one, other = Normed(1, 8, side=6).eval(), with_input_shape(Normed(1, 8, side=6).eval(), (1, 6, 6))
    assert fingerprint(one, SAMPLES) == fingerprint(other, SAMPLES)


def test_the_shape_that_a_network_carries_comes_first():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    assert example_for(network)[0].shape == (2, 2, 32, 32)
    example, control = example_for(with_input_shape(network, (2, 9, 7)))
    assert example.shape == (2, 2, 9, 7) and control is None


def test_a_network_of_ours_and_a_stored_one_can_be_saved_without_a_look():
    refused = torch.zeros(2, 999)  # samples that nothing takes
    check_saved(networks.MLP(4, [3], 2), refused, "a.ckpt")
    with pytest.raises(FusionError, match=r"\(in b.ckpt\)$"):
        check_saved(nn.Linear(4, 2).eval(), refused, "b.ckpt")
