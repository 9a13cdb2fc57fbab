"""Merging: against a slow implementation neuron by neuron, exact where it can be, refused by name where it cannot."""

import copy

import pytest
import torch
from torch import nn

from clafusion import FusionError, merge_layers
from tests import helpers
from tests.helpers import images, mlp, relative_error, resnet, vectors, vgg

DEEP, SHALLOW = [9, 8, 7, 6], [5, 4]
KEPT = [(1, 3), (0,)]  # fc2 and fc4 of fc1..fc4 are matched; fc1 and fc3 are folded into them


def slow_gate(values, rule):
    """What stands for the ReLU of one neuron, from its pre-activations."""
    active = sum(1 for value in values if value > 0)
    if rule == "sum":
        return 1.0 if sum(values) > 0 else 0.0
    if rule == "majority":
        return 1.0 if 2 * active >= len(values) else 0.0
    return active / len(values)


def slow_merge(deep, samples, rule):
    """Folds fc1 into fc2 and fc3 into fc4, one neuron at a time; returns weights and biases."""
    hidden, pre = samples, {}
    with torch.no_grad():
        for index in range(1, 5):
            pre[index] = getattr(deep, f"fc{index}")(hidden)
            hidden = pre[index].relu()
    folded = []
    for dropped, kept in ((1, 2), (3, 4)):
        first, second = getattr(deep, f"fc{dropped}"), getattr(deep, f"fc{kept}")
        weight = torch.zeros(second.out_features, first.in_features, dtype=torch.float64)
        bias = torch.zeros(second.out_features, dtype=torch.float64)
        for neuron in range(first.out_features):
            gate = slow_gate(pre[dropped][:, neuron].tolist(), rule)
            for target in range(second.out_features):
                weight[target] += gate * second.weight[target, neuron].item() * first.weight[neuron].detach()
                if first.bias is not None:
                    bias[target] += gate * second.weight[target, neuron].item() * first.bias[neuron].item()
        folded.append((weight, bias if second.bias is None else bias + second.bias.detach()))
    return folded


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", ["sum", "majority", "average"])
def test_relu_rules_equal_a_slow_implementation(rule, bias):
    deep, shallow, samples = mlp(DEEP, 0, bias=bias), mlp(SHALLOW, 1, bias=bias), vectors(101)
    merged = merge_layers(deep, shallow, KEPT, [samples], rule)
    for layer, (weight, offset) in zip((merged.fc1, merged.fc2), slow_merge(deep, samples, rule), strict=True):
        assert torch.allclose(layer.weight, weight, atol=1e-12)
        assert (layer.bias is not None) == bias and (not bias or torch.allclose(layer.bias, offset, atol=1e-12))
    assert torch.equal(merged.fc3.weight, deep.fc5.weight)
    assert merged.architecture["hidden"] == [8, 6] and not merged.training


def test_the_rules_differ():
    deep, shallow, samples = mlp(DEEP, 0), mlp(SHALLOW, 1), vectors(101)
    weights = [merge_layers(deep, shallow, KEPT, [samples], rule).fc1.weight for rule in ("sum", "majority", "average")]
    assert all(not torch.allclose(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))


@pytest.mark.parametrize("rule", ["sum", "majority", "average"])
def test_merging_is_exact_where_the_merged_units_are_always_active(rule):
    deep, shallow, samples = mlp(DEEP, 0, bias=True), mlp(SHALLOW, 1, bias=True), vectors(50)
    with torch.no_grad():
        for layer in (deep.fc1, deep.fc3):
            layer.bias += 100
    merged = merge_layers(deep, shallow, KEPT, [samples], rule)
    assert relative_error(merged, deep, samples) < 1e-10


def test_exactly_half_is_a_majority():
    """Without a bias a sample and its negative activate every neuron once."""
    deep, samples = mlp([9, 8], 0), vectors(20)
    merged = merge_layers(deep, mlp([5], 1), [(1,), (0,)], [torch.cat([samples, -samples])], "majority")
    assert torch.allclose(merged.fc1.weight, deep.fc2.weight @ deep.fc1.weight, atol=1e-12)


def test_several_layers_in_a_row_are_folded_into_the_next_and_into_the_head():
    deep, samples = mlp([9, 8, 7], 0, bias=True), vectors(50)
    with torch.no_grad():
        for index in (1, 2, 3):
            getattr(deep, f"fc{index}").bias += 1000
    for kept in (0, 1, 2):
        merged = merge_layers(deep, mlp([5], 1, bias=True), [(kept,), (0,)], [samples])
        assert relative_error(merged, deep, samples) < 1e-9
        assert merged.architecture["hidden"] == [[9, 8, 7][kept]]


def test_a_layer_that_is_never_active_contributes_nothing():
    deep, samples = mlp([9, 8], 0, bias=True), vectors(50)
    with torch.no_grad():
        deep.fc1.bias -= 1000
    merged = merge_layers(deep, mlp([5], 1, bias=True), [(1,), (0,)], [samples])
    assert not merged.fc1.weight.any() and torch.equal(merged.fc1.bias, deep.fc2.bias)


def test_samples_stream():
    deep, shallow, samples = mlp(DEEP), mlp(SHALLOW), vectors(200)
    for rule in ("sum", "majority", "average"):
        one = merge_layers(deep, shallow, KEPT, [samples], rule)
        assert helpers.largest_difference(one, merge_layers(deep, shallow, KEPT, samples.split(9), rule)) == 0
    few = merge_layers(deep, shallow, KEPT, [samples], "average", num_samples=10)
    assert helpers.largest_difference(few, merge_layers(deep, shallow, KEPT, [samples[:10]], "average")) == 0


def test_a_flatten_before_the_merged_layer_is_kept():
    def net(*widths):
        sizes = [3 * 16, *widths]
        dense = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), *dense, nn.Linear(sizes[-1], 2))

    deep, shallow, samples = helpers.randomised(net(8, 7)), helpers.randomised(net(5)), images(20, 4)
    with torch.no_grad():
        deep[3].bias += 100
    assert relative_error(merge_layers(deep, shallow, [(0,), (1,), (0,)], [samples]), deep, samples) < 1e-10


def test_networks_are_left_as_they_are():
    models = mlp(DEEP).train(), mlp(SHALLOW).train()
    before = copy.deepcopy(models)
    merged = merge_layers(*models, KEPT, [vectors(20)])
    for model, kept in zip(models, before, strict=True):
        assert model.training and helpers.largest_difference(model, kept) == 0
        assert not {t.data_ptr() for t in merged.parameters()} & {t.data_ptr() for t in model.parameters()}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deep", "shallow", "alignment", "samples", "message"),
    [
        (
            vgg([[4, 4]]), vgg([[4]]), [(0,), (0,)], images(8, 8),
            r"merge Linear layers with ReLU, got 'features\.2' \(conv, activation relu\); balance .* with insert",
        ),
        (resnet([2]), resnet([1]), [(0,), (0,), (0,)], images(8, 8), r"got 'layer1\.1\.conv1' \(conv, conv, act"),
        (
            mlp([5, 4], batch_norm=True), mlp([5], batch_norm=True), [(1,), (0,)], vectors(8),
            r"got 'fc1' \(linear, norm, activation relu\)",
        ),
    ],
)  # fmt: skip
def test_refuses_layers_it_cannot_merge_by_name(deep, shallow, alignment, samples, message):
    with pytest.raises(FusionError, match=message):
        merge_layers(deep, shallow, alignment, [samples])


@pytest.mark.parametrize(
    ("activation", "name"), [(nn.GELU, "gelu"), (nn.ReLU6, r"relu \(hardtanh\)|relu6"), (nn.Identity, "None")]
)
def test_refuses_other_activations_by_name(activation, name):
    deep = nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    shallow = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(FusionError, match=rf"got '0' \(linear, activation ({name})\)"):
        merge_layers(deep, shallow, [(1,), (0,)], [torch.randn(8, 6)])


def test_refuses_to_lose_a_bias():
    """A merged layer's bias needs a bias in the layer it is folded into."""
    deep = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    shallow = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(FusionError, match="Expected '0' to have a bias, since layers with one are merged"):
        merge_layers(deep, shallow, [(1,), (0,)], [torch.randn(8, 6)])


def test_refuses_an_unknown_rule():
    with pytest.raises(FusionError, match="relu to be one of sum, majority, average, got 'median'"):
        merge_layers(mlp([5, 4]), mlp([5]), [(0,), (0,)], [vectors(8)], "median")


def test_refuses_an_alignment_that_is_none():
    with pytest.raises(FusionError, match="strictly increasing|alignment"):
        merge_layers(mlp([5, 4]), mlp([5]), [(0, 1), (0,)], [vectors(8)])
