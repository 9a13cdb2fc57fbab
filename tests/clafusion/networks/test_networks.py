"""The network families: published sizes, architectures that describe what is there now, refusals."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from clafusion.errors import FusionError
from clafusion.networks import MLP, VGG, ResNet, build, published

SMALL: list[dict[str, Any]] = [
    {"name": "MLP", "in_features": 64, "hidden": [12, 7], "num_classes": 10, "dropout": 0.25},
    {"name": "MLP", "in_features": 64, "hidden": [], "num_classes": 3},
    {"name": "VGG", "channels": [[4, 6], [8]], "in_channels": 1},
    {"name": "ResNet", "blocks": [2, 1], "width": 4, "in_channels": 1},
    {"name": "ResNet", "blocks": [1, 2], "width": 4, "in_channels": 1, "block": "bottleneck", "stem": "imagenet"},
    {"name": "ResNet", "blocks": [2], "width": [6], "in_channels": 1, "inner": [[5, 3]], "stem_width": 6},
]
OPTIONS = [{"bias": bias, "batch_norm": norm} for bias in (False, True) for norm in (False, True)]


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def resized(layer: Any, *sizes: int) -> None:
    """Resize as fusion does: the tensor alone, leaving `in_channels` and the like as they were."""
    layer.weight = nn.Parameter(torch.randn(*sizes, *layer.weight.shape[2:]))


@pytest.fixture
def on_meta() -> Any:
    """Build without memory: only shapes matter."""
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg8", 3 * 64 * 9 + 64 * 128 * 9 + 128 * 256 * 9 + 256 * 512 * 9 + 512 * 512 * 9 + 5120),
        ("vgg11", 9_222_848),
        ("vgg13", 9_407_168),
        ("vgg16", 14_715_584),
        ("vgg19", 20_024_000),
        ("resnet18", 11_164_352),
        ("resnet34", 21_265_088),
        ("resnet50", 23_467_712),
        ("resnet101", 42_407_616),
        ("resnet152", 58_005_184),
    ],
)
def test_published_parameter_counts(name: str, expected: int) -> None:
    assert parameters(build({"name": name})) == expected


@pytest.mark.usefixtures("on_meta")
def test_imagenet_resnets_have_torchvisions_parameter_counts() -> None:
    """Published: 11.69M, 21.80M, 25.56M parameters; torchvision's head has a bias, its convolutions have none."""
    for name, expected in (("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)):
        network = build({"name": name, "num_classes": 1000, "batch_norm": True, "stem": "imagenet"})
        assert parameters(network) + 1000 == expected


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("vgg8_half", [[64], [64], [128], [256], [512]]),
        ("vgg11_half", [[64], [64], [128, 128], [256, 256], [256, 512]]),
        ("vgg11_doub", [[64], [256], [512, 512], [1024, 1024], [1024, 512]]),
        ("vgg11_quad", [[64], [512], [1024, 1024], [2048, 2048], [2048, 512]]),
        ("vgg13_half", [[64, 32], [64, 64], [128, 128], [256, 256], [256, 512]]),
        ("vgg13_doub", [[64, 128], [256, 256], [512, 512], [1024, 1024], [1024, 512]]),
        ("vgg13_quad", [[64, 256], [512, 512], [1024, 1024], [2048, 2048], [2048, 512]]),
        ("vgg13_student", [[64, 64], [64, 64], [128, 128], [256, 256], [256, 512]]),
    ],
)
@pytest.mark.usefixtures("on_meta")
def test_published_vgg_channels(name: str, channels: list[list[int]]) -> None:
    assert build({"name": name}).architecture["channels"] == channels


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])
def test_every_published_name_round_trips(options: dict[str, bool]) -> None:
    assert {"vgg16_doub", "resnet18_half", "resnet34", "resnet152_eighth"} < set(published())
    for name in published():
        network = build({"name": name, "num_classes": 7, **options})
        again = build(json.loads(json.dumps(network.architecture)))
        assert again.architecture == network.architecture
        assert shapes(again) == shapes(network)


def test_published_names_take_arguments() -> None:
    network = build({"name": "resnet18_eighth", "num_classes": 100, "in_channels": 1, "bias": True}).eval()
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 100)
    assert network.architecture["width"] == [8, 16, 32, 64]


@pytest.mark.parametrize("name", ["vgg8_half", "vgg13_student", "resnet34_eighth", "resnet50_eighth"])
def test_forward_on_cifar_images(name: str) -> None:
    logits = build({"name": name}).eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("architecture", SMALL)
def test_small_networks_round_trip_trace_and_run(architecture: dict[str, Any], options: dict[str, bool]) -> None:
    network = build({**architecture, **options}).eval()
    described = network.architecture
    assert json.loads(json.dumps(described)) == described
    assert build(described).architecture == described
    assert shapes(build(described)) == shapes(network)
    assert any(name.endswith("bias") for name, _ in network.named_parameters() if "bn" not in name) >= options["bias"]
    x = torch.randn(3, 1, 8, 8)
    assert network(x).shape == (3, described["num_classes"])
    traced: Tensor = fx.symbolic_trace(network)(x)
    assert torch.equal(traced, network(x))


def test_published_layer_names() -> None:
    basic = set(ResNet([1, 1], 4, batch_norm=True).state_dict())
    assert {"conv1.weight", "bn1.weight", "layer2.0.conv2.weight", "layer2.0.shortcut.0.weight"} < basic
    assert {"layer2.0.shortcut.1.running_mean", "linear.weight"} < basic
    assert not any(name.startswith("layer1.0.shortcut") for name in basic)
    assert list(MLP(4, [3, 2], 2, bias=True).state_dict()) == [
        f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")
    ]


def test_bottleneck_strides_its_3x3_convolution() -> None:
    network: Any = ResNet([1, 1], 4, block="bottleneck")
    block = network.layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_residual_block_computes_relu_of_branch_plus_shortcut() -> None:
    network: Any = ResNet([1], 4).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    stream = network.conv1(x).relu()
    block = network.layer1[0]
    stream = (block.conv2(block.conv1(stream).relu()) + stream).relu()
    torch.testing.assert_close(network(x), network.linear(stream.mean((2, 3))))


def test_the_stream_keeps_its_scale_through_a_deep_network_without_normalisation() -> None:
    """With He's initialisation in every branch the logits of this network grow beyond 10 and training dies."""
    torch.manual_seed(0)
    network = build({"name": "resnet34_eighth"})
    assert 0.01 < network(torch.randn(16, 3, 32, 32)).std() < 2


def test_mlp_computes_what_its_layers_say() -> None:
    network: Any = MLP(4, [5], 3, bias=True, batch_norm=True).eval()
    x = torch.randn(6, 1, 2, 2)
    torch.testing.assert_close(network(x), network.fc2(network.bn1(network.fc1(x.flatten(1))).relu()))


def test_vgg_pools_after_each_stage() -> None:
    features = [type(layer).__name__ for layer in VGG([[2, 3], [4]]).features]
    assert features == ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d"]


def test_architecture_after_resizing_an_mlp() -> None:
    network: Any = copy.deepcopy(MLP(4, [5, 6], 3))
    resized(network.fc1, 7, 4)
    resized(network.fc2, 9, 7)
    resized(network.fc3, 3, 9)
    assert network.architecture["hidden"] == [7, 9]
    assert shapes(build(network.architecture)) == shapes(network)


def test_architecture_after_resizing_a_vgg() -> None:
    network: Any = copy.deepcopy(VGG([[4], [6, 8]]))
    resized(network.features[0], 5, 3)
    resized(network.features[3], 6, 5)
    resized(network.features[5], 9, 6)
    resized(network.classifier, 10, 9)
    assert network.architecture["channels"] == [[5], [6, 9]]
    assert shapes(build(network.architecture)) == shapes(network)


def test_architecture_after_resizing_streams_and_inner_widths() -> None:
    network: Any = copy.deepcopy(ResNet([2], 4))
    resized(network.conv1, 7, 3)
    for block, inner in zip(network.layer1, (4, 11), strict=True):
        resized(block.conv1, inner, 7)
        resized(block.conv2, 7, inner)
    resized(network.linear, 10, 7)
    assert network.architecture["width"] == [7]
    assert network.architecture["inner"] == [[4, 11]]
    assert shapes(build(network.architecture)) == shapes(network)


@pytest.mark.parametrize("stem", [4, 5, 16])
def test_architecture_after_resizing_a_stem_with_its_own_stream(stem: int) -> None:
    """With a projection the stem is free, even when it happens to be as wide as the projected stream (16)."""
    network: Any = copy.deepcopy(ResNet([1], 4, block="bottleneck"))
    resized(network.conv1, stem, 3)
    resized(network.layer1[0].conv1, 4, stem)
    resized(network.layer1[0].shortcut[0], 16, stem)
    assert network.architecture["stem_width"] == (None if stem == 4 else stem)
    assert shapes(build(network.architecture)) == shapes(network)
    assert build(network.architecture).architecture == network.architecture


def test_a_stream_that_bottlenecks_cannot_have_is_refused() -> None:
    network: Any = ResNet([1], 4, block="bottleneck")
    resized(network.layer1[0].conv3, 18, 4)
    with pytest.raises(FusionError, match=r"multiples of 4, got \[18\]"):
        _ = network.architecture


def test_a_bias_on_some_layers_only_is_refused() -> None:
    network: Any = MLP(4, [3], 2)
    network.fc1.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(FusionError, match="a bias in all layers or in none, got 1 of 2"):
        _ = network.architecture


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "resnet35"}, r"got 'resnet35'; did you mean .*resnet34.* known are MLP, VGG, ResNet, vgg8"),
        ({"name": "mlp"}, "did you mean MLP"),
        ({"name": 3}, "got 3"),
        ({"blocks": [1]}, 'with a "name"'),
        ("resnet18", 'with a "name"'),
        ({"name": "resnet18", "num_clases": 3}, "an argument of resnet18, got 'num_clases'; did you mean num_classes"),
        ({"name": "MLP", "hidden": [3]}, "given in_features, num_classes"),
        ({"name": "MLP", "in_features": 0, "hidden": [3], "num_classes": 2}, "in_features to be a whole number"),
        ({"name": "MLP", "in_features": 4, "hidden": [3, True], "num_classes": 2}, r"hidden\[1\] to be a whole number"),
        ({"name": "MLP", "in_features": 4, "hidden": 3, "num_classes": 2}, "hidden to be a list, got 3"),
        ({"name": "MLP", "in_features": 4, "hidden": [3], "num_classes": 2, "dropout": 1}, "dropout in"),
        ({"name": "MLP", "in_features": 4, "hidden": [3] * 9999, "num_classes": 2}, "hidden to have at most"),
        ({"name": "VGG", "channels": [64, 128]}, r"channels\[0\] to be a list, got 64"),
        ({"name": "VGG", "channels": []}, "channels to be a list"),
        ({"name": "VGG", "channels": [[4]], "bias": "no"}, "bias to be True or False, got 'no'"),
        ({"name": "VGG", "channels": [[4]], "num_classes": 10**12}, "num_classes to be a whole number"),
        ({"name": "ResNet", "blocks": [1, 1], "width": [4]}, "2 widths, one per stage, got 1"),
        ({"name": "ResNet", "blocks": [1, 1], "width": True}, "width to be a whole number"),
        ({"name": "ResNet", "blocks": [10**6]}, "residual blocks, got 1000000"),
        ({"name": "ResNet", "blocks": [2], "inner": [[4]]}, r"\[2\] of them, got \[1\]"),
        ({"name": "ResNet", "blocks": [1], "block": "fancy"}, "block to be one of basic, bottleneck, got 'fancy'"),
        ({"name": "ResNet", "blocks": [1], "stem": "mnist"}, "stem to be one of cifar, imagenet"),
    ],
)
def test_refusals(architecture: Any, message: str) -> None:
    with pytest.raises(FusionError, match=message) as caught:
        build(architecture)
    assert "\n" not in str(caught.value)


def test_building_changes_nothing_it_is_given() -> None:
    architecture = {"name": "vgg11", "channels": [[4], [4]], "num_classes": 2}
    before = copy.deepcopy(architecture)
    build(architecture)
    assert architecture == before
    assert build({"name": "vgg11_half"}).architecture["channels"][0] == [64]
