"""Neurons chosen among those of all parents: the selection by itself, and networks that are made of them."""

import pytest
import torch
from torch import Tensor, nn

from clafusion import FusionError, FusionOptions, fuse
from clafusion.networks import MLP, VGG, ResNet
from clafusion.transport.selection import selection
from tests.helpers import accuracy, randomised, trained
from tests.invariance import enliven
from tests.zoo import ZOO

UNION = {"targets": "union", "num_samples": 400}


def left(covariance: Tensor, kept: list[int]) -> float:
    """The variance that the best linear reconstruction from some neurons leaves."""
    inner = covariance[kept][:, kept]
    return float((covariance - covariance[:, kept] @ torch.linalg.pinv(inner) @ covariance[kept]).diagonal().sum())


def test_the_first_neuron_is_the_one_that_leaves_least():
    features = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)).double() @ torch.randn(7, 7).double()
    covariance = features.T.cov()
    chosen = selection(covariance, torch.ones(7).double(), 3)[0].tolist()
    for count in range(3):
        rest = [left(covariance, [*chosen[:count], i]) for i in range(7) if i not in chosen[:count]]
        assert left(covariance, chosen[: count + 1]) <= min(rest) * (1 + 1e-3)


def test_a_neuron_is_not_chosen_beside_its_copy():
    features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).double()
    covariance = torch.cat([features, 2 * features], 1).T.cov()
    chosen = selection(covariance, torch.ones(8).double(), 4)[0]
    assert sorted((chosen % 4).tolist()) == [0, 1, 2, 3]


def test_a_combination_of_others_is_chosen_before_a_copy():
    """Behind an activation it is one no more; a copy stays one."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 3, generator=generator).double()
    features = torch.cat([features, features @ torch.randn(3, 2, generator=generator).double()], 1)
    covariance = torch.cat([features, features], 1).T.cov()
    chosen, gained = selection(covariance, torch.ones(10).double(), 5)
    assert sorted((chosen % 5).tolist()) == [0, 1, 2, 3, 4]
    assert (gained[:3] > 0).all() and (gained[3:] == 0).all()


def test_groups_are_chosen_whole():
    covariance = torch.diag(torch.tensor([1.0, 1.0, 5.0, 0.1, 2.0, 2.0])).double()
    chosen = selection(covariance, torch.ones(6).double(), 2, torch.tensor([0, 0, 1, 1, 2, 2]))[0]
    assert chosen.tolist() == [1, 2]


NETWORKS = {
    "mlp": (lambda: MLP(8, [10, 8, 6], 4, bias=True), (8,)),
    "mlp_bn": (lambda: MLP(8, [10, 8], 4, bias=True, batch_norm=True), (8,)),
    "vgg": (lambda: VGG([[6], [8, 8]], 4, bias=True, batch_norm=True), (3, 8, 8)),
    "resnet": (lambda: ResNet([1, 1], 6, 4, batch_norm=True), (3, 8, 8)),
    "vit": (ZOO["torchvision/vit"].make, ZOO["torchvision/vit"].shape),
}


@pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_united_with_itself_is_itself(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = randomised(make()) if name != "vit" else enliven(make())
    samples = torch.randn(400 if name != "vit" else 60, *shape, dtype=torch.float64)
    fused = fuse([network, network], [samples], FusionOptions(**UNION)).model
    with torch.no_grad():
        error = (fused(samples[:50]) - network(samples[:50])).abs().max() / network(samples[:50]).abs().max()
    assert float(error) < 1e-4


def experts(seed: int) -> tuple[list[nn.Module], Tensor, Tensor, Tensor, Tensor]:
    """Two networks of unequal depth and width that each learned half of six classes, samples and a test set."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.2 * torch.randn(6, 10, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(6, (count,), generator=generator)
        return centres[labels] + torch.randn(count, 10, generator=generator), labels

    x, y = draw(2000)
    parents: list[nn.Module] = []
    for number, hidden in enumerate(([24, 20, 16], [20, 12])):
        torch.manual_seed(seed + number)
        network = MLP(10, hidden, 6, bias=True)
        own = (y < 3) if number == 0 else (y >= 3)
        parents.append(trained(network, x[own], y[own], 150))
    return parents, draw(1000)[0], *draw(1000), x


def test_parents_that_know_different_classes_are_united():
    parents, samples, x, y, _ = experts(0)
    best = max(accuracy(parent, x, y) for parent in parents)
    options = {"teacher": "auto", "num_samples": 1000}
    united = fuse(parents, [samples], FusionOptions(targets="auto", **options))
    control = fuse(parents, [samples], FusionOptions(targets="matched", anchor_lead=1e9, num_samples=1000)).model
    assert accuracy(united.model, x, y) > best + 0.2
    assert accuracy(united.model, x, y) >= accuracy(control, x, y)
    assert united.teacher is not None and united.teacher.gate is not None
    assert set(united.candidates) == {"anchor", "union"}
    assert united.chosen == min(united.candidates, key=united.candidates.__getitem__)
    assert sum(united.trust) == pytest.approx(1) and min(united.trust) > 0.3


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_the_width_is_a_multiple_of_the_anchors(width):
    parents, samples, x, y, _ = experts(0)
    options = FusionOptions(targets="union", teacher="gated", width=width, num_samples=1000)
    fused = fuse(parents, [samples], options).model
    assert [layer.out_features for layer in fused.modules() if isinstance(layer, nn.Linear)][:-1] == [
        round(width * size) for size in (24, 20, 16)
    ]
    assert accuracy(fused, x, y) > 0.7


def test_parents_that_agree_give_the_anchor_alone_without_a_trial():
    parents, samples, *_ = experts(0)
    fused = fuse([parents[0], parents[0]], [samples], FusionOptions(targets="auto", num_samples=300))
    assert fused.chosen == "anchor" and not fused.candidates


def test_networks_that_mix_tokens_have_no_pool():
    torch.manual_seed(0)
    network = ZOO["timm/mixer"].make().eval()
    samples = torch.randn(8, *ZOO["timm/mixer"].shape)
    with pytest.raises(FusionError, match="Expected neurons along one dimension behind .*; use targets=matched"):
        fuse([network, network], [samples], FusionOptions(targets="union", num_samples=8))
