"""Every check that guards the result is seen to fail when what it guards against is planted.

A fault is planted by replacing one function of the library; the control is that without it the same call succeeds.
"""

import dataclasses
import sys

import pytest
import torch
from torch import nn

from clafusion import FusionError, FusionOptions, fuse, insert_identities, trace
from clafusion.alignment import similarity
from clafusion.balancing import insertion as balance
from clafusion.correction import affine
from clafusion.fusion import averaging, verification
from clafusion.fusion import fuse as fusion
from clafusion.statistics.moments import Moments
from clafusion.tracing import propagation
from clafusion.tracing.parameters import move
from clafusion.transport import neuron_maps as maps
from clafusion.transport import solvers as transport
from tests.helpers import images, mlp, permuted, plain, relative_error, resnet, vectors, vgg

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


def corrupt(monkeypatch, name: str, key: str) -> None:
    """Change one entry of one tensor of the units that are inserted."""
    identity = balance._identity

    def corrupted(network, unit, zero_branches):
        state = identity(network, unit, zero_branches)
        if f"{name}.{key}" in state:
            state[f"{name}.{key}"].flatten()[0] += 0.5
        return state

    monkeypatch.setattr(balance, "_identity", corrupted)


INSERTED = [
    ("mlp", "fc2", "weight", "fc2"), ("mlp", "fc2", "bias", "fc2"),
    ("mlp", "bn2", "running_mean", "fc2"), ("mlp", "bn2", "running_var", "fc2"),
    ("vgg", "features.3", "weight", "features.3"), ("vgg", "features.4", "bias", "features.3"),
    ("resnet", "layer1.1.bn2", "weight", "conv1"), ("resnet", "layer1.1.bn2", "bias", "conv1"),
    ("other widths", "layer1.1.bn2", "bias", "conv1"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "layer", "key", "space"), INSERTED)
def test_a_corrupted_inserted_layer_is_named(case, layer, key, space, monkeypatch):
    corrupt(monkeypatch, layer, key)
    said = refused(case, "Expected inserted layers to leave parent 1's function as it is")
    assert f"first behind '{layer}.weight' (neuron space '{space}')" in said


def test_so_is_a_corrupted_layer_of_the_parents_own(monkeypatch):
    copied = balance.copied_state

    def corrupted(a, b, ours, theirs, source):
        state = copied(a, b, ours, theirs, source)
        return {name: tensor * 1.5 if name == "fc3.weight" else tensor for name, tensor in state.items()}

    monkeypatch.setattr(balance, "copied_state", corrupted)
    assert "first behind 'fc3.weight' (neuron space 'fc3')" in refused("mlp", "Expected inserted layers")


def test_inserting_alone_is_checked_too(monkeypatch):
    deep, shallow = CASES["mlp"][0]()
    insert_identities(shallow, deep, [(0, 2), (0,)])
    corrupt(monkeypatch, "fc2", "weight")
    with pytest.raises(FusionError, match="leave the network's function as it is, got .* first behind 'fc2.weight'"):
        insert_identities(shallow, deep, [(0, 2), (0,)], vectors(8))


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
    assert "(neuron space" in refused(case, "Expected maps of neurons with shares that sum to one.* of parent 1 behind")
    refused(case, "Expected maps of neurons with shares that sum to one", streams="per_layer")


# --- what belongs together -------------------------------------------------------------------------------------------

MODEL, SAMPLES = resnet([1, 1], 0, **NORMED), images(8, 8)
AXES = [
    (name, dim)
    for name, axes in trace(MODEL, SAMPLES[:2]).axes.items()
    for dim, axis in enumerate(axes)
    if axis is not None and axis.space not in ("input", "linear")
]


@pytest.mark.parametrize(("name", "dim"), AXES)
def test_an_axis_that_is_not_moved_is_named(name, dim, monkeypatch):
    """Whichever it is: left out of the permutation of its space, the parent is another function."""

    def forgetful(structure, parameter, tensor, its_maps, options):
        axes = list(structure.axes[parameter])
        if parameter == name:
            axes[dim] = None
        return move(tensor, axes, [maps.axis_map(axis, its_maps, options) for axis in axes])

    monkeypatch.setattr(verification, "moved", forgetful)
    for other in (permuted(MODEL, SAMPLES[:2])[0], resnet([1, 1], 1, width=3, **NORMED)):
        with pytest.raises(FusionError, match="to be the same function with its neurons permuted") as caught:
            fuse([MODEL, other], [SAMPLES], plain())
        assert f"first behind '{name.rpartition('.')[0]}.weight' (neuron space '" in str(caught.value)


def untied(found, one, other):
    """Additions that tie nothing."""


def beside(found, node, source):
    """Norms of neurons that are nobody's."""
    name = str(node.target)
    found.open_space(name, node.meta["shape"][1])
    norm(found, node, propagation.Signal(name))
    return source


def transposed(found, node, source):
    """A flatten that is taken for one with the channels last."""
    flat = flatten(found, node, source)
    found.open_space("pixels", flat.repeat)
    return propagation.Signal("pixels", flat.repeat, path=flat.path)


norm, flatten = propagation._norm, propagation._flatten
TRACES = {
    "ties": (propagation.Propagation, "tie", untied, lambda: resnet([1], 0)),
    "norms": (propagation, "_norm", beside, lambda: vgg([[4], [5]], 0, **NORMED)),
    "flatten": (propagation, "_flatten", transposed, lambda: Flat()),
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
def test_a_wrong_trace_is_seen(fault, monkeypatch):
    where, name, planted, make = TRACES[fault]
    model, samples = make(), images(8, 8)
    fuse([model, model], [samples], plain())
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(FusionError, match="Expected parent 0 to be the same function with its neurons permuted"):
        fuse([model, model], [samples], plain())


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


@pytest.mark.parametrize("correction", ["rescale", "repair", "refit"])
def test_a_correction_that_spoils_a_layer_is_named(correction, monkeypatch):
    write = affine.FoldedLayer.write

    def spoiled(self, weight, bias, moments):
        write(self, weight * float("inf") if self.module.out_features == 5 else weight, bias, moments)

    monkeypatch.setattr(affine.FoldedLayer, "write", spoiled)
    refused(
        "mlp",
        f"in 'fc2.weight' .neuron space 'fc2'. of the fused network after {correction}|{correction} of 'fc3'",
        correction=correction,
    )


def test_a_fused_network_whose_outputs_are_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(fusion, "correct", lambda model, *_: model.layer2[0].conv2.weight.mul_(1e300).mul_(1e8))
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
        ({"features": "weights"}, "refit of 'fc2': Expected finite activations"),
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


def half_the_samples(moments):
    return dataclasses.replace(moments, count=moments.count // 2 + 1)


@pytest.mark.parametrize("fault", [scaled_product, other_mean, half_the_samples, None])
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
