"""A layer and its norm as one affine map: what is read is what it computes, what is written is computed."""

import copy

import pytest
import torch
from torch import nn

from clafusion import trace
from clafusion.correction.affine import design_rows, folded_layer
from clafusion.statistics.samples import rows
from clafusion.tracing.execution import Cursor, GraphRunner
from tests.helpers import images, mlp, randomised, resnet, vectors, vgg


def depthwise(norm: bool, bias: bool) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, groups=6, bias=bias)]
    norms = [nn.BatchNorm2d(6)] if norm else []
    return randomised(nn.Sequential(*layers, *norms, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4)))


NORMED = {"batch_norm": True}
NETWORKS = {
    "mlp": (lambda: mlp([7, 6]), vectors(30)),
    "mlp bias": (lambda: mlp([7, 6], bias=True), vectors(30)),
    "mlp norm": (lambda: mlp([7, 6], **NORMED), vectors(30)),
    "mlp bias norm": (lambda: mlp([7, 6], bias=True, **NORMED), vectors(30)),
    "vgg bias": (lambda: vgg([[4], [5]], bias=True), images(6, 8)),
    "resnet norm": (lambda: resnet([1, 1], **NORMED), images(6, 8)),
    "resnet bias norm": (lambda: resnet([1, 1], bias=True, **NORMED), images(6, 8)),
    "depthwise": (lambda: depthwise(False, False), images(6, 8)),
    "depthwise bias norm": (lambda: depthwise(True, True), images(6, 8)),
}


def parts_of(model, samples):
    """Every layer with its input and its output, observations first."""
    structure = trace(model, samples[:2])
    for layer in structure.layers:
        part = folded_layer(structure, layer)
        [outputs] = Cursor(GraphRunner(structure.capture), [samples]).look_ahead([layer.input, part.output])
        output = rows(outputs[part.output], part.dim)
        yield part, design_rows(part, outputs[layer.input], torch.arange(len(output))), output


def before_the_norm(model, samples, number):
    """What a layer gives before the norm behind it, observations first."""
    structure = trace(model, samples[:2])
    layer = structure.layers[number]
    [(_, output)] = GraphRunner(structure.capture).observe(samples, [layer.node])
    return rows(output)


def computed(x, weight, bias, groups):
    return torch.einsum("ngi,goi->ngo", x, weight.unflatten(0, (groups, -1))).flatten(1) + bias


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_read_is_what_the_layer_computes(name):
    make, samples = NETWORKS[name]
    model = make()
    for part, x, output in parts_of(model, samples):
        weight, bias = part.read()
        assert weight.shape == (output.shape[1], part.fan_in) and weight.dtype == bias.dtype == torch.float64
        assert torch.allclose(computed(x, weight, bias, part.groups), output, atol=1e-12)
        assert part.has_bias or not bias.any()
    weighted = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert len(list(parts_of(model, samples))) == len(weighted)


@pytest.mark.parametrize("name", NETWORKS)
def test_writing_what_was_read_changes_nothing(name):
    make, samples = NETWORKS[name]
    model = make()
    before = model(samples)
    for number, (part, _, _) in enumerate(parts_of(model, samples)):
        weight, bias = part.read()
        mean, variance = (torch.rand(len(bias), generator=torch.Generator().manual_seed(number)) for _ in range(2))
        part.write(weight, bias, (mean, variance))
        if part.norm is not None:
            assert torch.equal(part.norm[2], mean.double()) and torch.equal(part.norm[3], variance.double())
    assert torch.allclose(model(samples), before, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_is_computed(name):
    make, samples = NETWORKS[name]
    for number in range(len(list(parts_of(make(), samples)))):
        model = make()
        generator = torch.Generator().manual_seed(number)
        part, x, _ = list(parts_of(model, samples))[number]
        weight = torch.randn(len(part.weight), part.fan_in, generator=generator).double()
        bias = torch.randn(len(weight), generator=generator).double() * part.has_bias
        plain = computed(x, weight, torch.zeros(()), part.groups)
        part.write(weight, bias, (plain.mean(0), plain.var(0, correction=0)))
        _, _, output = list(parts_of(model, samples))[number]
        assert torch.allclose(output, computed(x, weight, bias, part.groups), atol=1e-12)
        if part.norm is not None:
            # In training mode the norm would see what it has stored.
            seen, (_, _, mean, variance) = before_the_norm(model, samples, number), part.norm
            assert torch.allclose(seen.mean(0), mean, atol=1e-12)
            assert torch.allclose(seen.var(0, correction=0), variance, atol=1e-12)


def test_a_neuron_that_does_not_vary_keeps_its_value():
    """The norm stores a variance of zero, and takes nothing but its epsilon from what it then gives back."""
    model, samples = mlp([7], **NORMED), vectors(30)
    part, _, _ = next(parts_of(model, samples))
    weight, bias = torch.zeros(7, 12).double(), torch.arange(7).double()
    part.write(weight, bias, (torch.zeros(7), torch.full((7,), -1e-20)))
    assert not part.norm[3].any()
    assert torch.allclose(model.bn1(model.fc1(samples)), bias.expand(30, 7), atol=1e-12)


def test_float32_rounds_once():
    """Mean and bias are stored in float32; together they still give the bias that was written."""
    model = mlp([7], **NORMED).float()
    structure = trace(model, vectors(2).float())
    part = folded_layer(structure, structure.units[0].layers[0])
    weight, _ = part.read()
    bias = torch.linspace(-1, 1, 7).double()
    part.write(weight, bias, (torch.full((7,), 1000 / 3).double(), torch.full((7,), 1e-3).double()))
    again, got = part.read()
    assert torch.allclose(again, weight, rtol=1e-6) and torch.allclose(got, bias, atol=1e-4)


def test_writing_touches_nothing_but_the_layer():
    model, samples = resnet([1, 1], bias=True, **NORMED), images(6, 8)
    before = copy.deepcopy(model.state_dict())
    part, _, _ = list(parts_of(model, samples))[1]
    weight, bias = part.read()
    part.write(2 * weight, bias, (bias, bias.square()))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    own = {part.weight.data_ptr(), part.bias.data_ptr(), *(tensor.data_ptr() for tensor in part.norm)}
    assert changed == {name for name, tensor in model.state_dict().items() if tensor.data_ptr() in own}
    assert len(changed) == 6


def test_what_is_kept_can_be_put_back():
    model, samples = resnet([1, 1], bias=True, **NORMED), images(6, 8)
    before = copy.deepcopy(model.state_dict())
    for part, _, _ in parts_of(model, samples):
        kept, (weight, bias) = part.keep(), part.read()
        part.write(2 * weight, bias + 1, (bias, bias.square()))
        for tensor, value in kept:
            assert not torch.equal(tensor, value)
            tensor.detach().copy_(value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Scaled(nn.Module):
    """Branches whose neurons have a scale each, one of them nothing, before they are added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(12, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.scale, self.head = nn.Parameter(torch.tensor([0.5, -2.0, 1e-3, 3.0, 0.0])), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.scale * self.outer(self.inner(x).relu()))


@torch.no_grad()
def test_a_scale_behind_a_layer_is_part_of_it_where_it_is_added_up():
    model = randomised(Scaled())
    model.scale.copy_(torch.tensor([0.5, -2.0, 1e-3, 3.0, 0.0]))
    structure, samples = trace(model, vectors(2)), vectors(30)
    layer = next(layer for layer in structure.layers if layer.name == "outer")
    part, silent = folded_layer(structure, layer, with_scale=True), model.outer.weight[4].clone()
    inner = model.inner(model.stem(samples)).relu()
    weight, bias = part.read()
    assert torch.allclose(inner @ weight.T + bias, model.scale * model.outer(inner), atol=1e-12)
    wanted = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double()
    wanted[4] = 0
    part.write(wanted, torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]).double(), None)
    expected = inner @ wanted.T + torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]).double()
    assert torch.allclose(model.scale * model.outer(inner), expected, atol=1e-9)
    assert torch.equal(model.outer.weight[4], silent)
    assert folded_layer(structure, layer).scale is None


def test_a_norm_elsewhere_is_no_part_of_the_layer():
    """After a ReLU, or behind a layer that something else reads, too."""
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    structure = trace(randomised(model), vectors(2))
    part = folded_layer(structure, structure.units[0].layers[0])
    assert part.norm is None and part.output != structure.units[1].input
