"""What `trace` reads off a network: neuron spaces, axes, units, stages, observation points, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clafusion import FusionError, trace
from clafusion.tracing.execution import as_input
from tests import helpers
from tests.helpers import foreign, images, mlp, permuted, relative_error, resnet, vectors, vgg

FLAGS = [{"bias": bias, "batch_norm": norm} for bias in (False, True) for norm in (False, True)]


class Net(nn.Module):
    """A network made of a function over a few layers, for the odd cases."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def units(structure):
    return [[unit.name for unit in stage] for stage in structure.stages]


# --- permuting any free space leaves the function as it is -----------------------------------------------------------

OWN = {
    "mlp": (lambda **flags: mlp([7, 6, 5], **flags), vectors(5)),
    "vgg": (lambda **flags: vgg([[4], [5, 6]], **flags), images(3, 8)),
    "basic": (lambda **flags: resnet([1, 2, 1], **flags), images(3, 8)),
    "bottleneck": (lambda **flags: resnet([1, 2], block="bottleneck", stem="imagenet", **flags), images(3, 16)),
}


def check_every_space(model, example):
    structure = trace(model, example)
    assert structure.free_spaces
    whole, orders = permuted(model, example, seed=1)
    assert relative_error(whole, model, example) < 1e-10
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    assert helpers.largest_difference(whole, model) > 1e-3


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("family", OWN)
def test_permuting_every_free_space_leaves_our_networks_as_functions(family, flags):
    make, example = OWN[family]
    check_every_space(make(**flags), example)


TORCHVISION = {
    "resnet18": 32,
    "resnet34": 32,
    "resnet50": 32,
    "vgg11": 32,
    "vgg16_bn": 32,
    "mobilenet_v2": 32,
    "alexnet": 64,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_permuting_every_free_space_leaves_torchvision_networks_as_functions(name):
    check_every_space(foreign(name), images(2, TORCHVISION[name]))


def test_permuting_a_pinned_space_changes_the_function():
    """The control: the same procedure applied to the logits is seen."""
    model = mlp([5])
    other = mlp([5])
    state = model.state_dict()
    state["fc2.weight"] = state["fc2.weight"].flip(0)
    other.load_state_dict(state)
    assert relative_error(other, model, vectors(4)) > 0.1


@pytest.mark.parametrize("space", ["conv1", "layer1.0.conv1", "layer2.0.conv2"])
def test_every_axis_of_a_space_counts(space):
    """Permuting one parameter less of a space changes the function: no axis is listed for nothing."""
    model, example = resnet([1, 1], batch_norm=True), images(2, 8)
    structure = trace(model, example)
    order = torch.arange(structure.sizes[space]).flip(0)
    names = [name for name, axes in structure.axes.items() if any(axis and axis.spaces == (space,) for axis in axes)]
    assert len(names) >= 6
    for left_out in names:
        other = resnet([1, 1], batch_norm=True)
        state = model.state_dict()
        for name in set(names) - {left_out}:
            for dim, axis in enumerate(structure.axes[name]):
                if axis is not None and axis.spaces == (space,):
                    state[name] = state[name].index_select(dim, order)
        other.load_state_dict(state)
        assert relative_error(other, model, example) > 1e-4, left_out


# --- units and stages ------------------------------------------------------------------------------------------------


def test_an_mlp_is_one_chain_and_a_head():
    structure = trace(mlp([7, 6, 5], batch_norm=True), vectors(2))
    assert units(structure) == [["fc1", "fc2", "fc3"], ["fc4"]]
    assert structure.free_spaces == ("fc1", "fc2", "fc3")
    assert structure.output == "fc4"
    [layer] = structure.units[0].layers
    assert layer.name == "fc1" and layer.norm == "batch_norm"
    assert [unit.insertable for unit in structure.units] == [False, True, True, True]


def test_vgg_stages_are_its_pooling_groups():
    structure = trace(vgg([[4, 4], [6, 6, 6], [8]]), images(2, 8))
    assert [len(stage) for stage in structure.stages] == [2, 3, 1, 1]
    assert [stage[0].resolution for stage in structure.stages] == [(8, 8), (4, 4), (2, 2), ()]


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_stages_are_its_own(block):
    structure = trace(resnet([3, 4, 6, 3], width=2, block=block), images(2, 8))
    assert [len(stage) for stage in structure.stages] == [1, 3, 4, 6, 3, 1]
    assert [stage[0].kind for stage in structure.stages] == ["plain", *["residual"] * 4, "plain"]
    firsts = [[unit.insertable for unit in stage] for stage in structure.stages[1:-1]]
    assert firsts[1:] == [[False, *[True] * (n - 1)] for n in (4, 6, 3)]
    assert firsts[0][0] == (block == "basic")  # a bottleneck's first stage begins with a projection


def test_a_residual_stream_is_one_space_per_stage():
    structure = trace(resnet([2, 2]), images(2, 8))
    written = {layer.name: structure.written(layer).spaces[0] for layer in structure.layers}
    assert written["layer1.0.conv2"] == written["layer1.1.conv2"] == written["conv1"] == "conv1"
    assert written["layer2.0.conv2"] == written["layer2.0.shortcut.0"] == written["layer2.1.conv2"]
    assert written["layer1.0.conv1"] == "layer1.0.conv1"
    assert len(structure.free_spaces) == 2 + 4


def test_closing_layers_are_the_norms_where_there_are_any():
    plain, normed = (trace(resnet([2, 2], batch_norm=norm), images(2, 8)) for norm in (False, True))
    # A projection has no identity, so that there is nothing to close.
    assert [unit.closing for unit in plain.stages[2]] == [(), ("layer2.1.conv2.weight",)]
    assert [unit.closing for unit in normed.stages[2]] == [(), ("layer2.1.bn2.weight", "layer2.1.bn2.bias")]


def test_shortcuts_are_known():
    structure = trace(resnet([1, 1], batch_norm=True), images(2, 8))
    assert [layer.name for layer in structure.layers if layer.shortcut] == ["layer2.0.shortcut.0"]


def test_flattening_repeats_every_neuron():
    structure = trace(foreign("alexnet"), images(2, 64))
    axis = structure.axes["classifier.1.weight"][1]
    assert axis.spaces == ("features.10",) and int(axis.turn.max()) + 1 == 36


def test_a_depthwise_convolution_keeps_its_inputs_space():
    structure = trace(foreign("mobilenet_v2"), images(2, 32))
    depthwise = [layer for layer in structure.layers if layer.kind == "depthwise"]
    assert len(depthwise) == 17
    axes = structure.axes["features.1.conv.0.0.weight"]
    assert axes[0].spaces == structure.axes["features.0.0.weight"][0].spaces and axes[1:] == (None, None, None)


# --- where features are read -----------------------------------------------------------------------------------------


def observed(model, example):
    """Layer -> the values at its `pre` and `post` nodes."""
    from clafusion.tracing.execution import GraphRunner

    structure = trace(model, example)
    names = {node for layer in structure.layers for node in (layer.pre, layer.post)}
    with torch.no_grad():
        values = dict(GraphRunner(structure.capture).observe(example, names))
    return {layer.name: (values[layer.pre], values[layer.post]) for layer in structure.layers}


def test_features_of_a_residual_network_are_where_the_publication_has_them():
    model, example = resnet([1, 1], batch_norm=True), images(2, 8)
    values = observed(model, example)
    with torch.no_grad():
        stem = model.bn1(model.conv1(example))
        block, after = model.layer2[0], model.layer1(F.relu(stem))
        inner = block.bn1(block.conv1(after))
        shortcut = block.shortcut(after)
        output = block.bn2(block.conv2(F.relu(inner))) + shortcut
        expected = {
            "conv1": (stem, F.relu(stem)),
            "layer2.0.conv1": (inner, F.relu(inner)),
            "layer2.0.conv2": (output, F.relu(output)),
            "layer2.0.shortcut.0": (shortcut, shortcut),
            "linear": (model(example),) * 2,
        }
    for layer, (pre, post) in expected.items():
        assert torch.allclose(values[layer][0], pre) and torch.allclose(values[layer][1], post), layer


def test_features_of_plain_layers_are_before_and_after_the_activation():
    model, example = mlp([5, 4], batch_norm=True, bias=True), vectors(3)
    values = observed(model, example)
    with torch.no_grad():
        pre = model.bn1(model.fc1(example))
    assert torch.allclose(values["fc1"][0], pre) and torch.allclose(values["fc1"][1], pre.relu())
    assert torch.allclose(values["fc3"][0], model(example))


def test_activation_names_are_read_from_modules_functions_and_methods():
    for activation, name in [
        (nn.GELU(), "gelu"),
        (torch.relu, "relu"),
        (lambda x: x.clamp(min=0), "relu (clamp)"),
        (lambda x: F.hardtanh(x, -2.0, 2.0, inplace=True), "hardtanh"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.tanh(), "tanh"),
        (lambda x: x.relu_(), "relu"),
    ]:
        layers = {"act": activation} if isinstance(activation, nn.Module) else {}
        net = Net(
            lambda self, x, f=activation: self.b(self.act(self.a(x)) if hasattr(self, "act") else f(self.a(x))),
            a=nn.Linear(4, 3), b=nn.Linear(3, 2), **layers,
        )  # fmt: skip
        assert trace(net, torch.zeros(2, 4)).units[0].layers[0].activation == name


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: self.b(self.a(x).relu().view(x.size(0), -1)),
        lambda self, x: self.b(self.a(x).relu().reshape(x.shape[0], -1)),
        lambda self, x: self.b(torch.flatten(F.relu(self.a(x), inplace=True), 1)),
        lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training).flatten(1)),
        lambda self, x: self.b(F.dropout2d(F.hardtanh(self.a(x)), 0.5, self.training).flatten(1)),
    ],
)
def test_flattening_is_understood_in_every_spelling(run):
    net = Net(run, a=nn.Conv2d(3, 4, 3), b=nn.Linear(4 * 36, 2)).double()
    structure = trace(net, images(2, 8))
    assert structure.axes["b.weight"][1].turn.max() == 35
    assert relative_error(permuted(net.eval(), images(2, 8))[0], net, images(2, 8)) < 1e-12


def test_a_spatial_mean_is_understood():
    net = Net(lambda self, x: self.b(self.a(x).relu().mean([2, 3])), a=nn.Conv2d(3, 4, 3), b=nn.Linear(4, 2))
    assert trace(net, torch.zeros(2, 3, 8, 8)).axes["b.weight"][1].turn.max() == 0


def test_in_place_operations_do_not_spoil_what_is_observed():
    net = Net(
        lambda self, x: self.b(self.act(self.a(x))), a=nn.Linear(4, 3), act=nn.ReLU(inplace=True), b=nn.Linear(3, 2)
    )
    values = observed(net, torch.randn(8, 4))
    assert (values["a"][0] < 0).any() and net.act.inplace


def test_tracing_leaves_the_network_as_it_is():
    model = resnet([1, 1], batch_norm=True).train()
    model.register_forward_hook(lambda *_: pytest.fail("a hook of the user's fired"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = trace(model, images(4, 8))
    assert model.training and len(model._forward_hooks) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert structure.capture.tensors["conv1.weight"] is model.conv1.weight  # no second copy in memory


def test_a_batch_takes_the_dtype_of_the_network():
    capture = trace(mlp([3]), vectors(2)).capture
    assert as_input(torch.zeros(2, 3, dtype=torch.uint8), capture).dtype == torch.float64


# --- refusals --------------------------------------------------------------------------------------------------------


def linear(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs)


REFUSED = {
    "branching": Net(lambda self, x: self.a(x) if x.sum() > 0 else x, a=linear()),
    "no parameters": Net(lambda self, x: x.relu()),
}
SAID = {
    "sample shape": (
        Net(lambda self, x: self.a(x), a=linear(5)),
        r"samples that Net accepts, got a batch of shape \[2, 4\]",
    ),
    "sort": (Net(lambda self, x: self.a(x).sort(1).values, a=linear()), "got sort in"),
    "no layers": (Net(lambda self, x: x.relu()), "Expected "),
    "feature maps": (Net(lambda self, x: self.a(x)[:, :, None, None], a=linear()), r"logits \[samples, classes\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case):
    with pytest.raises(FusionError) as caught:
        trace(REFUSED[case], torch.zeros(2, 4))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("Expected ")


@pytest.mark.parametrize("case", SAID)
def test_refuses_by_name(case):
    model, message = SAID[case]
    with pytest.raises(FusionError, match=message):
        trace(model, torch.zeros(2, 4))


UNDERSTOOD = {
    "cat": Net(lambda self, x: self.b(torch.cat([self.a(x), x], 1)), a=linear(), b=linear(8)),
    "layer norm": Net(lambda self, x: self.b(self.n(self.a(x))), a=linear(), n=nn.LayerNorm(4), b=linear()),
    "multiplication": Net(lambda self, x: self.b(self.a(x) * 2), a=linear(), b=linear()),
    "bare parameter": Net(lambda self, x: self.b(self.a(x) + self.a.bias), a=linear(), b=linear()),
    "norm of the input": Net(lambda self, x: self.a(self.n(x)), n=nn.BatchNorm1d(4), a=linear()),
    "number": Net(lambda self, x: self.b(self.a(x) + 1), a=linear(), b=linear()),
    "no affine": Net(
        lambda self, x: self.b(self.n(self.a(x))), a=linear(), n=nn.BatchNorm1d(4, affine=False), b=linear()
    ),
    "weight norm": Net(
        lambda self, x: self.b(self.a(x)), a=nn.utils.parametrizations.weight_norm(linear()), b=linear()
    ),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_what_was_refused_before_is_understood(case):
    """Networks that the tables of module classes had no room for."""
    model = UNDERSTOOD[case].double().eval()
    other, _ = permuted(model, vectors(3, 4), seed=1)
    assert relative_error(other, model, vectors(3, 4)) < 1e-12
