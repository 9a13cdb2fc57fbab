"""Fusing: what must come out, whatever the network: a network fused with a permuted copy of itself is itself."""

import json

import pytest
import torch
from torch import nn

from clafusion import FusionError, FusionOptions, fuse, insert_identities, networks, trace, transport_map
from clafusion.alignment.layer_costs import width_of
from tests.helpers import (
    build,
    foreign,
    images,
    largest_difference,
    mlp,
    permuted,
    plain,
    relative_error,
    resnet,
    vectors,
    vgg,
)

BIASED = {"bias": True, "batch_norm": True}
FAMILIES = {
    "mlp": (lambda seed: mlp([9, 8, 7], seed), vectors(80)),
    "mlp bias norm": (lambda seed: mlp([9, 8, 7], seed, **BIASED), vectors(80)),
    "vgg": (lambda seed: vgg([[5], [6, 7]], seed), images(24, 8)),
    "vgg bias norm": (lambda seed: vgg([[5], [6, 7]], seed, **BIASED), images(24, 8)),
    "basic": (lambda seed: resnet([1, 2], seed), images(24, 8)),
    "basic bias norm": (lambda seed: resnet([2, 1], seed, **BIASED), images(24, 8)),
    "bottleneck": (lambda seed: resnet([1, 2], seed + 1, width=3, block="bottleneck", **BIASED), images(32, 8)),
}
FEATURES = ["activations", "preactivations", "weights"]
COSTS = ["correlation", "euclidean", "cosine"]


def fused_with_a_permuted_copy(make, samples, **options):
    model = make(0)
    other, orders = permuted(model, samples, seed=1)
    return model, fuse([model, other], [samples], plain(**options)), orders


# --- planted permutations --------------------------------------------------------------------------------------------


EVERY = [(family, features, cost) for family in ("mlp bias norm", "basic") for features in FEATURES for cost in COSTS]
SOME = [(family, *pair) for family in FAMILIES for pair in zip(FEATURES, COSTS, strict=True)]


@pytest.mark.parametrize(("family", "features", "cost"), dict.fromkeys(EVERY + SOME))
def test_a_network_fused_with_a_permuted_copy_of_itself_is_itself(family, features, cost):
    for streams in ("shared", "per_layer"):
        model, fusion, _ = fused_with_a_permuted_copy(*FAMILIES[family], features=features, cost=cost, streams=streams)
        assert largest_difference(fusion.model, model) < 1e-9, streams


def test_the_maps_are_the_planted_permutations():
    model, fusion, orders = fused_with_a_permuted_copy(*FAMILIES["basic bias norm"])
    assert fusion.maps[0] == {} and fusion.maps[1].keys() == orders.keys()
    for space, order in orders.items():
        # Neuron i of the copy is neuron order[i] of the original.
        assert torch.equal(fusion.maps[1][space], torch.eye(len(order)).double()[order])


@pytest.mark.parametrize("family", ["mlp bias norm", "vgg", "basic"])
@pytest.mark.parametrize("mass", ["l1", "l2"])
def test_masses_do_not_spoil_it(family, mass):
    model, fusion, _ = fused_with_a_permuted_copy(*FAMILIES[family], mass=mass)
    assert largest_difference(fusion.model, model) < 1e-9


@pytest.mark.parametrize("normalize", ["max", "mean", "median", "log"])
def test_normalisation_does_not_spoil_it(normalize):
    model, fusion, _ = fused_with_a_permuted_copy(*FAMILIES["vgg"], normalize=normalize)
    assert largest_difference(fusion.model, model) < 1e-9


@pytest.mark.parametrize("family", ["mlp", "vgg bias norm", "basic"])
@pytest.mark.parametrize("solver", ["sinkhorn", "unbalanced"])
def test_soft_solvers_come_close(family, solver):
    make, samples = FAMILIES[family]
    model, fusion, _ = fused_with_a_permuted_copy(make, samples, solver=solver, regularization=0.01)
    assert relative_error(fusion.model, model, samples) < 0.05


def test_gromov_recovers_a_small_network():
    model, fusion, _ = fused_with_a_permuted_copy(lambda seed: mlp([4, 4], seed), vectors(80), solver="gromov")
    assert all(torch.allclose(m.sum(0), torch.ones(4).double(), atol=1e-9) for m in fusion.maps[1].values())
    assert largest_difference(fusion.model, model) < 1e-6


def test_a_transported_head_finds_its_labels():
    model, fusion, _ = fused_with_a_permuted_copy(*FAMILIES["vgg"], head="transport")
    assert torch.allclose(fusion.maps[1][trace(model, images(2, 8)).output], torch.eye(10).double())
    assert largest_difference(fusion.model, model) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_networks_too(name):
    samples = images(6, 64)
    model, fusion, _ = fused_with_a_permuted_copy(lambda seed: foreign(name, seed), samples, features="preactivations")
    assert relative_error(fusion.model, model, samples) < 1e-9


@pytest.mark.parametrize("correction", ["rescale", "repair", "refit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_corrections_leave_alone_what_is_right(family, correction):
    make, samples = FAMILIES[family]
    model, fusion, _ = fused_with_a_permuted_copy(make, samples, correction=correction, targets="matched")
    assert relative_error(fusion.model, model, samples) < 1e-9


@pytest.mark.parametrize("streams", ["shared", "per_layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_fused_with_itself_is_itself(family, streams):
    make, samples = FAMILIES[family]
    model = make(0)
    for head in ("average", "transport"):
        fusion = fuse([model, model], [samples], plain(streams=streams, head=head))
        assert largest_difference(fusion.model, model) < 1e-12


def test_a_different_network_gives_a_different_one():
    """The control: the comparisons above can fail."""
    make, samples = FAMILIES["basic"]
    fusion = fuse([make(0), make(1)], [samples], plain())
    assert largest_difference(fusion.model, make(0)) > 1e-2


@pytest.mark.parametrize("features", FEATURES)
def test_dead_neurons_do_no_harm(features):
    models = [mlp([8, 7], seed, bias=True) for seed in range(2)]
    with torch.no_grad():
        for model in models:
            model.fc1.bias[:3] -= 1000
            model.fc1.weight[3] = 0
            model.fc1.bias[3] = 5
    for cost in COSTS:
        for solver in ("exact", "sinkhorn", "unbalanced", "gromov"):
            options = plain(features=features, cost=cost, solver=solver, normalize="max", mass="l2")
            fusion = fuse(models, [vectors(50)], options)
            assert all(tensor.isfinite().all() for tensor in fusion.model.state_dict().values())


# --- depth -----------------------------------------------------------------------------------------------------------


def test_fusing_a_network_with_its_own_deeper_self_is_the_deeper_self():
    """Insertion, alignment and transport together: the deep parent is the shallow one with identities, permuted."""
    for make, deep, alignment, samples in [
        (lambda seed: mlp([9, 8], seed), mlp([9, 8, 8], 5), [(0, 2), (0,)], vectors(80)),
        (lambda seed: vgg([[5], [6]], seed), vgg([[5], [6, 6]], 5), [(0,), (0,), (0,)], images(24, 8)),
        (lambda seed: vgg([[5], [6]], seed), vgg([[5], [5, 6]], 5), [(0,), (1,), (0,)], images(24, 8)),
    ]:
        shallow = make(0)
        grown, _ = permuted(insert_identities(shallow, deep, alignment, samples[:2]), samples[:2], seed=2)
        fusion = fuse([grown, shallow], [samples], plain(pin_first=0, pin_last=0))
        assert relative_error(fusion.model, shallow, samples) < 1e-9


PAIRS = {
    "mlp": (lambda: (mlp([9, 8, 7, 6], 0), mlp([8, 6], 1)), vectors(60)),
    "vgg": (lambda: (vgg([[4, 4], [6, 6]], 0), vgg([[5], [7]], 1)), images(16, 8)),
    "basic": (lambda: (resnet([3, 2], 0, **BIASED), resnet([1, 1], 1, width=6, **BIASED)), images(16, 8)),
    "bottleneck": (
        lambda: (resnet([2, 3], 0, width=4, block="bottleneck"), resnet([1, 2], 1, width=2, block="bottleneck")),
        images(16, 8),
    ),
    "resnet34 and half resnet18": (
        lambda: (build({"name": "resnet34_eighth"}), resnet([2, 2, 2, 2], 1, width=4)), images(16, 16),
    ),
    "vgg13_doub and vgg11_half": (
        lambda: (
            vgg([[8, 16], [32, 32], [64, 64], [128, 128], [128, 64]], 0),
            vgg([[8], [8], [16, 16], [32, 32], [32, 64]], 1),
        ),
        images(12, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("streams", ["shared", "per_layer"])
def test_depths_and_widths_may_differ(pair, anchor, streams):
    make, samples = PAIRS[pair]
    models = make()
    # The wide pairs in one order only, for speed.
    for order in (models, models[::-1])[: 1 if " and " in pair else 2]:
        position = anchor if order is models else 1 - anchor
        fusion = fuse(order, [samples], plain(anchor=position, streams=streams))
        with torch.no_grad():
            assert fusion.model(samples[:3]).isfinite().all()
        assert fusion.template == order.index(models[0]) and not fusion.model.training
        rebuilt = networks.build(fusion.model.architecture).double().eval()
        rebuilt.load_state_dict(fusion.model.state_dict())
        assert relative_error(rebuilt, fusion.model, samples) < 1e-12
        ours, theirs = trace(fusion.model, samples[:2]), trace(models[anchor], samples[:2])
        for stage, expected in zip(ours.stages, theirs.stages, strict=True):
            # Pinned, so the last unit of a stage is the anchor's last; its stream has the anchor's width.
            assert width_of(ours, stage[-1]) == width_of(theirs, expected[-1])
        assert [len(s) for s in ours.stages] == [len(s) for s in trace(models[0], samples[:2]).stages]


@pytest.mark.parametrize(
    ("pair", "anchor"),
    [(pair, anchor) for pair in ("mlp", "vgg", "basic", "bottleneck") for anchor in (0, 1)],
)
def test_all_weight_on_the_anchor_gives_the_anchor_as_a_function(pair, anchor):
    make, samples = PAIRS[pair]
    models = make()
    weights = [1 - anchor, anchor]
    for streams in ("shared", "per_layer"):
        for head in ("average", "transport", "anchor"):
            options = plain(anchor=anchor, weights=weights, streams=streams, head=head)
            fusion = fuse(models, [samples], options)
            assert relative_error(fusion.model, models[anchor], samples) < 1e-9


@pytest.mark.parametrize("anchor", [0, 1])
def test_all_weight_on_the_other_gives_the_other_where_neurons_are_only_permuted(anchor):
    """Equal widths and exact maps lose nothing; units that only the anchor has must then be silent."""
    for models, samples in [
        ((resnet([3, 2], 0, **BIASED), resnet([1, 1], 1, **BIASED)), images(24, 8)),
        ((mlp([8, 8, 8], 0), mlp([8, 8], 1)), vectors(60)),
    ]:
        fusion = fuse(models, [samples], plain(anchor=anchor, weights=[anchor, 1 - anchor]))
        assert relative_error(fusion.model, models[1 - anchor], samples) < 1e-9


def test_a_unit_that_one_parent_lacks_keeps_its_inside_and_has_its_output_scaled():
    deep, shallow = resnet([2, 1], 0, **BIASED), resnet([1, 1], 1, **BIASED)
    fusion = fuse([deep, shallow], [images(24, 8)], plain(weights=[0.75, 0.25]))
    ours, theirs = fusion.model.layer1[1], deep.layer1[1]
    for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.running_mean", "bn1.running_var", "conv2.weight"):
        assert torch.allclose(ours.state_dict()[name], theirs.state_dict()[name]), name
    assert torch.allclose(ours.bn2.weight, 0.75 * theirs.bn2.weight)
    assert torch.allclose(ours.bn2.bias, 0.75 * theirs.bn2.bias)
    assert torch.allclose(ours.bn2.running_var, theirs.bn2.running_var)


def test_a_unit_that_the_anchor_lacks_keeps_its_width_and_its_neurons():
    deep, shallow = resnet([2, 1], 0, **BIASED), resnet([1, 1], 1, width=6, **BIASED)
    fusion = fuse([deep, shallow], [images(24, 8)], plain(anchor=1))
    assert fusion.model.architecture["inner"] == [[6, 4], [12]] and fusion.model.architecture["width"] == [6, 12]
    assert "layer1.1.conv1" not in fusion.maps[0]
    ours, theirs = fusion.model.layer1[1], deep.layer1[1]
    assert torch.allclose(ours.bn1.running_mean, theirs.bn1.running_mean)
    stream = fusion.maps[0]["conv1"]
    # What reads a stream reads every neuron of it once, however many it is spread over.
    spread = stream / stream.sum(1, keepdim=True)
    assert torch.allclose(ours.conv1.weight, torch.einsum("oi...,iI->oI...", theirs.conv1.weight, spread))
    assert torch.allclose(ours.bn2.weight, 0.5 * stream.T @ theirs.bn2.weight)


@pytest.mark.parametrize(("mass", "order"), [("uniform", 0), ("l1", 1), ("l2", 2)])
def test_masses_are_the_norms_of_incoming_weights(mass, order):
    models = mlp([6], 0), mlp([8], 1)
    p, q = (model.fc1.weight.detach().norm(order, dim=1) for model in reversed(models))
    mapping = fuse(models, [vectors(40)], plain(mass=mass)).maps[1]["fc1"]
    assert torch.allclose(mapping @ (q / q.sum()), p / p.sum())


def test_merging_gives_the_shallow_depth():
    deep, shallow = PAIRS["mlp"][0]()
    for anchor in (0, 1):
        fusion = fuse([deep, shallow], [vectors(60)], plain(balance="merge", anchor=anchor))
        assert fusion.template == 1 and len(fusion.model.architecture["hidden"]) == 2
        assert fusion.model.architecture["hidden"] == ([9, 6] if anchor == 0 else [8, 6])
        weights = [1 - anchor, anchor]
        alone = fuse([deep, shallow], [vectors(60)], plain(balance="merge", anchor=anchor, weights=weights))
        assert relative_error(alone.model, alone.balanced[anchor], vectors(20)) < 1e-12


def test_the_plain_average_is_at_hand():
    models = resnet([2, 1], 0), resnet([2, 1], 1)
    fusion = fuse(models, [images(8, 8)], plain(combine="average", weights=[1, 3]))
    expected = 0.25 * models[0].layer1[0].conv1.weight + 0.75 * models[1].layer1[0].conv1.weight
    assert torch.allclose(fusion.model.layer1[0].conv1.weight, expected) and fusion.maps == ({}, {})


@pytest.mark.parametrize("head", ["average", "transport", "anchor"])
def test_heads(head):
    models = mlp([8], 0), mlp([8], 1)
    fusion = fuse(models, [vectors(40)], plain(head=head))
    moved = models[1].fc2.weight @ fusion.maps[1]["fc1"]
    if head == "transport":
        moved = fusion.maps[1]["fc2"].T @ moved
    expected = models[0].fc2.weight if head == "anchor" else (models[0].fc2.weight + moved) / 2
    assert torch.allclose(fusion.model.fc2.weight, expected)
    assert ("fc2" in fusion.maps[1]) == (head == "transport")


@pytest.mark.parametrize("measure", ["cka", "cca", "wasserstein", "neurons", "index"])
def test_layer_measures_and_what_is_reported(measure):
    deep, shallow = mlp([9, 8, 7, 6], 0), mlp([8, 7, 6], 1)
    fusion = fuse([deep, shallow], [vectors(40)], plain(layer_measure=measure))
    assert [None if c is None else list(c.shape) for c in fusion.layer_costs[1]] == [[4, 3], None]
    assert fusion.layer_costs[0] == (None, None) and fusion.alignments[0] == ((0, 1, 2, 3), (0,))
    if measure == "neurons":
        assert fusion.alignments[1] == ((0, 2, 3), (0,))


def test_baseline_mappings():
    deep, shallow = mlp([9, 8, 7, 6, 5], 0), mlp([8, 6], 1)

    def drawn(mapping, seed):
        return fuse([deep, shallow], [vectors(20)], plain(mapping=mapping, seed=seed)).alignments[1][0]

    assert drawn("chain", 0) == drawn("chain", 1) == (0, 1)
    random = {drawn("random", seed) for seed in range(6)}
    assert len(random) > 1 and {rows[0] for rows in random} == {0}  # nothing can be inserted before the first


def test_the_summary_is_plain_data():
    models = PAIRS["mlp"][0]()
    for options in (FusionOptions(), FusionOptions.paper(weights=[1, 2]), FusionOptions(balance="merge")):
        summary = json.loads(json.dumps(fuse(models, [vectors(30)], options).summary()))
        assert FusionOptions(**summary["options"]) == options
        assert summary["num_samples"] == 30 and sum(summary["weights"]) == pytest.approx(1)
        assert len(summary["alignments"]) == len(summary["transport_costs"]) == 2


def test_transport_costs_are_those_of_the_maps():
    models = mlp([8, 7], 0), mlp([8, 7], 1)
    samples = vectors(60)
    fusion = fuse(models, [samples], plain(features="preactivations", cost="euclidean"))
    with torch.no_grad():
        distance = torch.cdist(models[1].fc1(samples).T, models[0].fc1(samples).T)
    assert fusion.costs[1]["fc1"] == pytest.approx(float((distance * fusion.maps[1]["fc1"]).sum() / 8))


def test_a_stream_is_compared_where_both_parents_have_a_layer():
    """The stem and the first block; the second block is an inserted identity in the shallow parent."""
    deep, shallow, samples = resnet([2, 1], 0), resnet([1, 1], 1), images(24, 8)
    fusion = fuse([deep, shallow], [samples], plain())
    assert fusion.alignments[1][1] == (0,)
    costs = []
    with torch.no_grad():
        streams = [[model.conv1(samples).relu()] for model in (shallow, deep)]
        for model, stream in zip((shallow, deep), streams, strict=True):
            stream.append(model.layer1[0](stream[0]))
    for pair in zip(*streams, strict=True):
        neurons = torch.cat([values.transpose(0, 1).flatten(1) for values in pair])
        costs.append(1 - torch.corrcoef(neurons)[:4, 4:])
    cost = (costs[0] + costs[1]) / 2
    assert torch.equal(fusion.maps[1]["conv1"], transport_map(cost))
    assert fusion.costs[1]["conv1"] == pytest.approx(float((cost * fusion.maps[1]["conv1"]).sum() / 4), rel=1e-9)


def test_gelu_networks_of_unequal_depth_are_refused_and_of_equal_depth_are_not():
    def net(depth):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.GELU())]
        return nn.Sequential(*layers, nn.Linear(6, 3))

    samples = [torch.randn(20, 6, generator=torch.Generator().manual_seed(0))]
    fuse([net(2), net(2)], samples, plain())
    with pytest.raises(FusionError, match="only ReLU-like activations pass an identity"):
        fuse([net(3), net(1)], samples, plain())
