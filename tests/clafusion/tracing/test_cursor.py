"""Running a network from cut point to cut point gives what its plain forward gives."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from clafusion import trace
from clafusion.tracing.execution import Ahead, Cursor, GraphRunner, is_tensor
from tests.helpers import images, mlp, randomised, resnet, vectors, vgg

BIASED = {"bias": True, "batch_norm": True}


def residual_of_torchvision() -> nn.Module:
    blocks = torchvision.models.resnet.BasicBlock
    return randomised(torchvision.models.ResNet(blocks, [1, 1, 1, 1], num_classes=5))


class Views(nn.Module):
    """Sizes and additions in place, as they are found in the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4 * 64, 5)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        out = self.conv2(x)
        out += x
        out = self.relu(out)
        return self.head(out.view(out.size(0), -1))


NETWORKS = {
    "mlp": (lambda: mlp([9, 8], **BIASED), vectors(10)),
    "vgg": (lambda: vgg([[4], [5, 6]], **BIASED), images(10, 8)),
    "basic": (lambda: resnet([1, 2], **BIASED), images(10, 8)),
    "bottleneck": (lambda: resnet([2, 1], block="bottleneck"), images(10, 8)),
    "torchvision": (residual_of_torchvision, images(4, 32)),
    "views": (lambda: randomised(Views()), images(10, 8)),
}


def plain_forward(structure, samples) -> dict[str, torch.Tensor]:
    """Every tensor of the graph, by interpreting it from beginning to end and keeping everything."""
    capture, kept = structure.capture, {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, node):
            kept[node.name] = super().run_node(node)
            return kept[node.name]

    placeholders = [node.name for node in capture.graph.nodes if node.op == "placeholder"]
    given = [samples if name == capture.entry else capture.tensors[capture.names[name]] for name in placeholders]
    module = torch.fx.GraphModule(torch.nn.Module(), capture.graph)
    Keeping(module, garbage_collect_values=False).run(*given)
    return kept


def cursor_of(structure, batches) -> Cursor:
    return Cursor(GraphRunner(structure.capture), batches)


def between(structure, start: str, stop: str | None) -> list[str]:
    """The tensors from one node up to another or to the end, those of the network aside."""
    capture = structure.capture
    nodes = [node for node in capture.graph.nodes if node.name not in capture.names and node.op != "output"]
    names = [node.name for node in nodes if is_tensor(node)]
    return names[names.index(start) : None if stop is None else names.index(stop)]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_node_is_as_in_the_plain_forward(name, parts):
    make, samples = NETWORKS[name]
    structure = trace(make(), samples[:2])
    expected = plain_forward(structure, samples)
    cursor = cursor_of(structure, samples.tensor_split(parts))
    stops = [*(unit.layers[0].node for unit in structure.units), None]
    for here, there in zip(stops, stops[1:], strict=False):
        cursor.advance(here)
        names = between(structure, here, there)
        for wanted in ([name] for name in names):
            check(cursor, wanted, expected)
        check(cursor, names, expected)


def check(cursor, names, expected):
    outputs = list(cursor.look_ahead(names))
    assert all(output.keys() == set(names) for output in outputs)
    for name in names:
        together = torch.cat([output[name] for output in outputs])
        assert torch.allclose(together, expected[name], atol=1e-12, rtol=1e-10), name


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_end_is_in_sight_from_the_start(name):
    make, samples = NETWORKS[name]
    model = make()
    structure = trace(model, samples[:2])
    last = structure.capture.logits
    [outputs] = cursor_of(structure, [samples]).look_ahead([last])
    assert torch.allclose(outputs[last], model(samples.clone()), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_looking_ahead_does_not_move(name):
    make, samples = NETWORKS[name]
    structure = trace(make(), samples[:2])
    cursor = cursor_of(structure, [samples])
    cursor.advance(structure.layers[1].node)
    [state] = cursor.states
    before = {node: (value, copy.deepcopy(value)) for node, value in state.items()}
    last = structure.capture.logits
    for _ in range(2):
        next(cursor.look_ahead([last]))  # given up half-way
        list(cursor.look_ahead([last]))
    assert cursor.states[0] is state and state.keys() == before.keys()
    for node, (value, copied) in before.items():
        assert state[node] is value and bool(torch.as_tensor(value == copied).all())


@torch.no_grad()
def test_one_activation_is_held_whatever_the_depth():
    structure = trace(resnet([3, 3], **BIASED), images(2, 8))
    cursor = cursor_of(structure, [images(10, 8)])
    for unit in structure.units[1:]:
        cursor.advance(unit.layers[0].node)
        assert len(cursor.states[0]) == 1


@torch.no_grad()
def test_advancing_twice_to_one_place_is_advancing_once_and_never_back():
    structure = trace(mlp([9, 8]), vectors(2))
    cursor = cursor_of(structure, [vectors(10)])
    place = structure.layers[1].node
    for _ in range(2):
        cursor.advance(place)
        cursor.advance(structure.layers[0].node)
        [outputs] = cursor.look_ahead([place])
        assert torch.equal(outputs[place], plain_forward(structure, vectors(10))[place])


@torch.no_grad()
def test_networks_side_by_side_keep_nothing_that_was_taken():
    structure = trace(resnet([1, 2], **BIASED), images(2, 8))
    expected = plain_forward(structure, images(10, 8))
    names = [layer.node for layer in structure.layers]
    names.append(names[0])
    ahead = Ahead(GraphRunner(structure.capture), images(10, 8), names)
    for name in names:
        assert torch.allclose(ahead.take(name), expected[name], atol=1e-12)
    assert not ahead.kept


@torch.no_grad()
def test_what_is_given_is_taken_for_granted():
    structure = trace(mlp([9, 8]), vectors(2))
    place, end, ones = structure.layers[1].node, structure.capture.logits, torch.ones(10, 8).double()
    [outputs] = cursor_of(structure, [vectors(10)]).look_ahead([end], {place: ones})
    assert torch.allclose(outputs[end], ones @ structure.capture.tensors["fc3.weight"].T)


@torch.no_grad()
def test_a_change_behind_the_cut_point_is_seen_and_one_before_it_is_not():
    model = mlp([9, 8])
    structure = trace(model, vectors(2))
    cursor = cursor_of(structure, [vectors(10)])
    cursor.advance(structure.layers[1].node)
    last = structure.capture.logits
    before = next(cursor.look_ahead([last]))[last]
    model.fc1.weight.zero_()
    assert torch.equal(next(cursor.look_ahead([last]))[last], before)
    model.fc2.weight.mul_(2)
    assert torch.allclose(next(cursor.look_ahead([last]))[last], 2 * before)


@torch.no_grad()
def test_the_samples_are_left_as_they_are():
    """Even by a network whose first operation overwrites its input."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    samples = vectors(10)
    structure = trace(model, samples[:2])
    list(cursor_of(structure, [samples]).look_ahead([structure.capture.logits]))
    assert torch.equal(samples, vectors(10))


def test_samples_take_the_type_of_the_network():
    structure = trace(mlp([9]).float(), vectors(2).float())
    [outputs] = cursor_of(structure, [vectors(10)]).look_ahead([structure.layers[0].pre])
    assert outputs[structure.layers[0].pre].dtype == torch.float32
