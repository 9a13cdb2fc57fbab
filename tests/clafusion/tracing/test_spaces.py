"""Neuron spaces: permuting all of them leaves the function as it is, and there are as many as there should be."""

import importlib.util
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion import FusionError, trace
from clafusion.tracing.exporting import export_graph
from clafusion.tracing.rules import elementwise
from clafusion.tracing.spaces import Spaces, find_spaces, register_operation
from tests.helpers import images, large, mlp, resnet, vectors, vgg
from tests.invariance import check, enliven
from tests.zoo import ZOO

BOUND = 1e-11


class Net(nn.Module):
    """Named layers and a function of them."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def spaces_of(model: nn.Module, shape: tuple[int, ...]) -> Spaces:
    return find_spaces(export_graph(model.eval(), torch.randn(2, *shape)))


def sizes(spaces: Spaces) -> dict[str, int]:
    return {name: space.size for name, space in spaces.spaces.items()}


def checked(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """The sizes of the spaces of a network that is the same function after a permutation of all of them."""
    error, spaces, _ = check(lambda: model, shape)
    assert error < BOUND
    return sizes(spaces)


def _samples() -> list:
    marks = []
    for name, sample in ZOO.items():
        missing = importlib.util.find_spec(name.partition("/")[0]) is None
        reasons = [pytest.mark.skipif(missing, reason="an optional package")]
        marks.append(pytest.param(name, marks=[*reasons, large, pytest.mark.slow] if sample.slow else reasons))
    return marks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _samples())
def test_the_zoo_is_invariant_and_has_the_expected_spaces(name):
    sample = ZOO[name]
    error, spaces, facts = check(sample.make, sample.shape)
    assert error < BOUND
    assert len(spaces.spaces) == sample.spaces
    assert facts["axes"][1] is not None, "the logits are free"


def test_a_parameter_that_is_left_behind_changes_the_output():
    error, _, _ = check(ZOO["torchvision/vit"].make, (3, 32, 32), leave="encoder.layers.encoder_layer_1.mlp.3.weight")
    assert error > 1e-3


@pytest.mark.parametrize(
    ("model", "samples"),
    [
        (mlp([5, 6]), vectors(2)),
        (mlp([5, 6, 5], bias=True, batch_norm=True), vectors(2)),
        (vgg([[4, 5], [6]]), images(2)),
        (vgg([[4, 5], [6]], bias=True, batch_norm=True), images(2)),
        (resnet([2, 1, 2]), images(2)),
        (resnet([1, 1], width=[4, 5]), images(2)),
    ],
)
def test_our_own_networks_keep_the_names_of_their_spaces(model, samples):
    structure, spaces = trace(model, samples), find_spaces(export_graph(model, samples))
    assert tuple(spaces.spaces) == (*structure.free_spaces, structure.output)
    assert sizes(spaces) == {name: structure.sizes[name] for name in spaces.spaces}


def test_heads_are_blocks():
    spaces = spaces_of(ZOO["torchvision/vit"].make(), (3, 32, 32)).spaces
    place = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert [name for name in spaces if name.startswith(place)] == [f"{place} blocks", place, f"{place} (2)"]
    heads, query, value = spaces[f"{place} blocks"], spaces[place], spaces[f"{place} (2)"]
    assert (heads.size, heads.parent) == (4, None)
    for space in (query, value):
        assert space.parent == heads.name
        assert space.block.tolist() == [head for head in range(4) for _ in range(8)]


def test_the_axis_of_queries_keys_and_values():
    spaces = spaces_of(ZOO["torchvision/vit"].make(), (3, 32, 32))
    place = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    axis = spaces.axes[place][0]
    assert axis.spaces == (place, f"{place} (2)")
    assert axis.of.tolist() == [0] * 64 + [1] * 32
    assert axis.at.tolist() == [*range(32)] * 3
    assert axis.turn.tolist() == [0] * 32 + [1] * 32 + [0] * 32


def test_groups_are_blocks_and_the_input_axis_is_that_of_all_groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    assert checked(model, (3, 4, 4)) == {"0 blocks": 2, "0": 8, "1": 12, "4": 3}
    spaces = spaces_of(model.float(), (3, 4, 4))
    outputs, inputs, *kernel = spaces.axes["1.weight"]
    assert outputs.at.tolist() == [*range(12)]
    assert inputs.at.tolist() == [*range(8)]
    assert kernel == [None, None]
    assert spaces.axes["4.weight"][1].turn.tolist() == [0, 1, 2, 3] * 12


def test_a_depthwise_convolution_keeps_its_space():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(24, 3))
    assert checked(model, (3, 4, 4)) == {"0": 6, "3": 3}
    assert spaces_of(model.float(), (3, 4, 4)).axes["1.weight"][1] is None


def _two_ways(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.fc1(x).chunk(2, 1)
        return net.fc2(torch.cat([first(a), second(b)], 1))

    return Net(forward, fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (F.relu, torch.tanh),
        (F.relu, lambda b: b),
        (lambda a: F.dropout(a, 0.1, False), lambda b: F.dropout(b, 0.5, False)),
    ],
)
def test_neurons_with_other_uses_are_other_neurons(first, second):
    assert checked(_two_ways(first, second), (4,)) == {"fc1": 4, "fc1 (2)": 4, "fc2": 3}


def test_neurons_that_are_dropped_are_other_neurons():
    model = Net(lambda net, x: net.fc2(net.fc1(x)[:, :5]), fc1=nn.Linear(4, 8), fc2=nn.Linear(5, 3))
    assert checked(model, (4,)) == {"fc1": 5, "fc1 (2)": 3, "fc2": 3}


def test_a_neuron_that_is_taken_by_itself_is_another_one():
    model = Net(
        lambda net, x: net.fc2(net.fc1(x)[:, 2:] * net.fc1(x)[:, 1:2]), fc1=nn.Linear(4, 6), fc2=nn.Linear(4, 3)
    )
    assert checked(model, (4,)) == {"fc1": 4, "fc2": 3}


def test_occurrences_in_another_order_tell_neurons_apart():
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.fc1(x)
        both = torch.cat([torch.relu(x), torch.tanh(x)], 1)
        return net.fc2(both.reshape(-1, 3, 2).transpose(1, 2).reshape(-1, 6))

    # Places 0, 2, 4, 1, 3, 5: relu comes before tanh for the neurons 0 and 2, but after it for neuron 1.
    model = Net(forward, fc1=nn.Linear(4, 3), fc2=nn.Linear(6, 5))
    assert checked(model, (4,)) == {"fc1": 2, "fc2": 5}


def test_gelu_of_a_gated_unit_is_one_space():
    model = Net(
        lambda net, x: net.down(F.silu(net.gate(x)) * net.up(x)),
        gate=nn.Linear(4, 6),
        up=nn.Linear(4, 6),
        down=nn.Linear(6, 3),
    )
    assert checked(model, (4,)) == {"gate": 6, "down": 3}


def _head(function: Callable[[Tensor], Tensor], channels: int = 6, features: int | None = None) -> nn.Module:
    return Net(
        lambda net, x: net.fc(function(F.relu(net.conv(x)))),
        conv=nn.Conv2d(3, channels, 3, padding=1),
        fc=nn.Linear(features or channels, 4),
    )


POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
    "squeeze twice": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "index": lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "mean of mean": lambda x: x.mean(-1).mean(-1),
    "amax": lambda x: x.amax((2, 3)),
    "max": lambda x: x.max(-1).values.max(-1)[0],
    "clamp": lambda x: x.clamp(min=0).mean((2, 3)),
    "hardtanh": lambda x: F.hardtanh(x).flatten(2).mean(2),
    "float": lambda x: x.float().to(x.dtype).mean((2, 3)),
    "to device": lambda x: x.to("cpu").contiguous().mean((2, 3)),
    "constants": lambda x: ((2 * x - 1) / 3).mean((2, 3)) ** 2,
    "pad": lambda x: F.pad(x, (1, 1, 2, 0)).mean((2, 3)),
    "reflection pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect").mean((2, 3)),
    "sums": lambda x: x.sum((2, 3)) / x.shape[-1] ** 2,
    "norm": lambda x: F.normalize(x.mean((2, 3)), dim=1),
    "instance norm": lambda x: F.instance_norm(x).pow(3).mean((2, 3)),
    "rms norm": lambda x: F.rms_norm(x.mean((2, 3)), (6,)),
    "softmax": lambda x: x.mean((2, 3)).softmax(1),
    "attention pool": lambda x: torch.einsum("bcn,bn->bc", x.flatten(2), x.flatten(2).sum(1).softmax(1)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear").mean((2, 3)),
    "roll": lambda x: x.roll((1, 2), (2, 3)).flip(3).amax((2, 3)),
    "cumsum": lambda x: x.flatten(2).cumsum(2).mean(2),
    "unfold": lambda x: F.unfold(x, 3).unflatten(1, (6, 9)).mean((2, 3)),
    "fold": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[-2:], 3, padding=1).mean((2, 3)),
    "where": lambda x: torch.where(x > 0.5, x, torch.zeros_like(x)).mean((2, 3)),
    "masked": lambda x: x.masked_fill(x < 0.2, 0.0).std((2, 3)),
    "grid": lambda x: F.grid_sample(x, torch.zeros(x.shape[0], 2, 2, 2, dtype=x.dtype), align_corners=False).mean(
        (2, 3)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", POOLED)
def test_operations_that_keep_every_channel_free(name):
    assert checked(_head(POOLED[name]), (3, 6, 6)) == {"conv": 6, "fc": 4}


def test_pixel_shuffle_and_back():
    model = _head(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2).mean((2, 3)), 8)
    assert checked(model, (3, 6, 6)) == {"conv": 8, "fc": 4}


def test_channels_of_zeros_are_neurons():
    # The shortcut of the first ResNets: halved images, and zeros for the channels that the narrow side lacks.
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return net.fc(F.relu(y).mean((2, 3)))

    model = Net(forward, stem=nn.Conv2d(3, 4, 1), conv=nn.Conv2d(4, 8, 3, stride=2, padding=1), fc=nn.Linear(8, 3))
    assert checked(model, (3, 6, 6)) == {"stem": 4, "conv": 4, "fc": 3}


@pytest.mark.parametrize(
    ("layers", "shape", "expected"),
    [
        ([nn.Conv1d(3, 6, 3), nn.PReLU(6), nn.Flatten(), nn.Linear(36, 4)], (3, 8), {"0": 6, "3": 4}),
        ([nn.Conv3d(3, 6, 3), nn.PReLU(), nn.Flatten(), nn.Linear(6, 4)], (3, 3, 3, 3), {"0": 6, "3": 4}),
        (
            [nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), nn.Linear(80, 4)],
            (3, 2, 2),
            {"0": 6, "1": 5, "3": 4},
        ),
        ([nn.Conv2d(3, 12, 1), nn.GLU(1), nn.Flatten(), nn.Linear(24, 4)], (3, 2, 2), {"0": 6, "3": 4}),
        (
            [nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(24, 4)],
            (3, 2, 2),
            {"0 blocks": 3, "0": 6, "3": 4},
        ),
        (
            [nn.Conv2d(3, 6, 1), nn.ZeroPad2d(1), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 4)],
            (3, 2, 2),
            {"0": 6, "2": 5, "4": 4},
        ),
        ([nn.Linear(5, 6), nn.LogSoftmax(1)], (5,), {"0": 6}),
    ],
)
def test_layers(layers, shape, expected):
    assert checked(nn.Sequential(*layers), shape) == expected


@pytest.mark.parametrize("mask", [False, True])
def test_heads_that_share_keys_move_with_them(mask):
    def forward(net: Net, x: Tensor) -> Tensor:
        q = net.q(x).unflatten(2, (4, 5)).transpose(1, 2)
        k, v = (layer(x).unflatten(2, (2, 5)).transpose(1, 2) for layer in (net.k, net.v))
        bias = net.bias if mask else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return net.o(y.transpose(1, 2).flatten(2)).mean(1)

    layers = {"q": nn.Linear(6, 20), "k": nn.Linear(6, 10), "v": nn.Linear(6, 10), "o": nn.Linear(20, 3)}
    model = Net(forward, **layers, bias=nn.Parameter(torch.randn(4, 7, 7)))
    found = checked(model, (7, 6))
    assert sorted(found.values()) == [2, 3, 10, 10]


def test_tied_weights_have_the_same_neurons():
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(F.linear(F.linear(x, net.weight), net.weight.t()))

    model = Net(forward, weight=nn.Parameter(torch.randn(6, 4)), fc=nn.Linear(4, 3))
    assert checked(model, (4,)) == {"weight": 6, "fc": 3}


def test_pinned_weights_are_named_with_the_operation_that_fixed_them():
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.conv(x)).mean((2, 3))
        return net.fc(net.mix(x.unsqueeze(1)).squeeze(1))

    model = Net(forward, conv=nn.Conv2d(3, 6, 1), mix=nn.Conv1d(1, 1, 3, padding=1), fc=nn.Linear(6, 4))
    spaces = spaces_of(model, (3, 4, 4))
    assert sizes(spaces) == {"fc": 4}
    assert spaces.pinned == {"conv.weight": "conv1d in mix"}


def test_a_constant_that_differs_pins():
    model = Net(
        lambda net, x: net.fc2(net.fc1(x) * torch.arange(6.0, dtype=x.dtype)), fc1=nn.Linear(4, 6), fc2=nn.Linear(6, 3)
    )
    spaces = spaces_of(model, (4,))
    assert sizes(spaces) == {"fc2": 3}
    assert spaces.pinned == {"fc1.weight": "mul in the network"}


def test_the_axes_of_nodes():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(), nn.Linear(24, 4))
    capture = export_graph(model.eval(), torch.randn(2, 3, 2, 2))
    spaces = find_spaces(capture)
    conv, flat = (spaces.of_node(name) for name in ("conv2d", "flatten"))
    assert conv[0] is conv[2] is conv[3] is None
    assert (conv[1].spaces, conv[1].at.tolist()) == (("0",), [*range(6)])
    assert flat[1].turn.tolist() == [0, 1, 2, 3] * 6
    assert spaces.of_node(capture.logits)[1].spaces == ("2",)
    assert spaces.of_node("nothing") is None


def test_heads_of_a_node_are_spread_over_two_dimensions():
    capture = export_graph(ZOO["torchvision/vit"].make().eval(), torch.randn(2, 3, 32, 32))
    name = next(node.name for node in capture.graph.nodes if node.name.startswith("scaled_dot"))
    assert find_spaces(capture).of_node(name) is None


def test_spaces_can_be_stored():
    spaces = spaces_of(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), (4,))
    again = pickle.loads(pickle.dumps(spaces))
    assert again.spaces == spaces.spaces
    assert again.of_node("linear")[1].at.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: x.topk(3, 1).values, "aten::topk"),
        (lambda x: x * x.argmax(1, keepdim=True), "aten::argmax"),
        (lambda x: x.sort(1).values, "aten::sort"),
    ],
)
def test_operations_without_a_rule_are_refused_by_name(function, operation):
    width = 3 if "topk" in operation else 6
    model = nn.Sequential(nn.Linear(4, 6), Net(lambda net, x: function(x)), nn.Linear(width, 3))
    short = operation.removeprefix("aten::")
    with pytest.raises(FusionError, match=re.escape(f"got {short} in 1; replace it")) as caught:
        spaces_of(model, (4,))
    assert f'clafusion.register_operation("{operation}", ...)' in str(caught.value)


@torch.library.custom_op("clafusion_tests::wave", mutates_args=())
def wave(x: Tensor) -> Tensor:
    return torch.sin(x)


@wave.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_custom_operation_is_refused_until_it_is_registered(monkeypatch):
    monkeypatch.setattr("clafusion.tracing.rules._REGISTERED", {})
    model = nn.Sequential(nn.Linear(4, 6), Net(lambda net, x: wave(x)), nn.Linear(6, 3))
    with pytest.raises(
        FusionError, match="got clafusion_tests::wave in 1; .* register_operation|got clafusion_tests::"
    ):
        spaces_of(model, (4,))
    register_operation("clafusion_tests::wave", elementwise)
    assert checked(model, (4,)) == {"0": 6, "2": 3}


def test_a_name_without_a_namespace_is_refused():
    with pytest.raises(FusionError, match="put its namespace before it"):
        register_operation("wave", elementwise)


def test_blocks_that_cross_are_refused():
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.fc1(x).unflatten(1, (3, 4))
        return net.fc2((x.softmax(1) * x.softmax(2)).flatten(1))

    model = Net(forward, fc1=nn.Linear(5, 12), fc2=nn.Linear(12, 3))
    with pytest.raises(FusionError, match="do not cross, got those of fc1 in blocks by softmax in the network"):
        spaces_of(model, (5,))


def test_the_same_network_gives_the_same_spaces():
    make = ZOO["torchvision/swin"].make
    one, two = (spaces_of(enliven(make(), seed).float(), (3, 32, 32)) for seed in (0, 1))
    assert one.spaces == two.spaces
    assert list(one.spaces) == list(two.spaces)
