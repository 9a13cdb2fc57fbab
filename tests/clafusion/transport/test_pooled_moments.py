"""What the parents say together depends on their neurons: the Fisher information against Jacobians."""

import torch
from torch import nn
from torch.autograd.functional import jacobian

from clafusion import FusionOptions, fuse
from clafusion.networks import MLP
from clafusion.teachers.teacher import Teacher
from clafusion.transport.pooled_moments import seen_at, sensitivities
from tests.helpers import randomised


def fisher(heads, sizes, activations, weights):
    """The expectation over all classes; activations [neurons of all parents, positions]."""

    def answers(inputs):
        pairs = zip(heads, inputs.split(sizes), weights, strict=True)
        return sum(weight * head(one).softmax(-1) for head, one, weight in pairs).log()

    gradients = jacobian(answers, activations)  # [classes, neurons, positions]
    return sum(
        answer.exp() * gradient @ gradient.T for answer, gradient in zip(answers(activations), gradients, strict=True)
    )


def measured(parents, samples, weights, space):
    """The Fisher information of the neurons of a space, those of the first parent first."""
    balanced = fuse(parents, [samples[:20]], FusionOptions(correction="none")).balancing
    seen = seen_at(balanced, balanced.structure.free_spaces)
    found = sensitivities(balanced, seen, samples, Teacher(weights), FusionOptions(seed=1))[space]
    owners = torch.cat([torch.full((balanced.width(k, space),), k) for k in balanced.holders(space)])
    order = owners.argsort(stable=True)
    return found[order][:, order]


def test_the_fisher_information_of_perceptrons():
    parents = [randomised(MLP(5, [4], 3, bias=True)), randomised(MLP(5, [3], 3, bias=True), 1)]
    sample = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = measured(parents, torch.cat([sample] * 4000), (0.3, 0.7), "fc1")
    with torch.no_grad():
        hidden = torch.cat([parent.fc1(sample).relu()[0] for parent in parents])[:, None]
    heads = [lambda one, parent=parent: parent.fc2(one[:, 0]) for parent in parents]
    expected = fisher(heads, [4, 3], hidden, (0.3, 0.7)).detach()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def convolutional(channels, seed):
    network = nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)
    )
    return randomised(network, seed)


def test_positions_are_added_up():
    parents = [convolutional(3, 0), convolutional(2, 1)]
    sample = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = measured(parents, torch.cat([sample] * 2000), (0.5, 0.5), "0")
    with torch.no_grad():
        hidden = torch.cat([parent[:2](sample)[0] for parent in parents]).flatten(1)
    heads = [lambda one, parent=parent: parent[2:](one.reshape(1, -1, 4, 4))[0] for parent in parents]
    expected = fisher(heads, [3, 2], hidden, (0.5, 0.5)).detach()
    assert float((found - expected).norm() / expected.norm()) < 0.08


def test_draws_follow_the_seed_and_not_the_memory_budget():
    parents = [randomised(MLP(5, [4], 3, bias=True), seed) for seed in range(2)]
    samples = torch.randn(90, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    balanced = fuse(parents, [samples], FusionOptions(correction="none")).balancing
    seen, teacher = seen_at(balanced, balanced.structure.free_spaces), Teacher((0.5, 0.5))
    one, other = (
        sensitivities(balanced, seen, samples, teacher, FusionOptions(memory_budget=budget))["fc1"]
        for budget in (1, 256)
    )
    assert torch.allclose(one, other, rtol=1e-12)
    assert not torch.allclose(one, sensitivities(balanced, seen, samples, teacher, FusionOptions(seed=1))["fc1"])
