"""What goes in: kinds of input, parents left as they are, more than two of them, and every refusal."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clafusion import FusionError, FusionOptions, fuse, networks, trace
from clafusion.statistics import moments as statistics
from clafusion.statistics.samples import CPU_CHUNK
from tests.helpers import images, largest_difference, mlp, permuted, plain, relative_error, resnet, vectors, vgg

NORMED = {"bias": True, "batch_norm": True}
SETTINGS = [
    FusionOptions(),
    FusionOptions.paper(anchor=1),
    FusionOptions(features="weights", solver="sinkhorn", regularization=0.5, mass="l1"),
    FusionOptions(combine="average", weights=[1, 2]),
    FusionOptions(many="iterative", head="anchor"),
]


# --- the anchor ------------------------------------------------------------------------------------------------------


def opinionated(scale: float, seed: int) -> nn.Module:
    """A network with a mind of its own, the surer of it the larger the scale."""
    model = mlp([6, 5], 0)
    with torch.no_grad():
        model.fc3.weight.copy_(scale * model.fc3.weight.roll(seed, 0))
    return model


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_anchor_may_be_who_agrees_most_with_all_together(order):
    models = [opinionated(scale, seed) for seed, scale in enumerate([0.01, 100.0, 0.01])]
    options = FusionOptions(anchor="agreement", num_samples=40, correction="none")
    fusion = fuse([models[k] for k in order], [vectors(50)], options)
    assert fusion.options.anchor == fusion.summary()["options"]["anchor"] == order.index(1)
    assert not fusion.maps[order.index(1)] and all(fusion.maps[k] for k in range(3) if order[k] != 1)
    expected = fuse([models[k] for k in order], [vectors(50)], dataclasses.replace(options, anchor=order.index(1)))
    assert largest_difference(fusion.model, expected.model) == 0


@pytest.mark.parametrize(("weights", "expected"), [([1, 0], 0), ([0, 1], 1), ([1, 1], 1)])
def test_agreement_is_with_the_weighted_ensemble(weights, expected):
    options = FusionOptions(anchor="agreement", weights=weights)
    assert fuse([opinionated(1, 0), opinionated(9, 1)], [vectors(50)], options).options.anchor == expected


def test_who_agrees_equally_often_is_taken_in_order_and_chooses_the_widths():
    model = vgg([[4], [6, 6]])
    assert fuse([model, copy.deepcopy(model)], [images(20)], FusionOptions(anchor="agreement")).options.anchor == 0
    narrow, wide = opinionated(9, 0), mlp([9, 8], 1)
    fused = fuse([wide, narrow], [vectors(50)], FusionOptions(anchor="agreement"))
    assert fused.options.anchor == 1 and fused.model.fc1.out_features == 6


def test_folding_one_after_another_begins_with_the_anchor_that_was_chosen():
    models = [opinionated(scale, seed) for seed, scale in enumerate([0.01, 100.0, 0.01])]
    chosen, given = (
        fuse(models, [vectors(50)], FusionOptions(anchor=anchor, many="iterative")) for anchor in ("agreement", 1)
    )
    assert largest_difference(chosen.model, given.model) == 0 and chosen.options == given.options


# --- parents are left as they are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("training", [True, False])
def test_parents_are_left_as_they_are(options, training):
    models = [resnet([2, 1], 0, **NORMED).train(training), resnet([1, 1], 1, **NORMED).train(training)]
    models[0].conv1.weight.requires_grad_(False)
    fired = []
    for model in models:
        model.conv1.register_forward_hook(lambda *_: fired.append(1))
        model.register_forward_pre_hook(lambda *_: fired.append(1))
        model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    identities = [[id(tensor) for tensor in (*model.parameters(), *model.buffers())] for model in models]
    fusion = fuse(models, [images(10, 8)], options)
    for model, state, ids in zip(models, before, identities, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == ids
        assert all(module.training == training for module in model.modules())
        assert len(model.conv1._forward_hooks) == len(model._forward_pre_hooks) == 1
        assert torch.equal(model.linear.weight.grad, torch.ones_like(model.linear.weight))
    assert not fired
    assert not models[0].conv1.weight.requires_grad and models[1].conv1.weight.requires_grad

    for network in (fusion.model, *fusion.balanced):
        assert not network.training and not network.conv1._forward_hooks and not network._forward_pre_hooks
        assert all(p.requires_grad and p.grad is None and p.is_leaf for p in network.parameters())
        own = {t.data_ptr() for t in (*network.parameters(), *network.buffers())}
        assert not own & {t.data_ptr() for model in models for t in (*model.parameters(), *model.buffers())}
    assert not {p.data_ptr() for p in fusion.model.parameters()} & {
        p.data_ptr() for network in fusion.balanced for p in network.parameters()
    }


def test_the_fused_network_can_be_trained():
    fusion = fuse([resnet([2, 1], 0, **NORMED), resnet([1, 1], 1, **NORMED)], [images(10, 8)])
    fusion.model.train()(images(4, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fusion.model.parameters())


# --- kinds of input --------------------------------------------------------------------------------------------------


def test_kinds_of_batches_are_alike():
    models, samples = [mlp([9, 8, 7], 0), mlp([8, 7], 1)], vectors(40)
    expected = fuse(models, [samples]).model
    loader = DataLoader(TensorDataset(samples, torch.zeros(40, dtype=torch.long)), batch_size=16)
    for batches in (list(samples.split(7)), loader, (batch for batch in samples.split(7)), [(samples, None)]):
        assert largest_difference(fuse(models, batches).model, expected) == 0


def test_a_generator_is_read_once_and_no_further_than_needed():
    read = []

    def batches():
        for number in itertools.count():
            read.append(number)
            yield vectors(10, seed=number)

    for options in (FusionOptions(num_samples=25), FusionOptions(num_samples=25, balance="merge", cost="cosine")):
        read.clear()
        assert fuse([mlp([9, 8, 7, 6], 0), mlp([8, 6], 1)], batches(), options).num_samples == 25
        assert read == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parents_of_any_float_type(dtype):
    models = [resnet([2, 1], 0, **NORMED).to(dtype), resnet([1, 1], 1, **NORMED).to(dtype)]
    for options in (FusionOptions(), FusionOptions.paper(anchor=1), FusionOptions(features="weights")):
        fusion = fuse(models, [images(10, 8).float()], options)
        assert all(p.dtype == dtype for p in fusion.model.parameters())
        assert fusion.model(images(2, 8).to(dtype)).isfinite().all()
    merged = fuse([mlp([9, 8, 7]).to(dtype), mlp([8], 1).to(dtype)], [vectors(20)], FusionOptions(balance="merge"))
    assert next(merged.model.parameters()).dtype == dtype


@pytest.mark.parametrize("options", SETTINGS, ids=range(len(SETTINGS)))
def test_two_runs_are_equal_bit_by_bit_and_leave_the_random_state(options):
    models = [resnet([2, 1], 0, **NORMED).float(), resnet([1, 1], 1, **NORMED).float()]
    state = torch.get_rng_state()
    one, two = (fuse(models, [images(10, 8).float()], options) for _ in range(2))
    assert largest_difference(one.model, two.model) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_and_batch_statistics_play_no_part():
    models = [mlp([9, 8, 7], 0, dropout=0.5, **NORMED), mlp([9, 8], 1, dropout=0.5, **NORMED)]
    expected = fuse(models, [vectors(40)]).model
    for model in models:
        model.train()
    assert largest_difference(fuse(models, [vectors(40)]).model, expected) == 0


def test_memory_does_not_grow_with_the_samples(monkeypatch):
    """What is held at once is a chunk; the sums over chunks are those of all samples in one."""
    models, samples = [mlp([9, 8, 7], 0), mlp([9, 8, 7], 1)], vectors(300)
    sizes = []
    ahead = statistics.Ahead
    monkeypatch.setattr(statistics, "Ahead", lambda r, batch, n: sizes.append(len(batch)) or ahead(r, batch, n))
    streamed = fuse(models, [samples])
    assert max(sizes) <= CPU_CHUNK
    monkeypatch.setattr(statistics, "chunks", lambda samples, size=0: (samples,))
    at_once = fuse(models, [samples])
    assert max(sizes) == 300
    assert largest_difference(streamed.model, at_once.model) < 1e-12


# --- more than two ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [FusionOptions(), FusionOptions.paper(), FusionOptions(features="weights")], ids=range(3)
)
@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_the_order_of_the_other_parents_does_not_matter(options, weights):
    a, b, c = mlp([9, 8, 7, 6], 0), mlp([8, 7], 1), mlp([9, 8, 6], 2)
    shares = dict(zip((a, b, c), weights or [1, 1, 1], strict=True))
    results = []
    for order in itertools.permutations((a, b, c)):
        chosen = FusionOptions(**{**options.to_dict(), "anchor": order.index(a), "weights": [shares[m] for m in order]})
        results.append(fuse(order, [vectors(60)], chosen).model)
    assert max(largest_difference(result, results[0]) for result in results[1:]) < 1e-12
    assert chosen.many == "many_to_one"


def test_the_order_does_not_matter_when_another_than_the_anchor_is_the_deepest():
    a, b, c = resnet([1, 1], 0), resnet([3, 1], 1), resnet([2, 1], 2)
    results = [
        fuse(order, [images(16, 8)], FusionOptions(anchor=order.index(a))).model
        for order in itertools.permutations((a, b, c))
    ]
    assert max(largest_difference(result, results[0]) for result in results[1:]) < 1e-12


def test_matched_neurons_are_tried_where_those_of_all_are_no_better_than_the_anchors():
    found = fuse([resnet([1, 1], 0), resnet([2, 1], 2)], [images(16, 8)]).candidates
    pooled = {name: found[name] for name in ("union", "centroids")}
    assert found["anchor"] < min(pooled.values())
    assert found.keys() - pooled.keys() == {"anchor", "matched", "matched, equal"}


def test_the_order_does_not_matter_when_several_others_are_the_deepest():
    a, b, c = resnet([1, 1], 0), resnet([2, 1], 1), resnet([2, 1], 2)
    results = [fuse(order, [images(16, 8)]).model for order in ([a, b, c], [a, c, b])]
    assert relative_error(results[0], results[1], images(16, 8)) < 1e-9


@pytest.mark.parametrize(
    ("parents", "samples"),
    [
        ((resnet([1, 1], 0, width=5), resnet([2, 1], 1, width=4), resnet([2, 1], 2, width=6)), images(16, 8)),
        ((mlp([9, 8], 0), mlp([9, 8, 7], 1), mlp([9, 8, 7], 2)), vectors(60)),
    ],
)
def test_nor_when_these_have_other_widths_or_layers(parents, samples):
    """The widths inside a unit that the anchor lacks, and the anchor's own alignment, hang on the template."""
    a, b, c = parents
    results = [fuse(order, [samples], FusionOptions(pin_last=0)) for order in ([a, b, c], [a, c, b])]
    assert results[0].alignments[0] == results[1].alignments[0]
    assert results[0].model.architecture == results[1].model.architecture


@pytest.mark.parametrize("many", ["many_to_one", "iterative"])
@pytest.mark.parametrize("count", [3, 4])
def test_permuted_copies_give_the_original(many, count):
    for model, samples in [(mlp([9, 8], 0, **NORMED), vectors(60)), (resnet([2, 1], 0, **NORMED), images(16, 8))]:
        copies = [permuted(model, samples[:2], seed)[0] for seed in range(1, count)]
        fusion = fuse([model, *copies], [samples], plain(many=many))
        assert largest_difference(fusion.model, model) < 1e-9
        assert len(fusion.balanced) == len(fusion.maps) == len(fusion.alignments) == count


@pytest.mark.parametrize("many", ["many_to_one", "iterative"])
@pytest.mark.parametrize("anchor", [0, 2])
@pytest.mark.parametrize("weights", [None, [4, 1, 3, 2], [0, 1, 0, 1], [1, 0, 0, 0]])
def test_every_parent_has_the_share_that_was_asked_for(many, anchor, weights):
    models = [mlp([8], seed) for seed in range(4)]
    shares = [w / sum(weights) for w in weights] if weights else [0.25] * 4
    options = plain(many=many, weights=weights, combine="average", anchor=anchor)
    fusion = fuse(models, [vectors(20)], options)
    expected = sum(share * model.fc2.weight for share, model in zip(shares, models, strict=True))
    assert torch.allclose(fusion.model.fc2.weight, expected, atol=1e-14)
    assert fusion.weights == pytest.approx(shares)


def test_iterative_shares_reach_the_transported_head():
    """Seen through the maps: each parent's head columns enter with the parent's weight."""
    model = mlp([8], 0)
    copies = [permuted(model, vectors(2), seed)[0] for seed in (1, 2)]
    with torch.no_grad():
        for factor, network in zip((1.0, 2.0, 4.0), (model, *copies), strict=True):
            network.fc2.weight *= factor
    fusion = fuse([model, *copies], [vectors(60)], plain(many="iterative", weights=[0.5, 0.3, 0.2]))
    assert torch.allclose(fusion.model.fc2.weight, model.fc2.weight * (0.5 + 0.6 + 0.8))


@pytest.mark.parametrize("many", ["many_to_one", "iterative"])
def test_many_of_different_depth_and_width(many):
    models = [resnet([2, 1], 0), resnet([1, 1], 1, width=6), resnet([3, 1], 2, width=3), resnet([1, 1], 3)]
    for anchor in range(4):
        fusion = fuse(models, [images(12, 8)], FusionOptions(many=many, anchor=anchor))
        assert fusion.model.architecture["blocks"] == [3, 1]
        assert fusion.model.architecture["width"][0] == [4, 6, 3, 4][anchor]
        assert fusion.model(images(2, 8)).isfinite().all()
        networks.build(fusion.model.architecture).load_state_dict(fusion.model.state_dict())
        assert fusion.template == 2 and len(fusion.summary()["alignments"]) == 4


# --- refusals --------------------------------------------------------------------------------------------------------


def broken(model, value):
    with torch.no_grad():
        model.fc1.weight[0, 0] = value
    return model


class Sorting(nn.Module):
    """An operation that fusion does not understand."""

    def forward(self, x):
        return x.sort(1).values


GOOD = [vectors(20)]
REFUSED = {
    "one network": ([mlp([5])], GOOD, {}, "at least 2 networks to fuse, got 1"),
    "no network": ([], GOOD, {}, "at least 2 networks to fuse, got 0"),
    "anchor": ([mlp([5]), mlp([5])], GOOD, {"anchor": 2}, "anchor to be below 2, the number of networks, got 2"),
    "nan": ([mlp([5]), broken(mlp([5]), float("nan"))], GOOD, {}, "NaN or infinity in 'fc1.weight' of parent 1"),
    "inf": ([broken(mlp([5]), float("inf")), mlp([5])], GOOD, {}, "NaN or infinity in 'fc1.weight' of parent 0"),
    "no parameters": ([mlp([5]), nn.ReLU()], GOOD, {}, "networks with parameters, got none in parent 1"),
    "dtypes": ([mlp([5]), mlp([5]).float()], GOOD, {}, "on one device and of one dtype, got .*float32.*float64"),
    "few samples": ([mlp([5]), mlp([5])], [vectors(1)], {}, "at least 2 samples to measure on, got 1; pass more"),
    "no batch": ([mlp([5]), mlp([5])], [], {}, "at least one batch of samples, got none"),
    "weights": ([mlp([5]), mlp([5])], GOOD, {"weights": [1, 1, 1]}, "Expected 2 weights of at least 0"),
    "classes": ([mlp([5]), mlp([5], classes=3)], GOOD, {}, r"number of classes, got parent 0: 4, parent 1: 3;"),
    "one of six": (
        [mlp([5] * (1 + seed % 2), seed, classes=7 if seed == 3 else 4) for seed in range(6)], GOOD, {},
        r"the same number of classes, got .*parent 3: 7, .*; choose others",
    ),
    "inputs": (
        [mlp([5]), mlp([5], inputs=9)], GOOD, {}, r"parent 1: Expected samples that MLP accepts, got .* \[2, 12\]",
    ),
    "operation": (
        [mlp([5]), nn.Sequential(nn.Linear(12, 5), Sorting(), nn.Linear(5, 4)).double()], GOOD, {},
        "parent 1: Expected .* got sort in 1; replace it",
    ),
    "other units": (
        [mlp([5]), nn.Sequential(nn.Linear(12, 4), nn.LayerNorm(4)).double()], GOOD, {},
        r"the same stages, got 2 \(plain, other\) in parent 1",
    ),
    "activation": (
        [nn.Sequential(nn.Linear(12, 5), act(), nn.Linear(5, 4)).double() for act in (nn.ReLU, nn.GELU)], GOOD, {},
        "Expected parent 1 to do in '0' what the deepest parent does in '0', got gelu for relu",
    ),
    "stages": (
        [vgg([[4]]), vgg([[4], [4]])], [images(8, 8)], {},
        r"the same stages, got 2 \(.*\) in parent 0 and 3 \(.*\) in the other$",
    ),
    "no deepest": (
        [resnet([2, 1]), resnet([1, 2])], [images(8, 8)], {},
        r"one parent to be deepest in every stage, got stages of \[\[1, 2, 1, 1\], \[1, 1, 2, 1\]\] units",
    ),
    "no shallowest": (
        [vgg([[4, 4], [4]]), vgg([[4], [4, 4]])], [images(8, 8)], {"balance": "merge"},
        "to be shallowest in every stage",
    ),
    "bias": ([mlp([5], bias=True), mlp([5])], GOOD, {}, "parent 1 to do in 'fc1' .* got linear without bias for"),
    "norm": ([mlp([5]), mlp([5], batch_norm=True)], GOOD, {}, "parent 1 to do in 'fc1' .* got batch_norm for relu"),
    "plain average": (
        [mlp([5]), mlp([6])], GOOD, {"combine": "average"}, "equal widths for combine=average, got different ones",
    ),
    "merge": (
        [resnet([2]), resnet([1])], [images(8, 8)], {"balance": "merge"}, "merge Linear layers with ReLU.*with insert",
    ),
    "few for layers": (
        [mlp([5, 5, 5, 5]), mlp([5, 5])], [vectors(3)], {"pin_last": 0}, "at least 4 samples to compare layers, got 3",
    ),
    "no mass": (
        [mlp([9]), mlp([5])], GOOD,
        {"solver": "unbalanced", "cost": "euclidean", "marginal_regularization": 1e-3, "regularization": 1e-3},
        "every neuron of the anchor to receive mass",
    ),
}  # fmt: skip


def test_two_samples_are_enough():
    assert fuse([mlp([5]), mlp([5], 1)], [vectors(2)], plain()).num_samples == 2


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    models, batches, options, message = REFUSED[case]
    with pytest.raises(FusionError, match=message):
        fuse(models, batches, FusionOptions(**options))


def test_a_refusal_is_one_line():
    for models, batches, options, _ in REFUSED.values():
        with pytest.raises(FusionError) as caught:
            fuse(models, batches, FusionOptions(**options))
        assert "\n" not in str(caught.value)


def test_a_random_map_that_inserts_where_nothing_can_be_is_not_drawn():
    for seed in range(10):
        options = plain(mapping="random", pin_first=0, pin_last=0, seed=seed)
        fusion = fuse([resnet([1, 3]), resnet([1, 2], 1)], [images(6, 8)], options)
        assert fusion.alignments[1][2][0] == 0
        assert trace(fusion.model, images(2, 8)).stages
