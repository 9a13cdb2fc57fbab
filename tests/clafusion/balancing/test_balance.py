"""Insertion: exact for networks of every kind, seen where it is not, refused by name where it cannot be."""

import copy

import pytest
import torch
from torch import nn

from clafusion import FusionError, FusionOptions, fuse, insert_identities, networks, trace
from clafusion.balancing.correspondence import correspond
from clafusion.tracing import comparison
from clafusion.tracing.execution import GraphRunner
from tests import helpers
from tests.helpers import NORMED_PAIRS, foreign, images, mlp, relative_error, resnet, vectors, vgg

FLAGS = [{"bias": bias, "batch_norm": norm} for bias in (False, True) for norm in (False, True)]


def last_places(deep, shallow, example):
    """The alignment that keeps the first units of every stage, but puts the last one last."""
    a, b = trace(deep, example), trace(shallow, example)
    return [
        (*range(len(theirs) - 1), len(ours) - 1) if len(theirs) > 1 else (0,)
        for ours, theirs in zip(a.stages, b.stages, strict=True)
    ]


CASES = {
    "mlp": (lambda f: (mlp([9, 8, 7, 6, 5], 0, **f), mlp([8, 5], 1, **f)), vectors(9)),
    "vgg13 vgg11": (
        lambda f: (
            vgg([[4, 4], [5, 5], [6, 6], [7, 7], [7, 7]], 0, **f),
            vgg([[3], [6], [5, 6], [6, 7], [7, 8]], 1, **f),
        ),
        images(4, 32),
    ),
    "resnet34 resnet18": (
        lambda f: (resnet([3, 4, 6, 3], 0, width=8, **f), resnet([2, 2, 2, 2], 1, width=8, **f)), images(4, 16),
    ),
    "resnet101 resnet50": (
        lambda f: (
            resnet([3, 4, 23, 3], 0, width=2, block="bottleneck", **f),
            resnet([3, 4, 6, 3], 1, width=2, block="bottleneck", **f),
        ),
        images(4, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "flags"),
    [(case, flags) for case in CASES for flags in FLAGS if case != "resnet101 resnet50" or flags["bias"]],
    ids=str,
)
def test_inserted_identities_change_nothing(case, flags):
    make, example = CASES[case]
    deep, shallow = make(flags)
    alignment = last_places(deep, shallow, example)
    assert [len(stage) for stage in trace(deep, example).stages] != [len(stage) for stage in alignment]
    network = insert_identities(shallow, deep, alignment, example)
    assert relative_error(network, shallow, example) < 1e-12
    assert not network.training
    rebuilt = networks.build(network.architecture).double().eval()
    rebuilt.load_state_dict(network.state_dict())
    assert relative_error(rebuilt, shallow, example) < 1e-12
    ours, theirs = trace(deep, example), trace(network, example)
    assert [[unit.name for unit in stage] for stage in ours.stages] == [[u.name for u in s] for s in theirs.stages]


def test_torchvision_networks_grow_too():
    deep, shallow = foreign("resnet34"), foreign("resnet18", 1)
    example = images(2, 32)
    alignment = [(0,), (0, 2), (0, 3), (0, 5), (0, 2), (0,)]
    assert relative_error(insert_identities(shallow, deep, alignment, example), shallow, example) < 1e-12


@pytest.mark.parametrize("case", ["mlp", "vgg13 vgg11", "resnet34 resnet18"])
def test_one_inserted_weight_changed_is_seen(case):
    """The control: the comparison above does fail when it should."""
    make, example = CASES[case]
    deep, shallow = make({"batch_norm": True})
    alignment = last_places(deep, shallow, example)
    network = insert_identities(shallow, deep, alignment, example)
    stages = trace(deep, example).stages
    stage, places = next((s, p) for s, p in zip(stages, alignment, strict=True) if len(s) != len(p))
    inserted = next(unit for place, unit in enumerate(stage) if place not in places)
    name = inserted.closing[0] if inserted.closing else inserted.layers[0].weight
    weight = dict(network.named_parameters())[name]
    with torch.no_grad():
        weight.flatten()[0] += 0.1
    assert relative_error(network, shallow, example) > 1e-6


def test_inserted_plain_layers_are_identities():
    network = insert_identities(mlp([5, 4], 1, bias=True), mlp([9, 8, 7], 0, bias=True), [(0, 2), (0,)])
    assert torch.equal(network.fc2.weight, torch.eye(5).double()) and not network.fc2.bias.any()


@pytest.mark.parametrize("zero_branches", [False, True])
def test_an_inserted_block_can_wake_unless_it_is_to_be_as_published(zero_branches):
    deep, shallow = resnet([3, 1]), resnet([1, 1], 1)
    network = insert_identities(shallow, deep, [(0,), (1,), (0,), (0,)], zero_branches=zero_branches)
    for block in (network.layer1[0], network.layer1[2]):
        assert not block.conv2.weight.any()
        assert bool(block.conv1.weight.any()) != zero_branches


def test_an_inserted_block_is_as_wide_inside_as_the_block_before_it():
    deep, shallow = resnet([3], width=8), resnet([2], 1, width=[4])
    network = insert_identities(shallow, deep, [(0,), (0, 2), (0,)])
    assert network.layer1[1].conv1.weight.shape == network.layer1[0].conv1.weight.shape == (4, 4, 3, 3)


def test_an_inserted_layer_is_as_wide_as_what_it_is_given():
    deep, shallow, example = mlp([9, 8, 7, 6]), mlp([5, 4], 1), vectors(9)
    network = insert_identities(shallow, deep, [(0, 3), (0,)], example)
    assert network.architecture["hidden"] == [5, 5, 5, 4]


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("groups", [1, 6])
def test_identities_of_other_kernels_and_of_depthwise_convolutions_are_exact(size, groups):
    def network(depth, seed):
        def layers(groups):
            return [nn.Conv2d(6, 6, size, padding=size // 2, groups=groups), nn.ReLU()]

        first = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()]
        body = [layer for _ in range(depth) for layer in (*layers(groups), *layers(1))]
        return helpers.randomised(nn.Sequential(*first, *body, nn.Flatten(), nn.Linear(384, 4)), seed)

    deep, shallow, example = network(3, 0), network(1, 1), images(4, 8)
    found = insert_identities(shallow, deep, last_places(deep, shallow, example), example)
    assert relative_error(found, shallow, example) < 1e-12


@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_samples_are_made_up_in_the_size_that_a_network_takes(size):
    def network(depth, seed):
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(2, 2, 1), nn.ReLU())]
        first = [nn.Conv2d(3, 2, 8, 8), nn.ReLU()]
        return helpers.randomised(
            nn.Sequential(*first, *layers, nn.Flatten(), nn.Linear(2 * (size // 8) ** 2, 3)), seed
        )

    deep, shallow, example = network(2, 0), network(1, 1), images(2, size)
    found = insert_identities(shallow, deep, [(0, 2), (0,)])
    assert relative_error(found, shallow, example) < 1e-12


def test_a_branch_that_ends_in_a_norm_is_closed_by_the_norm():
    network = insert_identities(
        resnet([1], 1, batch_norm=True, bias=True), resnet([2], batch_norm=True, bias=True), [(0,), (0,), (0,)]
    )
    block = network.layer1[1]
    assert not block.bn2.weight.any() and not block.bn2.bias.any() and block.conv2.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    deep, shallow = resnet([3, 1], batch_norm=True).to(dtype), resnet([1, 1], 1, batch_norm=True).to(dtype)
    network = insert_identities(shallow, deep, [(0,), (0,), (0,), (0,)])
    assert next(network.parameters()).dtype == dtype


def test_networks_are_left_as_they_are():
    deep, shallow = resnet([3, 1], batch_norm=True).train(), resnet([1, 1], 1, batch_norm=True).train()
    before = copy.deepcopy(deep), copy.deepcopy(shallow)
    network = insert_identities(shallow, deep, [(0,), (0,), (0,), (0,)])
    for model, kept in zip((deep, shallow), before, strict=True):
        assert model.training and helpers.largest_difference(model, kept) == 0
        assert not {t.data_ptr() for t in network.parameters()} & {t.data_ptr() for t in model.parameters()}


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("case", ["mlp", "vgg13 vgg11", "resnet34 resnet18"])
def test_what_stands_for_inserted_units_is_what_they_give(case, flags):
    """A fusion builds no inserted unit: nodes of the parent stand for those of the network that has it built in."""
    make, example = CASES[case]
    deep, shallow = make(flags)
    alignment = last_places(deep, shallow, example)
    grown = trace(insert_identities(shallow, deep, alignment, example), example)
    parent = correspond(trace(deep, example), trace(shallow, example), alignment, "the shallow network")
    missing = [unit for unit in grown.units if unit.name not in parent.units]
    names = {node for unit in grown.units for layer in unit.layers for node in (layer.pre, layer.post)}
    names &= parent.nodes.keys()
    assert missing and {node for unit in missing for node in (unit.features, unit.output)} <= parent.nodes.keys()
    expected = dict(GraphRunner(grown.capture).observe(example, names))
    found = dict(parent.runner().observe(example, {parent.nodes[name] for name in names}))
    for name in names:
        # Before its activation an inserted layer of a chain gives what it is given, which has passed one already.
        assert torch.allclose(found[parent.nodes[name]], expected[name], atol=1e-12), name
    assert len(names) > len(missing)


def test_the_first_layer_of_a_stage_can_be_inserted():
    deep, shallow, example = vgg([[5], [5, 6]], 0), vgg([[5], [6]], 1), images(4, 8)
    network = insert_identities(shallow, deep, [(0,), (1,), (0,)], example)
    assert relative_error(network, shallow, example) < 1e-12


def convolutional(hidden, seed=0, flat=False):
    """Two convolutions and a head of Linear layers, on pooled or on flattened features of 2 x 2 positions."""
    pool = [nn.Flatten()] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    widths = [5 * (4 if flat else 1), *hidden]
    pairs = zip(widths, widths[1:], strict=False)
    head = [layer for ins, outs in pairs for layer in (nn.Linear(ins, outs), nn.ReLU(), nn.Dropout())]
    body = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return helpers.randomised(nn.Sequential(*body, *pool, *head, nn.Linear(widths[-1], 4)), seed)


@pytest.mark.parametrize("hidden", [[7], [7, 6]])
def test_a_head_of_several_layers_can_be_inserted_behind_the_pooling(hidden):
    deep, shallow, example = convolutional(hidden), convolutional([], 1), images(4, 8)
    alignment = [(0,), (0,), (), (0,)]
    network = insert_identities(shallow, deep, alignment, example)
    assert relative_error(network, shallow, example) < 1e-12
    fusion = fuse([shallow, deep], [images(60, 8)], FusionOptions(correction="none", weights=(1, 0)))
    assert fusion.alignments[0] == tuple(alignment)
    assert relative_error(fusion.model, shallow, example) < 1e-12


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deepest", [0, 1])
def test_refuses_a_head_of_several_layers_behind_flattened_positions(deepest):
    parents = [convolutional([7] if k == deepest else [], k, flat=True) for k in range(2)]
    with pytest.raises(FusionError, match=f"in parent {1 - deepest} and 4 .*; no identity can stand in place of '6'"):
        fuse(parents, [images(60, 8)])


def gelu(depth, seed=0):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.GELU())]
    return helpers.randomised(nn.Sequential(*layers, nn.Linear(6, 3)), seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_refuses_activations_that_pass_no_identity(dtype):
    with pytest.raises(
        FusionError, match="a unit for '2' of the deepest parent, got none, .*: only ReLU-like activations pass"
    ):
        insert_identities(gelu(1).to(dtype), gelu(3).to(dtype), [(0,), (0,)], torch.randn(8, 6))


def test_relu_like_activations_pass():
    for act in (nn.ReLU6, nn.Hardtanh):
        deep = nn.Sequential(nn.Linear(6, 6), act(), nn.Linear(6, 6), act(), nn.Linear(6, 3))
        shallow = nn.Sequential(nn.Linear(6, 6), act(), nn.Linear(6, 3))
        insert_identities(shallow, deep, [(0,), (0,)])


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        ([(0, 1)], "alignment of 2 stages, got 1"),
        ([(0,), (0,)], r"2 strictly increasing indices below 3, got \[0\] for the stage of 'fc1'"),
        ([(1, 0), (0,)], r"strictly increasing indices below 3, got \[1, 0\]"),
        ([(0, 0), (0,)], "strictly increasing"),
        ([(0, 3), (0,)], "strictly increasing"),
        ([(-1, 0), (0,)], "strictly increasing"),
        (
            [(1, 2), (0,)],
            "the shallow network to have a unit for 'fc1' of the deepest parent, got none, and no identity",
        ),
    ],
)
def test_refuses_alignments_that_are_none(alignment, message):
    with pytest.raises(FusionError, match=message):
        insert_identities(mlp([5, 4], 1), mlp([5, 4, 3]), alignment)


def test_refuses_a_projection_that_is_not_matched():
    with pytest.raises(
        FusionError, match=r"to do in 'layer2\.0\.conv1' what the deepest parent does in 'layer2\.1\.conv1'"
    ):
        insert_identities(resnet([1, 1], 1), resnet([1, 2]), [(0,), (0,), (1,), (0,)])


def conv_chain(kernel, padding, stages=1):
    return nn.Sequential(nn.Conv2d(3, 4, kernel, padding=padding), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2))


@pytest.mark.parametrize(
    ("deep", "shallow", "example", "message"),
    [
        (mlp([5], bias=True), mlp([5], 1), vectors(2), "in 'fc1', got linear without bias for linear"),
        (mlp([5]), mlp([5], 1, bias=True), vectors(2), "in 'fc1', got linear for linear without bias"),
        (
            mlp([5], batch_norm=True), mlp([5], 1), vectors(2),
            "the shallow network to do in 'fc1' what the deepest parent does in 'fc1', got relu for batch_norm",
        ),
        (
            resnet([1]), resnet([1], 1, block="bottleneck"), images(2, 8),
            "the shallow network to do in 'layer1.0.conv1' what the deepest parent .*, got conv2d",
        ),
        (resnet([1]), resnet([1], 1, stem_width=4), images(2, 8), "does in 'layer1.0.conv1', got conv2d.* for add"),
        (conv_chain(3, 1), conv_chain(5, 2), images(2, 8), r"does in '0', got conv2d\(.*\) for conv2d\("),
        (mlp([5]), mlp([5], 1, classes=3), vectors(2), None),
    ],
)  # fmt: skip
def test_refuses_networks_that_do_not_fit(deep, shallow, example, message):
    deep, shallow = deep.double(), shallow.double()
    alignment = [(0,)] * len(trace(deep, example).stages)
    if message is None:  # the shallow network's classes are its own
        assert insert_identities(shallow, deep, alignment, example)(example).shape[1] == 3
        return
    with pytest.raises(FusionError, match=message):
        insert_identities(shallow, deep, alignment, example)


def test_refuses_a_network_without_layers():
    with pytest.raises(FusionError, match="ReLU to say which samples it takes, got none"):
        insert_identities(nn.ReLU(), mlp([5]), [(0,)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_identity_is_one_in_the_precision_of_the_check(dtype, monkeypatch):
    """On an accelerator that is double, in which a variance of 1 - eps in single is another one."""
    make, samples = NORMED_PAIRS["mlp"]
    monkeypatch.setattr(comparison, "working_precision", lambda *tensors: torch.float64)
    parents = [model.to(dtype) for model in make()]
    assert fuse(parents, [samples]).model(samples.to(dtype)).isfinite().all()
