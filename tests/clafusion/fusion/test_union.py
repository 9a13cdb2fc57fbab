"""Many parents that know different things, in one network of neurons of all; widths, and what goes with what."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clafusion import FusionError, FusionOptions, fuse
from clafusion.networks import MLP, VGG, ResNet
from tests.helpers import accuracy, randomised, relative_error, trained
from tests.zoo import ZOO

CONTROL = {"teacher": "auto", "targets": "matched", "anchor_lead": 1e9}


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def perceptron(hidden: list[int], x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained(MLP(64, hidden, 10, bias=True), x, y, 100)


def three_domains() -> tuple[list[nn.Module], Tensor, Tensor, Tensor]:
    """Parents of upright, turned and inverted digits, samples of all, and a test set."""
    x, y = digits()
    images = x.reshape(-1, 8, 8)
    kinds = [x, torch.rot90(images, 1, (1, 2)).reshape(-1, 64), 1 - x]
    hidden = [[32, 24], [24], [28, 20]]
    parents = [perceptron(hidden[k], one[:900], y[:900], k) for k, one in enumerate(kinds)]
    samples, test = (torch.cat([one[span] for one in kinds]) for span in (slice(900, 1200), slice(1200, None)))
    return parents, samples, test, y[1200:].repeat(3)


def eight_pairs_of_classes() -> tuple[list[nn.Module], Tensor, Tensor, Tensor]:
    """Parents of three neighbouring classes each."""
    x, y = digits()
    parents = []
    for k in range(8):
        own = torch.isin(y[:900], torch.tensor([k, k + 1, k + 2]))
        parents.append(perceptron([12], x[:900][own], y[:900][own], k))
    return parents, x[900:1300], x[1300:], y[1300:]


@pytest.mark.parametrize(("make", "width"), [(three_domains, 1.0), (eight_pairs_of_classes, 2.0)])
def test_many_parents_are_at_least_as_good_as_the_anchor_with_a_new_output_layer(make, width):
    parents, samples, x, y = make()
    control, auto, union = (
        fuse(parents, [samples], FusionOptions(num_samples=len(samples), **options))
        for options in (
            CONTROL,
            {"teacher": "auto", "targets": "auto"},
            {"teacher": "auto", "targets": "union", "width": width},
        )
    )
    best = max(accuracy(parent, x, y) for parent in parents)
    assert accuracy(union.model, x, y) > max(best + 0.1, accuracy(control.model, x, y))
    assert accuracy(auto.model, x, y) >= accuracy(control.model, x, y)
    assert len(union.trust) == len(parents) and union.teacher is not None and union.teacher.gate is not None


def test_a_network_with_one_linear_layer_beside_one_with_several_and_overlapping_labels():
    x, y = digits()
    x = x.reshape(-1, 1, 8, 8)

    def network(width: int, head: list[nn.Module], labels: range, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        body = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
        own = (y[:900] >= labels[0]) & (y[:900] <= labels[-1])
        return trained(model, x[:900][own], y[:900][own] - labels[0], 150)

    known = [range(5), range(3, 10)]
    parents = [
        network(20, [nn.Linear(20, 5)], known[0], 0),
        network(16, [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 7)], known[1], 1),
    ]
    pairs = zip(parents, known, strict=True)
    best = max((parent(x[1300:]).argmax(1) + own[0] == y[1300:]).double().mean() for parent, own in pairs)
    for order in (slice(None), slice(None, None, -1)):
        fusion = fuse(parents[order], [x[900:1300]], FusionOptions(num_samples=400), classes=known[order])
        assert fusion.classes == tuple(range(10))
        assert accuracy(fusion.model, x[1300:], y[1300:]) > best + 0.1


NETWORKS = {
    "vgg": (lambda: VGG([[6], [8, 8]], 4, bias=True, batch_norm=True), (3, 8, 8)),
    "resnet": (lambda: ResNet([2, 1], 6, 4, batch_norm=True), (3, 8, 8)),
}


@pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning")
@pytest.mark.parametrize("width", [0.4, 2.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_widths_from_a_fraction_of_one_parent_to_all_of_both(name, width):
    make, shape = NETWORKS[name]
    parents = [randomised(make(), seed, torch.float32) for seed in range(2)]
    samples = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))
    fusion = fuse(parents, [samples], FusionOptions(targets="union", teacher="gated", width=width))
    assert fusion.model(samples).isfinite().all()
    before = fusion.structures[0].sizes
    assert all(fusion.structure.sizes[space] == round(width * before[space]) for space in fusion.structure.free_spaces)


def test_a_class_with_fixed_widths_is_refused_others():
    network = ZOO["torchvision/vit"].make().eval()
    samples = torch.randn(8, *ZOO["torchvision/vit"].shape, generator=torch.Generator().manual_seed(0))
    options = FusionOptions(targets="union", teacher="gated", width=0.5)
    with pytest.raises(FusionError, match="Expected VisionTransformer to run at other widths, got .* or keep width 1"):
        fuse([network, network], [samples], options)


@pytest.mark.parametrize("count", [400, 1000])
def test_means_of_neurons_are_tried_where_there_are_few_samples(count):
    x, y = torch.randn(count, 6, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3
    parents = [trained(MLP(6, [5], 3, bias=True), x[y != k], y[y != k], 20) for k in range(2)]
    fusion = fuse(parents, [x], FusionOptions(teacher="auto", targets="auto"))
    assert ("centroids" in fusion.candidates) == (count == 400)


def test_layers_are_merged_before_neurons_are_chosen():
    parents, samples, x, y = three_domains()
    options = FusionOptions(balance="merge", targets="union", teacher="auto", num_samples=len(samples))
    fused = fuse(parents, [samples], options).model
    assert [layer.out_features for layer in fused.modules() if isinstance(layer, nn.Linear)] == [32, 10]
    assert accuracy(fused, x, y) > max(accuracy(parent, x, y) for parent in parents) + 0.1


@pytest.mark.parametrize("head", ["average", "transport", "anchor"])
def test_the_output_layer_is_moved_and_fitted_by_the_same_map(head):
    network = randomised(MLP(8, [10, 6], 4, bias=True))
    permuted = randomised(MLP(8, [10, 6], 4, bias=True))
    if head == "transport":
        permuted.fc3.load_state_dict({key: value[[2, 0, 3, 1]] for key, value in network.fc3.state_dict().items()})
    samples = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = fuse([network, permuted], [samples], FusionOptions(targets="union", head=head)).model
    assert relative_error(fused, network, samples) < 1e-4


def test_neurons_are_chosen_by_gradients_in_inference_mode_too():
    def fused() -> Tensor:
        parents = [randomised(MLP(8, hidden, 3, bias=True), seed) for seed, hidden in enumerate([[6], [5, 4]])]
        samples = torch.randn(300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return fuse(parents, [samples], FusionOptions(targets="union", teacher="gated")).model(samples[:5]).detach()

    expected = fused()
    with torch.inference_mode():
        assert torch.equal(fused(), expected)
