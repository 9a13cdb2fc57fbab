"""Means of similar neurons."""

import pytest
import torch

from clafusion import FusionOptions, fuse
from clafusion.networks import MLP, VGG
from clafusion.transport.centroids import centroids
from tests.clafusion.transport.test_widths import depthwise
from tests.helpers import randomised, relative_error


def test_copies_are_one_cluster_and_their_mean_stands_for_each():
    features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).double()
    whole = torch.cat([features, 2 * features], 1)
    covariance = whole.T.cov()
    weights, back = centroids(covariance, torch.tensor([1.0, 0.5] * 4).double(), 4, 0)
    assert torch.allclose(whole @ weights @ back.T, whole)
    assert sorted((back != 0).sum(0).tolist()) == [2, 2, 2, 2]


def test_clusters_are_at_least_as_good_as_their_first_centres():
    features = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double()
    features = torch.cat([features, features + 0.5 * torch.randn(200, 12).double()], 1)
    standard = (features - features.mean(0)) / features.std(0)
    for count in (2, 7, 24):
        weights, back = centroids(standard.T.cov(), torch.ones(24).double(), count, 0)
        assert weights.shape == (24, count) and ((back > 0).sum(1) == 1).all() and ((back > 0).sum(0) > 0).all()
        labels = back.argmax(1)
        means = torch.stack([standard[:, labels == one].mean(1) for one in range(count)], 1)
        distances = (standard[:, :, None] - means[:, None]).square().sum(0)
        # None is nearer to another mean than to its own.
        assert (distances.gather(1, labels[:, None])[:, 0] <= distances.min(1).values + 1e-9).all()


@pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning")
@pytest.mark.parametrize("name", ["mlp", "vgg", "depthwise"])
def test_a_network_united_with_itself_is_itself(name):
    make, shape = {
        "mlp": (lambda: MLP(8, [10, 8, 6], 4, bias=True), (8,)),
        "vgg": (lambda: VGG([[6], [8, 8]], 4, bias=True, batch_norm=True), (3, 8, 8)),
        "depthwise": (depthwise, (3, 8, 8)),
    }[name]
    network = randomised(make())
    samples = torch.randn(400, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = FusionOptions(targets="centroids", num_samples=400)
    assert relative_error(fuse([network, network], [samples], options).model, network, samples[:50]) < 1e-4
