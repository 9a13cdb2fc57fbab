"""Layer costs of two networks, stage by stage: the measures, streaming, refusals."""

import pytest
import torch

from clafusion import FusionError, cca, layer_costs, linear_cka, trace
from clafusion.statistics.samples import chunks
from clafusion.tracing.execution import GraphRunner
from clafusion.transport.solvers import transport_plan
from tests.helpers import images, mlp, resnet, vectors, vgg

MEASURES = ["cka", "cca", "wasserstein", "neurons", "index"]


@pytest.fixture(scope="module")
def pair():
    return mlp([9, 8, 7, 6], 0), mlp([9, 7], 1)


def features(model, samples):
    """The pre-activations of every hidden layer."""
    structure = trace(model, samples[:2])
    names = [unit.features for unit in structure.stages[0]]
    with torch.no_grad():
        values = dict(GraphRunner(structure.capture).observe(samples, names))
    return [values[name] for name in names]


def table(a, b, cost):
    return torch.stack([torch.stack([cost(x, y) for y in b]) for x in a])


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_of_one_chunk_is_that_of_all_samples(pair, debiased):
    samples = vectors(32)
    assert len(chunks(samples)) == 1
    expected = table(*(features(model, samples) for model in pair), lambda x, y: 1 - linear_cka(x, y, debiased))
    assert torch.allclose(layer_costs(*pair, [samples], debiased=debiased)[0], expected, atol=1e-12)


def test_biased_cka_sees_all_samples_at_once(pair):
    samples = vectors(200)
    expected = table(*(features(model, samples) for model in pair), lambda x, y: 1 - linear_cka(x, y, False))
    assert torch.allclose(layer_costs(*pair, samples.split(30), debiased=False)[0], expected, atol=1e-12)


def test_debiased_cka_streams_close_to_that_of_all_samples(pair):
    samples = vectors(400)
    expected = table(*(features(model, samples) for model in pair), lambda x, y: 1 - linear_cka(x, y))
    streamed = layer_costs(*pair, [samples])[0]
    assert len(chunks(samples)) == 13
    assert 0 < (streamed - expected).abs().max() < 0.05


def test_how_samples_are_batched_does_not_matter(pair):
    samples = vectors(150)
    for measure in MEASURES:
        one, many = (layer_costs(*pair, batches, measure) for batches in ([samples], samples.split(17)))
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_cca(pair):
    samples = vectors(100)
    expected = table(*(features(model, samples) for model in pair), lambda x, y: 1 - cca(x, y))
    assert torch.allclose(layer_costs(*pair, [samples], "cca")[0], expected, atol=1e-10)


def test_wasserstein_is_the_transport_cost_per_observation(pair):
    samples = vectors(150)

    def cost(x, y):
        distance = torch.cdist(x.T, y.T) / len(x) ** 0.5
        return (transport_plan(distance) * distance).sum()

    expected = table(*(features(model, samples) for model in pair), cost)
    assert torch.allclose(layer_costs(*pair, [samples], "wasserstein")[0], expected, atol=1e-9)


def test_neurons_and_index_are_squared_differences(pair):
    samples = [vectors(4)]
    assert layer_costs(*pair, samples, "neurons")[0].tolist() == [[0, 4], [1, 1], [4, 0], [9, 1]]
    assert layer_costs(*pair, samples, "index")[0].tolist() == [[0, 1], [1, 0], [4, 1], [9, 4]]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_network_is_at_distance_zero_from_itself(measure):
    for model, samples in [(mlp([9, 8, 7], bias=True), vectors(80)), (vgg([[4, 5], [6]]), images(80, 8))]:
        for cost in layer_costs(model, model, [samples], measure):
            assert cost.diag().abs().max() < 1e-6 and cost.min() > -1e-6


@pytest.mark.parametrize("measure", MEASURES)
def test_one_matrix_per_stage_head_included(measure):
    costs = layer_costs(resnet([3, 1], 0), resnet([1, 1], 1), [images(10, 8)], measure)
    assert [list(cost.shape) for cost in costs] == [[1, 1], [3, 1], [1, 1], [1, 1]]
    assert all(cost.dtype == torch.float64 and cost.isfinite().all() for cost in costs)


def test_num_samples_is_the_most_that_is_used(pair):
    samples = vectors(100)
    assert torch.equal(layer_costs(*pair, [samples], num_samples=40)[0], layer_costs(*pair, [samples[:40]])[0])


def test_networks_are_left_as_they_are(pair):
    for model in pair:
        model.train()
    layer_costs(*pair, [vectors(10)])
    assert pair[0].training and pair[1].training


def test_refuses_other_stages():
    with pytest.raises(FusionError, match=r"the same stages, got 2 \(plain, plain\) in the first network and 3"):
        layer_costs(vgg([[4]]), vgg([[4], [5]]), [images(8, 8)])


def test_refuses_stages_of_another_kind():
    with pytest.raises(FusionError, match=r"plain, residual, plain\) in the first network and 3 \(plain, plain, plain"):
        layer_costs(resnet([1]), vgg([[4], [4]]), [images(8, 8)])


@pytest.mark.parametrize("measure", ["cka", "cca", "wasserstein"])
def test_refuses_too_few_samples(pair, measure):
    with pytest.raises(FusionError, match="at least 4 samples to compare layers, got 3"):
        layer_costs(*pair, [vectors(3)], measure)


def test_refuses_an_unknown_measure(pair):
    with pytest.raises(FusionError, match="a measure of cka, cca, wasserstein, neurons, index, got 'distance'"):
        layer_costs(*pair, [vectors(8)], "distance")
