"""Every check that guards the result is seen to fail when what it guards against is planted.

A fault is planted by replacing one function of the library; the control is that without it the same call succeeds.
"""

import dataclasses
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import FusionError, FusionOptions, fuse, insert_identities, trace
from clafusion.alignment import similarity
from clafusion.balancing import insertion, verification
from clafusion.correction import affine
from clafusion.fusion import averaging, candidates
from clafusion.fusion import fuse as fusion
from clafusion.statistics.moments import Moments
from clafusion.tracing import reading, rules, units
from clafusion.tracing.labels import Value
from clafusion.transport import moving
from clafusion.transport import neuron_maps as maps
from clafusion.transport import solvers as transport
from tests.helpers import images, mlp, permuted, plain, randomised, relative_error, resnet, vectors, vgg


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Every network is read anew, with the faults that are planted; and what is read then is not kept."""
    monkeypatch.setattr(reading, "_KNOWN", OrderedDict())


NORMED = {"bias": True, "batch_norm": True}
CASES = {
    "mlp": (lambda: [mlp([6, 5, 5], 0, **NORMED), mlp([6, 5], 1, **NORMED)], vectors(40)),
    "vgg": (lambda: [vgg([[4, 4], [5]], 0, **NORMED), vgg([[4], [5]], 1, **NORMED)], images(8, 8)),
    "resnet": (lambda: [resnet([2, 1], 0, **NORMED), resnet([1, 1], 1, **NORMED)], images(8, 8)),
    "other widths": (lambda: [resnet([2, 1], 0, **NORMED), resnet([1, 1], 1, width=5, **NORMED)], images(8, 8)),
}


def refused(case: str, message: str, **options) -> str:
    make, samples = CASES[case]
    with pytest.raises(FusionError, match=message) as caught:
        fuse(make(), [samples], plain(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_without_a_fault_nothing_is_refused(case):
    make, samples = CASES[case]
    for options in (plain(), FusionOptions.paper(), plain(solver="sinkhorn")):
        fuse(make(), [samples], options)


# --- inserted layers -------------------------------------------------------------------------------------------------


def corrupted_identity(parameter: str):
    """The parameters of an identity, with one entry of one of them changed."""
    value = moving.identity_value

    def corrupted(name, layer, structure, size, like):
        tensor = value(name, layer, structure, size, like)
        if name == parameter:
            tensor.flatten()[0] += 0.5
        return tensor

    return corrupted


@pytest.mark.parametrize(
    ("case", "parameter", "unit"),
    [
        ("mlp", "fc2.weight", "fc2"), ("mlp", "fc2.bias", "fc2"), ("mlp", "bn2.running_mean", "fc2"),
        ("mlp", "bn2.running_var", "fc2"), ("mlp", "bn2.weight", "fc2"), ("vgg", "features.3.weight", "features.3"),
        ("vgg", "features.4.bias", "features.3"),
    ],
)  # fmt: skip
def test_a_corrupted_inserted_layer_is_named(case, parameter, unit, monkeypatch):
    for module in (moving, verification):
        monkeypatch.setattr(module, "identity_value", corrupted_identity(parameter))
    refused(
        case, f"Expected '{unit}' to pass its input on with the parameters of an identity, got features that differ"
    )


def closed_by(choose):
    """A rule of what closes a residual branch that says something else."""
    closing = units._closing
    return lambda *arguments: choose(closing(*arguments))


CLOSINGS = [
    lambda found: tuple(name.replace("bn2", "bn1") for name in found),
    lambda found: tuple(name for name in found if name.endswith("weight")),
    lambda found: tuple(name for name in found if name.endswith("bias")),
]


@pytest.mark.parametrize("fault", CLOSINGS)
@pytest.mark.parametrize("case", ["resnet", "other widths"])
def test_a_unit_with_a_wrong_closing_parameter_is_named(case, fault, monkeypatch):
    monkeypatch.setattr(units, "_closing", closed_by(fault))
    for options in ({}, {"streams": "per_layer"}):
        refused(case, r"Expected 'layer1\.1\.conv1' to pass its input on with the parameters of an identity", **options)


def test_a_unit_that_is_taken_for_one_that_can_be_an_identity_is_named(monkeypatch):
    def net(depth, seed):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Tanh())]
        return randomised(nn.Sequential(*layers, nn.Linear(6, 3)), seed)

    with pytest.raises(FusionError, match="no identity can stand in its place"):
        fuse([net(3, 0), net(2, 1)], [vectors(20, 6)], plain())
    monkeypatch.setattr(units, "IDEMPOTENT", units.IDEMPOTENT | {"tanh"})
    monkeypatch.setattr(reading, "_KNOWN", OrderedDict())
    with pytest.raises(FusionError, match="Expected '2' to pass its input on"):
        fuse([net(3, 0), net(2, 1)], [vectors(20, 6)], plain())


@pytest.mark.parametrize(("case", "name"), [("mlp", "fc2.weight"), ("mlp", "fc3.weight"), ("resnet", "conv1.weight")])
def test_inserting_alone_is_checked_too(case, name, monkeypatch):
    deep, shallow = CASES[case][0]()
    alignment = [(0, 2), (0,)] if case == "mlp" else [(0,)] * 4
    insert_identities(shallow, deep, alignment, CASES[case][1])
    load = insertion.load_state

    def corrupted(network, state):
        return load(network, {key: tensor + 0.5 * (key == name) for key, tensor in state.items()})

    monkeypatch.setattr(insertion, "load_state", corrupted)
    with pytest.raises(FusionError, match="Expected inserted layers to leave the network's function as it is, got"):
        insert_identities(shallow, deep, alignment, CASES[case][1])


# --- maps ------------------------------------------------------------------------------------------------------------


def column(factor):
    def corrupted(plan):
        mapping = transport.as_map(plan)
        mapping[:, 0] *= factor
        return mapping

    return corrupted


def negative(plan):
    mapping = transport.as_map(plan)
    mapping[0] += 1
    mapping[1] -= 1
    return mapping


@pytest.mark.parametrize("fault", [column(1.01), column(float("nan")), column(0.0), negative])
@pytest.mark.parametrize("case", ["mlp", "other widths"])
def test_a_corrupted_map_is_named(case, fault, monkeypatch):
    monkeypatch.setattr(maps, "as_map", fault)
    message = "Expected maps of neurons with shares that sum to one, got one .* of parent 1 in neuron space '"
    refused(case, message)
    refused(case, message, streams="per_layer")


class Attention(nn.Module):
    """Two heads over eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v, self.o = (nn.Linear(n, 6) for n in (4, 6, 6, 6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def test_a_map_that_carries_neurons_from_one_head_into_another_is_seen(monkeypatch):
    model, samples = randomised(Attention()), torch.randn(30, 8, 4).double()
    other, _ = permuted_heads(model, samples)
    assert relative_error(fuse([model, other], [samples], plain()).model, model, samples) < 1e-9
    solve = maps.solve_in_blocks

    def mixed(grounds, *arguments):
        found = solve(grounds, *arguments)
        for name, (mapping, cost) in found.items():
            if len(mapping) == 6:
                found[name] = mapping.roll(1, 0), cost
        return found

    monkeypatch.setattr(maps, "solve_in_blocks", mixed)
    with pytest.raises(FusionError, match="Expected parent 1 to be the same function with its neurons permuted"):
        fuse([model, other], [samples], plain())


def permuted_heads(model, samples):
    """A copy whose stream is permuted; its heads stay."""
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("stem.weight", "stem.bias", "o.weight", "o.bias"):
        state[name] = state[name][order]
    for name in ("q.weight", "k.weight", "v.weight", "head.weight"):
        state[name] = state[name][:, order]
    other = Attention().double().eval()
    other.load_state_dict(state)
    return other, order


# --- what belongs together -------------------------------------------------------------------------------------------

MODEL, SAMPLES = resnet([1, 1], 0, **NORMED), images(8, 8)
AXES = [
    (name, dim)
    for name, axes in trace(MODEL, SAMPLES[:2]).axes.items()
    for dim, axis in enumerate(axes)
    if axis is not None
    and axis.spaces != ("linear",)
    # Neurons that one layer alone writes are fixed once it is not known to: nothing is permuted that could go wrong.
    and (name, dim) not in {(f"layer{number}.0.conv1.weight", 0) for number in (1, 2)}
]
#: The layer that first sees what is wrong with a norm: the one that reads its output.
READERS = {
    "bn1": "layer1.0.conv1", "layer1.0.bn1": "layer1.0.conv2", "layer1.0.bn2": "layer2.0.conv1",
    "layer2.0.bn1": "layer2.0.conv2", "layer2.0.bn2": "linear", "layer2.0.shortcut.1": "linear",
}  # fmt: skip


@pytest.mark.parametrize(("name", "dim"), AXES)
def test_an_axis_that_is_not_moved_is_named(name, dim, monkeypatch):
    """Whichever it is: left out of the permutation of its space, the parent is another function."""
    find = reading.find_spaces

    def forgetful(capture):
        found = find(capture)
        left = tuple(None if place == dim else axis for place, axis in enumerate(found.axes[name]))
        return dataclasses.replace(found, axes={**found.axes, name: left})

    monkeypatch.setattr(reading, "find_spaces", forgetful)
    module = name.rpartition(".")[0]
    for other in (permuted_before[0], resnet([1, 1], 1, width=3, **NORMED)):
        with pytest.raises(FusionError, match="to be the same function with its neurons permuted") as caught:
            fuse([MODEL, other], [SAMPLES], plain())
        assert f"first behind '{READERS.get(module, module)}.weight'" in str(caught.value)


permuted_before = permuted(MODEL, SAMPLES[:2])


def untied(labels, call):
    """Additions that tie nothing."""
    return call.tensors[0]


def beside(labels, call):
    """Norms of neurons that are nobody's."""
    return call.input


def offset(labels, call):
    """A flatten that is wrong by one entry."""
    found = rules.reshaped(labels, call)
    return Value(found.shape, tuple(array.roll(1, -1) for array in found.arrays))


def transposed(labels, call):
    """A flatten that is taken for one with the channels last."""
    x = call.input
    last = Value((x.shape[0], *x.shape[2:], x.shape[1]), tuple(array.movedim(1, -1) for array in x.arrays))
    return labels.reshape(last, call.shape)


TRACES = {
    "ties": ("add", untied, lambda: resnet([1], 0)),
    "norms": ("batch_norm", beside, lambda: vgg([[4], [5]], 0, **NORMED)),
    "offset": ("flatten", offset, lambda: Flat()),
    "transposed": ("flatten", transposed, lambda: Flat()),
}


class Flat(nn.Module):
    """As many pixels as channels, so that no shape tells in which order they are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 5, stride=1), nn.Linear(16 * 16, 4)
        self.double().eval()

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


@pytest.mark.parametrize("fault", TRACES)
def test_a_rule_of_labels_that_lies_is_seen(fault, monkeypatch):
    name, planted, make = TRACES[fault]
    model, samples = make(), images(8, 8)
    fuse([model, model], [samples], plain())
    monkeypatch.setitem(rules._RULES, name, planted)
    reading._KNOWN.clear()
    with pytest.raises(FusionError, match="Expected parent 0 to be the same function with its neurons permuted"):
        fuse([model, model], [samples], plain())


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_a_graph_that_is_another_function_is_refused(monkeypatch):
    export = reading.export_graph

    def other(model, example):
        captured = export(model, example)
        node = next(node for node in captured.graph.nodes if "relu" in node.name)
        node.target = torch.ops.aten.tanh.default
        return captured

    monkeypatch.setattr(reading, "export_graph", other)
    refused("mlp", "parent 0: Expected MLP to be the function of its graph, got logits that differ by")


def test_a_fingerprint_that_is_equal_for_unlike_networks_is_seen(monkeypatch):
    monkeypatch.setattr(reading, "fingerprint", lambda model, example: "all alike")
    nets = [randomised(nn.Sequential(nn.Linear(12, 5), act(), nn.Linear(5, 4))) for act in (nn.ReLU, nn.Tanh)]
    trace(nets[0], vectors(2))
    with pytest.raises(FusionError, match="Expected Sequential to be the function of its graph"):
        trace(nets[1], vectors(2))


def test_a_result_that_does_not_reach_the_network_is_refused(monkeypatch):
    balance = fusion.balance

    def detached(*arguments):
        balanced, model, room = balance(*arguments)
        tensors = {name: tensor.clone() for name, tensor in room.capture.tensors.items()}
        return balanced, model, dataclasses.replace(room, capture=dataclasses.replace(room.capture, tensors=tensors))

    monkeypatch.setattr(fusion, "balance", detached)
    refused("mlp", "Expected MLP to compute with its new parameters, got logits that differ by")


# --- everything finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["fc2.weight", "bn1.running_var", "bn2.bias"])
def test_a_parent_that_is_not_finite_is_named(name, value):
    models, samples = CASES["mlp"][0](), CASES["mlp"][1]
    models[1].state_dict()[name].flatten()[-1] = value
    with pytest.raises(FusionError, match=f"Expected finite weights, got NaN or infinity in '{name}' of parent 1"):
        fuse(models, [samples])


@pytest.mark.parametrize("name", ["fc2.weight", "bn1.running_mean"])
def test_a_fused_parameter_that_is_not_finite_is_named(name, monkeypatch):
    add_up = averaging._add_up

    def spoiled(fused, balanced, parameter, *others):
        add_up(fused, balanced, parameter, *others)
        fused.mul_(float("nan") if parameter == name else 1)

    monkeypatch.setattr(averaging, "_add_up", spoiled)
    said = refused("mlp", f"Expected finite weights, got NaN or infinity in '{name}'")
    assert said.endswith(f"(neuron space 'fc{name[2]}') of the fused network")


def spoil(monkeypatch):
    """Let what is written into layers of five neurons be infinite."""
    write = affine.FoldedLayer.write

    def spoiled(self, weight, bias, moments):
        write(self, weight * float("inf") if len(self.weight) == 5 else weight, bias, moments)

    monkeypatch.setattr(affine.FoldedLayer, "write", spoiled)


def test_a_refit_that_spoils_a_layer_is_undone(monkeypatch):
    spoil(monkeypatch)
    make, samples = CASES["mlp"]
    averaged, refitted = (
        fuse(make(), [samples], FusionOptions(correction=name, targets="matched")).model for name in ("none", "refit")
    )
    assert torch.equal(averaged.fc2.weight, refitted.fc2.weight) and torch.equal(
        averaged.fc3.weight, refitted.fc3.weight
    )
    assert not torch.equal(averaged.fc1.weight, refitted.fc1.weight)


@pytest.mark.parametrize("correction", ["rescale", "repair"])
def test_a_correction_that_spoils_a_layer_is_named(correction, monkeypatch):
    spoil(monkeypatch)
    refused(
        "mlp",
        f"in 'fc2.weight' .neuron space 'fc2'. of the fused network after {correction}|{correction} of 'fc3'",
        correction=correction,
        targets="matched",
    )


def test_a_fused_network_whose_outputs_are_not_finite_is_refused(monkeypatch):
    def spoiled(model, structure, *_):
        model.layer2[0].conv2.weight.mul_(1e300).mul_(1e8)
        return structure

    monkeypatch.setattr(candidates, "correct", spoiled)
    message = "Expected finite outputs of the fused network, got NaN or infinity, first behind "
    said = refused("resnet", message, correction="rescale")
    assert "'linear.weight'" in said or "'layer2.0.conv2.weight'" in said


def overflowing(dtype=torch.float16):
    """Networks that are finite but for one sample, and that one."""
    models = [net.to(dtype) for net in (mlp([6, 5, 4], 0), mlp([6, 4], 1))]
    samples = vectors(40).float()
    samples[30] = 6e4
    return models, samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "none"}, "parent 1, neuron space 'fc1': Expected finite activations"),
        ({"solver": "gromov"}, "parent 1, neuron space 'fc1': Expected finite activations"),
        ({"features": "weights", "correction": "rescale"}, "rescale of 'fc1': Expected finite activations"),
        ({"features": "weights", "correction": "repair"}, "repair of 'fc1': Expected finite activations"),
        (
            {"features": "weights", "teacher": "mean", "targets": "matched"},
            "refit of 'fc2': Expected finite activations",
        ),
        ({"features": "weights"}, "Expected finite activations"),
        ({"pin_last": 0}, "Expected finite activations"),
        ({"pin_last": 0, "layer_measure": "cca"}, "Expected finite activations"),
        ({"pin_last": 0, "layer_measure": "wasserstein"}, "Expected finite activations"),
        ({"balance": "merge"}, "Expected finite activations"),
    ],
    ids=str,
)
def test_activations_that_are_not_finite_are_refused_wherever_they_are_measured(options, message):
    models, samples = overflowing()
    with pytest.raises(FusionError, match=message + ".*NaN or infinity for some of the samples; .* a wider dtype"):
        fuse(models, [samples], FusionOptions(**options))


def test_outputs_of_parents_that_are_not_finite_are_refused():
    models, samples = overflowing()
    with pytest.raises(FusionError, match="Expected finite outputs, got NaN or infinity from parent 0"):
        fuse(models, [samples.flip(0)[9:]])


# --- statistics: no run-time check can know the right ones, but the properties that are tested do ---------------------


def scaled_product(moments):
    return dataclasses.replace(moments, xy=moments.xy * torch.linspace(1, -1, len(moments.xy))[:, None])


def other_mean(moments):
    return dataclasses.replace(moments, x=moments.x * torch.linspace(-9, 9, len(moments.x)))


@pytest.mark.parametrize("fault", [scaled_product, other_mean, None])
def test_a_wrong_statistic_loses_planted_permutations(fault, monkeypatch):
    model, samples = mlp([9, 8, 7], 0, bias=True), vectors(40) + 1
    of = Moments.of.__func__
    if fault is not None:
        monkeypatch.setattr(Moments, "of", classmethod(lambda cls, x, y, onto=None: fault(of(cls, x, y, onto))))
    network = fuse([model, permuted(model, samples[:2])[0]], [samples], plain()).model
    assert (relative_error(network, model, samples) < 1e-9) == (fault is None)


def test_a_statistic_that_is_not_a_number_is_named(monkeypatch):
    of = Moments.of.__func__
    fault = lambda moments: dataclasses.replace(moments, xx=moments.xx * float("nan"))  # noqa: E731
    monkeypatch.setattr(Moments, "of", classmethod(lambda cls, x, y, onto=None: fault(of(cls, x, y, onto))))
    refused("resnet", "parent 1, neuron space 'conv1': Expected finite activations")


def test_the_gram_matrix_too(monkeypatch):
    gram = similarity.gram
    monkeypatch.setattr(sys.modules["clafusion.alignment.layer_costs"], "gram", lambda x: gram(x) * float("nan"))
    refused("mlp", "Expected finite activations", pin_last=0)
