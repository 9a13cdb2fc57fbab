"""Transfer: whose filters end up where, entry by entry, and what stays as it was."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clafusion import (
    FusionError,
    FusionOptions,
    align,
    average,
    fuse,
    insert_identities,
    layer_costs,
    map_units,
    transfer,
)
from clafusion.filter_transfer.filters import resampled
from clafusion.filter_transfer.transfer import UnitMap
from tests.helpers import foreign, images, largest_difference, mlp, randomised, relative_error, resnet, vectors, vgg

NORMED = {"bias": True, "batch_norm": True}
FREE = FusionOptions(pin_first=0, pin_last=0)
#: Like VGG13 and VGG11, ResNet34 and ResNet18, with and without norms: the deep one, the shallow one, samples.
PAIRS = {
    "mlp": (mlp([9, 8, 7, 6, 5], 0), mlp([8, 5], 1), vectors(40)),
    "mlp normed": (mlp([9, 8, 7], 0, **NORMED), mlp([4], 1, **NORMED), vectors(40)),
    "vgg": (
        vgg([[4, 4], [5, 5], [6, 6], [7, 7], [7, 7]], 0, **NORMED),
        vgg([[3], [6], [5, 6], [6, 7], [7, 8]], 1, **NORMED),
        images(8, 32),
    ),
    "resnet": (resnet([3, 4, 6, 3], 0, width=3), resnet([2, 2, 2, 2], 1, width=2), images(8, 16)),
    "resnet normed": (resnet([3, 2], 0, width=3, **NORMED), resnet([2, 2], 1, width=4, **NORMED), images(8, 16)),
}
SAME = {
    "mlp": (lambda seed: mlp([9, 8], seed, **NORMED), vectors(20)),
    "vgg": (lambda seed: vgg([[4, 5], [6]], seed, **NORMED), images(6, 8)),
    "resnet": (lambda seed: resnet([2, 2], seed, **NORMED), images(6, 8)),
    "bottleneck": (lambda seed: resnet([1, 2], seed, width=2, block="bottleneck"), images(6, 8)),
}


def cycled(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Entry [i, j, ...] is the tensor's entry [i mod n, j mod m, ...], by one flat index."""
    if not shape:
        return tensor
    grid = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return tensor[tuple(axis % size for axis, size in zip(grid, tensor.shape, strict=True))]


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", ["optimal", "chain", "random"])
@pytest.mark.parametrize("family", SAME)
def test_a_network_of_the_sources_architecture_becomes_the_source(family, mapping):
    make, samples = SAME[family]
    source, target = make(0), make(1)
    assert relative_error(target, source, samples) > 1e-2
    result = transfer(source, target, mapping, [samples], classifier=True, shortcuts=True)
    assert largest_difference(result, source) == 0
    assert relative_error(transfer(source, copy.deepcopy(source), mapping, [samples]), source, samples) == 0


def test_the_classifier_and_the_projections_are_transferred_only_on_demand():
    source, target = resnet([2, 2], 0, **NORMED), resnet([2, 2], 1, **NORMED)
    for classifier in (False, True):
        for shortcuts in (False, True):
            result = transfer(source, target, "chain", classifier=classifier, shortcuts=shortcuts)
            head, projection = (source if flag else target for flag in (classifier, shortcuts))
            assert torch.equal(result.linear.weight, head.linear.weight)
            assert torch.equal(result.linear.bias, head.linear.bias)
            for ours, theirs in zip(
                result.layer2[0].shortcut.state_dict().values(),
                projection.layer2[0].shortcut.state_dict().values(),
                strict=True,
            ):
                assert torch.equal(ours, theirs)
            assert torch.equal(result.layer2[0].conv2.weight, source.layer2[0].conv2.weight)


@pytest.mark.parametrize("widths", [(2, 5), (5, 2), (3, 4)])
def test_filters_are_repeated_and_truncated_as_the_index_says(widths):
    source, target = (resnet([2, 1], seed, width=[w, w + 1], **NORMED) for seed, w in enumerate(widths))
    result = transfer(source, target, "chain", shortcuts=True)
    state = source.state_dict()
    for name, tensor in result.state_dict().items():
        if not name.startswith("linear"):
            assert torch.equal(tensor, cycled(state[name], tensor.shape)), name


def test_neurons_stay_together_after_a_flatten():
    def network(channels, hidden, seed):
        layers = nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 4, hidden), nn.ReLU()
        return randomised(nn.Sequential(*layers, nn.Linear(hidden, 4)), seed)

    source, target = network(2, 3, 0), network(5, 4, 1)
    result = transfer(source, target, "chain", [images(4, 4)])
    blocks = source[3].weight.reshape(3, 2, 4)
    assert torch.equal(result[3].weight.reshape(4, 5, 4), cycled(blocks, torch.Size([4, 5, 4])))


def kerneled(size, seed, channels=3):
    layers = [nn.Conv2d(3, channels, size, padding=size // 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomised(nn.Sequential(*layers, nn.Linear(channels, 4)), seed)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (1, 3)])
def test_other_kernels_are_interpolated_bilinearly(sizes):
    source, target = kerneled(sizes[0], 0), kerneled(sizes[1], 1, channels=4)
    result = transfer(source, target, "chain", [images(4, 8)])
    expected = F.interpolate(source[0].weight, size=(sizes[1], sizes[1]), mode="bilinear")
    assert torch.equal(result[0].weight, expected[[0, 1, 2, 0]])
    assert torch.equal(result[0].bias, source[0].bias[[0, 1, 2, 0]])


def test_a_plane_is_interpolated_by_hand():
    # Bilinear interpolation is exact on a plane: new pixel i of 5 lies at (i + 0.5) * 3 / 5 - 0.5 of 3, kept within.
    places = ((torch.arange(5).double() + 0.5) * 3 / 5 - 0.5).clamp(0, 2)
    plane = 2 * torch.arange(3).double()[:, None] - torch.arange(3).double()[None, :]
    found = resampled(plane[None, None], (5, 5))[0, 0]
    assert torch.allclose(found, 2 * places[:, None] - places[None, :], atol=1e-15)


def test_depthwise_kernels_too():
    def network(channels, size, seed):
        layers = [nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, size, groups=channels), nn.Flatten()]
        flat = channels * (6 - size + 1) ** 2
        return randomised(nn.Sequential(*layers, nn.Linear(flat, 4)), seed)

    source, target = network(2, 3, 0), network(3, 5, 1)
    result = transfer(source, target, "chain", [images(4, 8)])
    expected = F.interpolate(source[1].weight, size=(5, 5), mode="bilinear")[[0, 1, 0]]
    assert torch.equal(result[1].weight, expected)


# --- which units, and what is left alone -----------------------------------------------------------------------------


def changed(result, target) -> dict[str, bool]:
    """For each parameter whether it differs from the target's, by name."""
    return {name: not torch.equal(tensor, target.state_dict()[name]) for name, tensor in result.state_dict().items()}


def test_unmatched_layers_keep_what_the_target_had():
    source, target = resnet([2], 0, width=3, **NORMED), resnet([5], 1, width=4, **NORMED)
    found = UnitMap((((0, 0),), ((1, 0), (3, 1)), ((0, 0),)), (None, None, None))
    for name, differs in changed(transfer(source, target, found), target).items():
        if not name.endswith("num_batches_tracked"):
            assert differs == name.startswith(("conv1", "bn1", "layer1.1.", "layer1.3.")), name


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("upwards", [True, False])
def test_every_mapping_works_both_ways(pair, upwards):
    deep, shallow, samples = PAIRS[pair]
    source, target = (shallow, deep) if upwards else (deep, shallow)
    for mapping in ("optimal", "chain", "random"):
        result = transfer(source, target, mapping, [samples], options=FREE)
        assert {name: t.shape for name, t in result.state_dict().items()} == {
            name: t.shape for name, t in target.state_dict().items()
        }
        assert result(samples).isfinite().all() and relative_error(result, target, samples) > 1e-3
        for stage, back in zip(
            map_units(source, target, mapping, [samples], FREE).pairs,
            map_units(target, source, mapping, [samples], FREE).pairs,
            strict=True,
        ):
            assert back == tuple((j, i) for i, j in stage)


@pytest.mark.parametrize("pins", [(0, 0), (1, 0), (1, 1)])
def test_the_optimal_map_is_the_alignment_on_layer_costs(pins):
    deep, shallow, samples = PAIRS["mlp"]
    options = FusionOptions(pin_first=pins[0], pin_last=pins[1])
    costs = layer_costs(deep, shallow, [samples])
    expected = align(costs[0], *pins)
    for source, target, places in ((shallow, deep, (0, 1)), (deep, shallow, (1, 0))):
        found = map_units(source, target, "optimal", [samples], options)
        assert tuple(pair[places[0]] for pair in found.pairs[0]) == expected
        assert tuple(pair[places[1]] for pair in found.pairs[0]) == (0, 1)
        if pins == (1, 1):
            assert found.costs == (None, None)
        else:
            assert torch.allclose(found.costs[0], costs[0] if places == (0, 1) else costs[0].T)
        json.dumps(found.summary())


def test_the_units_that_an_insertion_left_are_found():
    shallow, samples = mlp([8, 8], 1), vectors(60)
    deep = insert_identities(shallow, mlp([8, 8, 8], 0), ((0, 2), (0,)))
    found = map_units(shallow, deep, "optimal", [samples], FREE)
    assert found.pairs == (((0, 0), (2, 1)), ((0, 0),))
    other = randomised(copy.deepcopy(deep), 5)
    other.fc2 = deep.fc2
    assert largest_difference(transfer(shallow, other, found, classifier=True), deep) == 0


def test_a_chain_takes_the_first_units_and_a_random_map_those_of_its_seed():
    deep, shallow, _ = PAIRS["resnet"]
    chain = map_units(shallow, deep, "chain").pairs
    assert chain == (((0, 0),), *[((0, 0), (1, 1))] * 4, ((0, 0),))
    maps = {map_units(shallow, deep, "random", options=FusionOptions(seed=seed)).pairs for seed in range(5)}
    assert len(maps) > 3 and all(stage[0] == (0, 0) for pairs in maps for stage in pairs)
    again = [map_units(shallow, deep, "random", options=FusionOptions(seed=3)).pairs for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("pair", ["mlp normed", "resnet normed"])
def test_what_is_not_transferred_can_be_drawn_anew(pair):
    deep, shallow, samples = PAIRS[pair]
    state = torch.get_rng_state()
    results = [
        transfer(shallow, target, "chain", reinitialize=True, options=FusionOptions(seed=seed))
        for target, seed in ((deep, 0), (randomised(copy.deepcopy(deep), 5), 0), (deep, 1))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert largest_difference(results[0], results[1]) == 0
    head = "fc4" if pair == "mlp normed" else "linear"
    assert not torch.equal(results[0].get_submodule(head).weight, results[2].get_submodule(head).weight)
    kept = transfer(shallow, deep, "chain")
    assert torch.equal(kept.get_submodule(head).weight, deep.get_submodule(head).weight)
    first = "fc1" if pair == "mlp normed" else "conv1"
    assert torch.equal(kept.get_submodule(first).weight, results[2].get_submodule(first).weight)


def test_the_networks_are_left_as_they_are():
    source, target = resnet([1, 1], 0, **NORMED).train(), resnet([2, 1], 1, width=5, **NORMED).train()
    before = [copy.deepcopy(model.state_dict()) for model in (source, target)]
    result = transfer(source, target, "optimal", [images(8, 8)], classifier=True, shortcuts=True)
    for model, state in zip((source, target), before, strict=True):
        assert model.training and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not result.training and all(p.requires_grad and p.is_leaf for p in result.parameters())
    theirs = {tensor.data_ptr() for model in (source, target) for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in result.state_dict().values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    source, target = kerneled(3, 0).to(dtype), kerneled(5, 1).to(dtype)
    result = transfer(source, target, "chain", [images(4, 8)])
    assert result[0].weight.dtype == dtype and result[0].weight.isfinite().all()


def test_networks_of_torchvision_too():
    source, target = foreign("resnet18"), foreign("resnet34", 1)
    result = transfer(source, target, "chain", [images(2, 32)])
    assert type(result) is type(target)
    assert torch.equal(result.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert torch.equal(result.layer3[2].conv2.weight, target.layer3[2].conv2.weight)


# --- what is done with it --------------------------------------------------------------------------------------------


def test_the_result_can_be_averaged_and_fused_with_the_target():
    deep, shallow, samples = PAIRS["resnet normed"]
    transferred = transfer(shallow, deep, "optimal", [samples])
    averaged = average([deep, transferred], [1, 3])
    assert torch.allclose(averaged.conv1.weight, (deep.conv1.weight + 3 * transferred.conv1.weight) / 4)
    fused = fuse([deep, transferred], [samples], FusionOptions(correction="none")).model
    assert fused.architecture == deep.architecture
    assert largest_difference(fused, fuse([deep, deep], [samples], FusionOptions(correction="none")).model) > 1e-3


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "arguments", "message"),
    [
        (mlp([5]), mlp([5, 4]), {}, "Expected batches to align layers on, got none; pass unlabelled samples"),
        (mlp([5]), mlp([5]), {"mapping": "magic"}, "mapping to be one of optimal, chain, random, got 'magic'"),
        (vgg([[4]]), vgg([[4], [4]]), {"mapping": "chain"}, "the same stages, got 2 .* in the source and 3 .* target"),
        (vgg([[4]]), mlp([5]), {"mapping": "chain"}, "the same layers, got linear in 'fc1' and conv in 'features.0'"),
        (
            resnet([1], block="bottleneck"), resnet([1], block="basic"), {"mapping": "chain"},
            "the same layers, got conv, conv in .* and conv, conv, conv in",
        ),
        (mlp([5], bias=True), mlp([5]), {"mapping": "chain"}, "to have 'bias', got it in the source only"),
        (mlp([5]), mlp([5], bias=True), {"mapping": "chain"}, "to have 'bias', got it in the target only"),
        (mlp([5], batch_norm=True), mlp([5]), {"mapping": "chain"}, "same layers, got linear .* and linear, norm in"),
        (
            mlp([5], classes=3), mlp([5]), {"mapping": "chain", "classifier": True},
            "a source with the target's 4 classes .*, got 3; leave the classifier out",
        ),
        (
            mlp([5], inputs=9), mlp([5]), {"batches": [vectors(8)]},
            "the source: Expected samples that MLP accepts",
        ),
        (mlp([5]).float(), mlp([5]), {"mapping": "chain"}, "on one device and of one dtype"),
        (
            mlp([5]), mlp([5, 4]), {"mapping": UnitMap((((2, 0),), ((0, 0),)), (None, None))},
            r"pairs of units for stages of \[\[2, 1\], \[1, 1\]\], got .*; map these two networks anew",
        ),
        (mlp([5]), mlp([5]), {"mapping": UnitMap((((0, 0),),), (None,))}, "map these two networks anew"),
        (mlp([9, 8, 7]), mlp([5]), {"batches": [vectors(3)], "options": FREE}, "at least 4 samples to compare layers"),
    ],
)  # fmt: skip
def test_refuses_by_name(source, target, arguments, message):
    with pytest.raises(FusionError, match=message) as caught:
        transfer(source, target, **arguments)
    assert "\n" not in str(caught.value)


def test_nan_is_refused():
    source = mlp([5])
    with torch.no_grad():
        source.fc1.weight[0, 0] = float("nan")
    with pytest.raises(FusionError, match="NaN or infinity in 'fc1.weight' of the source"):
        transfer(source, mlp([5]), "chain")
