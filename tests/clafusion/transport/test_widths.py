"""Sizes of neuron spaces: what a network of other sizes costs, and which sizes gain most within a budget."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clafusion import FusionError, FusionOptions, fuse, trace
from clafusion.networks import MLP, VGG, ResNet
from clafusion.tracing.resizing import room_for
from clafusion.transport.widths import multiply_adds_of, parameters_of, sizes_within
from tests.helpers import mlp, randomised, vectors


def depthwise() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


NETWORKS = {
    "mlp": (lambda: MLP(8, [10, 6], 4, bias=True), (8,)),
    "vgg": (lambda: VGG([[6], [8, 4]], 4, bias=True, batch_norm=True), (3, 8, 8)),
    "resnet": (lambda: ResNet([1, 1], 4, 4, batch_norm=True), (3, 8, 8)),
    "depthwise": (depthwise, (3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("more", [0, 3])
def test_costs_are_those_of_a_network_of_these_sizes(name, more):
    make, shape = NETWORKS[name]
    network, samples = make().eval(), torch.randn(2, *shape)
    structure = trace(network, samples)
    sizes = {**structure.sizes, **{space: structure.sizes[space] + more for space in structure.free_spaces}}
    resized, _ = room_for(network, structure, sizes, samples)
    assert parameters_of(structure, sizes) == sum(parameter.numel() for parameter in resized.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resized(samples[:1])
    assert 2 * multiply_adds_of(structure, sizes) == counter.get_total_flops()


COSTS = {"a": 3, "b": 2, "c": 5}
GAINS = {
    "a": torch.tensor([9.0, 8.0, 2.0, 0.1]),
    "b": torch.tensor([3.0, 1.0, 0.5, 0.5]),
    "c": torch.tensor([20.0, 20.0, 9.0, 0.2]),
}


def total(sizes):
    return sum(cost * sizes[name] for name, cost in COSTS.items())


def gain(sizes):
    return sum(float(GAINS[name][: sizes[name]].sum()) for name in COSTS)


@pytest.mark.parametrize("budget", range(20, 44))
def test_nothing_gains_more_at_the_same_cost(budget):
    """With costs that add up, the best of all combinations that cost no more than the one that was found."""
    found = sizes_within(budget, total, dict.fromkeys(COSTS, 2), GAINS)
    everything = (dict(zip(COSTS, sizes, strict=True)) for sizes in product((2, 3, 4), repeat=3))
    assert total(found) <= budget
    assert gain(found) == pytest.approx(max(gain(sizes) for sizes in everything if total(sizes) <= total(found)))


def test_sizes_grow_with_the_budget():
    found = [sizes_within(budget, total, dict.fromkeys(COSTS, 2), GAINS) for budget in range(20, 44)]
    assert all(one[name] <= other[name] for one, other in zip(found, found[1:], strict=False) for name in COSTS)
    assert found[0] == dict.fromkeys(COSTS, 2) and found[-1] == dict.fromkeys(COSTS, 4)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
@pytest.mark.parametrize("width", [0.5, 1.0])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "depthwise"])
@pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning")
def test_a_budget_is_met(name, width, budget):
    make, shape = NETWORKS[name]
    parents = [randomised(make(), seed) for seed in range(2)]
    samples = torch.randn(80, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = FusionOptions(targets="union", teacher="gated", width=width, budget=budget, num_samples=80)
    fused = fuse(parents, [samples], options).model
    anchor, result = trace(parents[0], samples[:2]), trace(fused, samples[:2])
    count = parameters_of if budget == "parameters" else multiply_adds_of
    uniform = {space: round(width * anchor.sizes[space]) for space in anchor.free_spaces}
    most, total = count(anchor, {**anchor.sizes, **uniform}), count(result, result.sizes)
    largest = max(
        count(result, {**result.sizes, space: result.sizes[space] + 1}) - total for space in result.free_spaces
    )
    assert most - 1.5 * largest < total <= most
    assert min(result.sizes.values()) >= 2


def test_too_narrow_a_width_is_refused():
    message = r"Expected a width that leaves 'fc1' at least 2 neurons, got 0.1, which leaves 1 of 10; choose a larger"
    with pytest.raises(FusionError, match=message):
        fuse([mlp([10, 30]), mlp([10, 30], 1)], [vectors(40)], FusionOptions(targets="union", width=0.1))
