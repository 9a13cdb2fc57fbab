"""More than two parents, one after another or all at once: each has the share that was asked for, in every layer."""

import random
from dataclasses import replace

import pytest
import torch

from clafusion import FusionError, FusionOptions, fuse, networks
from clafusion.balancing.balance import owners_by_unit
from clafusion.tracing.reading import trace
from tests.helpers import images, largest_difference, mlp, permuted, plain, relative_error, resnet, vectors

NORMED = {"bias": True, "batch_norm": True}
MANY = ["many_to_one", "iterative"]
#: Like 34, 18, 34, 18: where each block of the shallower ones goes when both ends are pinned.
BLOCKS = {3: (0, 1, 2), 2: (0, 2), 1: (0,)}


def mean(weights, tensors):
    total = sum(weights)
    return sum(weight / total * tensor for weight, tensor in zip(weights, tensors, strict=True))


@pytest.mark.parametrize("many", MANY)
@pytest.mark.parametrize(("anchor", "flags"), [(0, {}), (3, {}), (1, NORMED)])
def test_four_residual_networks_have_their_shares_in_every_layer(many, anchor, flags):
    """A block that some parents lack: its inside is the mean of those that have it, its output scaled by their share.

    The oracle averages state dicts by name; nothing is transported, and both ends are pinned.
    """
    depths, weights = [3, 2, 3, 1], [4, 1, 3, 2]
    parents = [resnet([depth], seed, width=3, **flags) for seed, depth in enumerate(depths)]
    options = plain(many=many, weights=weights, combine="average", anchor=anchor)
    found = fuse(parents, [images(4, 4)], options).model
    assert found.architecture["blocks"] == [3]
    states = [parent.state_dict() for parent in parents]
    closing = ("bn2.weight", "bn2.bias") if flags else ("conv2.weight",)
    for name, tensor in found.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if not name.startswith("layer1."):
            expected = mean(weights, [state[name] for state in states])
        else:
            _, place, rest = name.split(".", 2)
            owners = [k for k, depth in enumerate(depths) if int(place) in BLOCKS[depth]]
            theirs = [states[k][f"layer1.{BLOCKS[depths[k]].index(int(place))}.{rest}"] for k in owners]
            expected = mean([weights[k] for k in owners], theirs)
            if rest in closing:
                expected = expected * sum(weights[k] for k in owners) / sum(weights)
        assert torch.allclose(tensor, expected, atol=1e-13), name


@pytest.mark.parametrize("many", MANY)
def test_six_perceptrons_have_their_shares_in_every_layer(many):
    """Where a parent has no layer, the identity that was inserted has its share."""
    weights = [3, 1, 2, 5, 4, 6]
    parents = [mlp([8] * (3 if seed % 2 else 2), seed) for seed in range(6)]
    found = fuse(parents, [vectors(20)], plain(many=many, weights=weights, combine="average", anchor=1)).model
    for number in range(1, 5):
        layers = []
        for seed, parent in enumerate(parents):
            name = {1: "fc1", 2: "fc2" if seed % 2 else None, 3: "fc3" if seed % 2 else "fc2", 4: "fc4"}[number]
            name = "fc3" if number == 4 and not seed % 2 else name
            layers.append(torch.eye(8).double() if name is None else parent.get_submodule(name).weight)
        assert torch.allclose(found.get_submodule(f"fc{number}").weight, mean(weights, layers), atol=1e-13)


@pytest.mark.parametrize("many", MANY)
def test_merging_one_after_another_gives_the_shallow_depth(many):
    parents = [mlp([9, 8, 7], 0), mlp([6, 5], 1), mlp([7, 6, 5, 4], 2)]
    fusion = fuse(parents, [vectors(60)], plain(many=many, balance="merge", weights=[0, 1, 0]))
    assert fusion.template == 1 and fusion.model.architecture["hidden"] == [9, 7]
    assert len(fusion.balanced) == 3 and fusion.model(vectors(5)).isfinite().all()


@pytest.mark.parametrize(("correction", "balance"), [("none", "merge"), ("refit", "insert")])
def test_two_parents_one_after_another_are_two_parents_at_once(correction, balance):
    options = {"correction": correction, "balance": balance, "weights": [1, 3]}
    pairs = [([mlp([9, 8, 7], 0), mlp([6, 5], 1)], vectors(60))]
    if balance == "insert":
        pairs.append(([resnet([2], 0, **NORMED), resnet([1], 1, width=5, **NORMED)], images(16, 4)))
    for parents, samples in pairs:
        one, other = (fuse(parents, [samples], FusionOptions(**options, many=many)).model for many in MANY)
        assert largest_difference(one, other) == 0


@pytest.mark.parametrize("correction", ["none", "refit"])
@pytest.mark.parametrize("many", MANY)
def test_six_permuted_copies_give_the_original(many, correction):
    model, samples = mlp([9, 8, 7], 0, **NORMED), vectors(60)
    copies = [permuted(model, samples[:2], seed)[0] for seed in range(1, 6)]
    options = plain(many=many, correction=correction, weights=[1, 5, 2, 4, 3, 6])
    # Each refit of the head ends near its solution, and the next one starts from there.
    tolerance = 1e-3 if (many, correction) == ("iterative", "refit") else 1e-9
    assert relative_error(fuse([model, *copies], [samples], options).model, model, samples) < tolerance


def test_permuted_copies_of_two_depths_give_what_the_two_give():
    """Shares of copies add up: what six parents give is what their two originals give with the sums."""
    a, b, samples = resnet([3], 0), resnet([2], 1), images(24, 4)
    copies = [permuted(model, samples[:2], seed)[0] for seed, model in enumerate((b, a, b, a), 1)]
    expected = fuse([a, b], [samples], plain(weights=[1 + 3 + 5, 7 + 2 + 4])).model
    found = fuse([a, b, *copies], [samples], plain(weights=[1, 7, 2, 3, 4, 5])).model
    assert relative_error(found, expected, samples) < 1e-9


@pytest.mark.parametrize("family", ["mlp", "resnet"])
def test_the_order_of_the_others_does_not_matter_when_all_are_fused_at_once(family):
    if family == "mlp":
        parents, samples = (
            [mlp(h, s) for s, h in enumerate(([9, 8], [7], [9, 8, 7], [5, 5], [6, 5, 4], [8]))],
            vectors(40),
        )
    else:
        parents, samples = [resnet([d], s, width=3 + s) for s, d in enumerate((2, 1, 3, 1))], images(16, 4)
    order, results = list(range(len(parents))), []
    for seed in range(2):
        random.Random(seed).shuffle(order)
        options = FusionOptions(anchor=order.index(0), weights=[k + 1 for k in order])
        results.append(fuse([parents[k] for k in order], [samples], options).model)
    assert max(relative_error(result, results[0], samples) for result in results[1:]) < 1e-9


@pytest.mark.parametrize("correction", ["rescale", "repair", "refit"])
def test_any_mix_of_depths_and_widths_one_after_another(correction):
    mixed = [resnet([2, 2], 2), resnet([1, 2], 0, width=4), resnet([1, 1], 3, width=5), resnet([2, 1], 1, width=3)]
    fusion = fuse(mixed, [images(20, 4)], FusionOptions(many="iterative", correction=correction))
    assert fusion.model.architecture["blocks"] == [2, 2] and fusion.model(images(4, 4)).isfinite().all()
    networks.build(fusion.model.architecture).load_state_dict(fusion.model.state_dict())
    six = [mlp(hidden, seed) for seed, hidden in enumerate(([9, 8], [7], [9, 8, 7], [5, 5], [6, 5, 4], [8]))]
    fusion = fuse(six, [vectors(60)], FusionOptions(many="iterative", correction=correction, anchor=3))
    assert fusion.model.architecture["hidden"][0] == 5 and len(fusion.model.architecture["hidden"]) == 3


@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_what_is_told_of_each_parent_is_of_that_parent(anchor):
    parents, samples = [mlp([6] * depth, seed) for seed, depth in enumerate((2, 3, 2))], vectors(20)
    fusion = fuse(parents, [samples], plain(many="iterative", anchor=anchor))
    for k, parent in enumerate(parents):
        assert bool(fusion.maps[k]) == bool(fusion.costs[k]) == (k != anchor)
        assert [len(places) for places in fusion.alignments[k]] == [len(s) for s in trace(parent, samples).stages]
        assert relative_error(fusion.balanced[k], parent, samples) < 1e-12


def test_an_error_names_the_parent_as_it_was_given():
    parents, batches, options = [mlp([6, 6], seed) for seed in range(3)], [vectors(20)], plain(many="iterative")
    with pytest.raises(FusionError, match="^adding parent 3 to the result so far: Expected parents of equal widths"):
        fuse([*parents, mlp([6, 5])], batches, replace(options, combine="average"))
    with pytest.raises(FusionError, match="^parent 3: Expected samples"):
        fuse([*parents, mlp([6, 6], inputs=5)], batches, options)


def test_what_an_average_holds_of_a_unit_is_the_share_of_those_that_have_it():
    parents, samples = [resnet([2, 1], 0), resnet([1, 1], 1), resnet([2, 1], 2)], images(8, 8)
    first = fuse(parents[:2], [samples], plain(weights=[1, 3]))
    held = first.balancing.unit_shares(first.weights)
    structure = trace(first.model, samples[:2])
    assert [[held[unit.name] for unit in stage] for stage in structure.stages] == [[1.0], [1.0, 0.25], [1.0], [1.0]]
    second = fuse([first.model, parents[2]], [samples], plain(weights=[4, 2]))
    owners = owners_by_unit([structure, second.structures[1]], 0, second.alignments, held, plain())
    unit = structure.stages[1][1]
    assert owners[unit.name] == {0: 0.25, 1: 1.0}
    balanced = replace(second.balancing, owners=owners)
    inner, outer = unit.branch
    assert balanced.layer_weights(inner, unit, [2 / 3, 1 / 3]) == pytest.approx({0: 1 / 6, 1: 1 / 3})
    assert balanced.layer_weights(outer, unit, [2 / 3, 1 / 3]) == pytest.approx({0: 2 / 3, 1: 1 / 3})
    shares = balanced.unit_shares(second.weights)
    assert [shares[unit.name] for unit in structure.stages[1]] == pytest.approx([1.0, 0.5])
