"""Conversion: equal outputs before and after, exact round trips, files, and what is refused.

The networks of the published code and its names are written here a second time, plainly, as the oracle.
"""

import argparse
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from clafusion import FusionError, describe, load_network, networks, restore
from clafusion.formats.conversion import convert, published_state, torchvision_state
from clafusion.formats.recognition import recognise
from clafusion.lightning_modules import ImageClassifier, load_parent, read_checkpoint
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commands.convert import convert_file
from clafusion.networks.published import PUBLISHED
from tests.helpers import build, foreign, images, mlp, randomised, resnet, vectors

BOTH = [False, True]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- networks by the published names ---


class PlainMLP(nn.Module):
    def __init__(self, sizes, bias, norm):
        super().__init__()
        self.depth = len(sizes) - 1
        for k in range(1, self.depth + 1):
            setattr(self, f"fc{k}", nn.Linear(sizes[k - 1], sizes[k], bias=bias))
            if norm and k < self.depth:
                setattr(self, f"bn{k}", nn.BatchNorm1d(sizes[k]))

    def forward(self, x):
        x = x.view(x.shape[0], -1)
        for k in range(1, self.depth):
            x = getattr(self, f"fc{k}")(x)
            x = torch.relu(getattr(self, f"bn{k}")(x) if hasattr(self, f"bn{k}") else x)
        return getattr(self, f"fc{self.depth}")(x)


class PlainVGG(nn.Module):
    def __init__(self, channels, classes, bias, norm):
        super().__init__()
        layers, width = [], 3
        for item in channels:
            if item == "M":
                layers += [nn.MaxPool2d(2, 2)]
                continue
            layers += [nn.Conv2d(width, item, 3, 1, 1, bias=bias)]
            layers += [nn.BatchNorm2d(item)] * norm + [nn.ReLU()]
            width = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes, bias=bias)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class PlainBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, bias, norm, kernels):
        super().__init__()
        width = outputs if len(kernels) == 2 else outputs // 4
        widths = [inputs, *[width] * (len(kernels) - 1), outputs]
        strides = [stride, 1] if len(kernels) == 2 else [1, stride, 1]
        self.depth = len(kernels)
        for k, (kernel, step) in enumerate(zip(kernels, strides, strict=True), 1):
            setattr(self, f"conv{k}", nn.Conv2d(widths[k - 1], widths[k], kernel, step, kernel // 2, bias=bias))
            setattr(self, f"bn{k}", nn.BatchNorm2d(widths[k]) if norm else nn.Identity())
        layers = [nn.Conv2d(inputs, outputs, 1, stride, bias=bias)] + [nn.BatchNorm2d(outputs)] * norm
        self.shortcut = nn.Sequential(*(layers if stride != 1 or inputs != outputs else []))

    def forward(self, x):
        out = x
        for k in range(1, self.depth + 1):
            out = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(out))
            out = torch.relu(out) if k < self.depth else out
        return torch.relu(out + self.shortcut(x))


class PlainResNet(nn.Module):
    def __init__(self, blocks, width, classes, bias, norm, kernels=(3, 3), stem=None):
        super().__init__()
        stream = stem or width
        self.conv1 = nn.Conv2d(3, stream, 3, 1, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(stream) if norm else nn.Identity()
        self.stages = len(blocks)
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage * (1 if len(kernels) == 2 else 4)
            units = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                units.append(PlainBlock(stream, outputs, stride, bias, norm, kernels))
                stream = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*units))
        self.linear = nn.Linear(stream, classes, bias=bias)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def ours_of(state) -> nn.Module:
    conversion = convert(state)
    network = restore(conversion.architecture).to(next(iter(state.values())).dtype)
    network.load_state_dict(conversion.state)
    return network.eval()


def assert_same_function(model, samples, exactly=False):
    network = ours_of(model.state_dict())
    with torch.no_grad():
        expected, got = model(samples), network(samples)
    if exactly:
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    return network


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("bias", BOTH)
def test_a_published_mlp_becomes_ours(bias, norm):
    model = randomised(PlainMLP([12, 9, 7, 4], bias, norm))
    network = assert_same_function(model, vectors(5).view(5, 3, 2, 2), exactly=True)
    assert isinstance(network, networks.MLP) and network.architecture["hidden"] == [9, 7]


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("bias", BOTH)
@pytest.mark.parametrize(
    ("plan", "channels"),
    [([4, "M", 6, 5, "M", 8, "M"], [[4], [6, 5], [8]]), ([4, 5, 6, "M", 8, 7, "M"], [[4, 5, 6], [8, 7]])],
)
def test_a_published_vgg_becomes_ours(plan, channels, bias, norm):
    model = randomised(PlainVGG(plan, 3, bias, norm))
    network = assert_same_function(model, images(3, 2 ** len(channels)))
    assert network.architecture["channels"] == channels


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("bias", BOTH)
@pytest.mark.parametrize("more", [{}, {"stem": 6}, {"kernels": (1, 3, 1)}, {"kernels": (1, 3, 1), "stem": 6}], ids=str)
def test_a_published_resnet_becomes_ours(bias, norm, more):
    model = randomised(PlainResNet([2, 1, 2], 4, 3, bias, norm, **more))
    network = assert_same_function(model, images(3, 16))
    assert network.architecture["blocks"] == [2, 1, 2] and network.architecture["stem"] == "cifar"


def test_a_bias_in_the_last_layer_alone_gives_the_others_one_of_zero():
    model = randomised(PlainResNet([1, 1], 4, 3, bias=False, norm=True))
    model.linear = randomised(nn.Linear(8, 3))
    assert_same_function(model, images(3, 16))
    added = convert(model.state_dict()).added
    assert "conv1.bias" in added and "layer2.0.shortcut.0.bias" in added and len(added) == 6


# --- torchvision ---


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vgg13_bn"])
def test_a_network_of_torchvision_has_the_same_outputs_exactly(name):
    model = foreign(name)
    for size in (45, 72):  # a VGG ends in images of 1x1, which pooling does not change, and of 2x2
        network = assert_same_function(model, images(2, size), exactly=True)
    assert isinstance(network, networks.ResNet) == name.startswith("resnet")


@pytest.mark.parametrize(
    "name", ["resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "vgg13", "vgg16_bn", "vgg19"]
)
@pytest.mark.slow
def test_the_larger_ones_of_torchvision_have_the_same_outputs_exactly(name):
    assert_same_function(foreign(name), images(2, 72), exactly=True)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_narrow_network_in_torchvision_s_manner_has_the_same_outputs_in_float32(block):
    kind = {"basic": torchvision.models.resnet.BasicBlock, "bottleneck": torchvision.models.resnet.Bottleneck}[block]
    width = {} if block == "basic" else {"width_per_group": 16}
    model = randomised(torchvision.models.ResNet(kind, [1, 2, 1, 1], num_classes=7, **width), dtype=torch.float32)
    assert_same_function(model, images(2, 50).float(), exactly=True)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", [2, 2, 2, 2]), ("resnet34", [3, 4, 6, 3]), ("resnet50", [3, 4, 6, 3]),
     ("resnet101", [3, 4, 23, 3]), ("resnet152", [3, 8, 36, 3])],
)  # fmt: skip
def test_every_resnet_of_torchvision_is_recognised(name, blocks):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).state_dict()
        found = recognise({key: tuple(tensor.shape) for key, tensor in theirs.items()})
        ours = restore(found.architecture).state_dict()
    assert found.architecture["blocks"] == blocks and found.convention == "torchvision"
    assert found.architecture == restore({"name": name, "stem": "imagenet", "batch_norm": True, "bias": True,
                                          "num_classes": 1000}).architecture  # fmt: skip
    shapes = {found.renamed[key]: tensor.shape for key, tensor in theirs.items()}
    assert shapes == {key: ours[key].shape for key in shapes}
    assert all(found.original(new) == old for old, new in found.renamed.items())


@pytest.mark.parametrize("suffix", ["", "_bn"])
@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_the_stages_of_every_vgg_of_torchvision_are_recognised(name, suffix):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name + suffix).state_dict()
    found = recognise({key: tuple(tensor.shape) for key, tensor in theirs.items()})
    assert found.architecture["channels"] == [list(stage) for stage in PUBLISHED[name]["channels"]]
    assert found.architecture["dense"] == [4096, 4096, 1000] and found.architecture["batch_norm"] == bool(suffix)


def test_files_from_before_norms_counted_their_batches_are_read():
    model = foreign("resnet18")
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    conversion = convert(state)
    counters = [name for name in conversion.added if name.endswith("num_batches_tracked")]
    assert len(counters) == 20
    assert all(torch.equal(conversion.state[name], torch.tensor(0)) for name in counters)


# --- round trips ---

width = st.integers(1, 6)
flags = st.fixed_dictionaries({"bias": st.booleans(), "batch_norm": st.booleans(), "num_classes": width})
mlps = flags.flatmap(
    lambda common: st.fixed_dictionaries({"in_features": width, "hidden": st.lists(width, max_size=4)}).map(
        lambda own: {"name": "MLP", **common, **own, "batch_norm": common["batch_norm"] and bool(own["hidden"])}
    )
)
vggs = flags.flatmap(
    lambda common: st.fixed_dictionaries(
        {
            "channels": st.lists(st.lists(width, min_size=1, max_size=3), min_size=1, max_size=4),
            "in_channels": st.integers(1, 3),
        }
    ).map(lambda own: {"name": "VGG", **common, **own})
)


@st.composite
def resnets(draw):
    inner = draw(st.lists(st.lists(width, min_size=1, max_size=3), min_size=1, max_size=3))
    return {
        "name": "ResNet",
        **draw(flags),
        "blocks": [len(stage) for stage in inner],
        "width": [draw(width) for _ in inner],
        "block": draw(st.sampled_from(["basic", "bottleneck"])),
        "stem": draw(st.sampled_from(["cifar", "imagenet"])),
        "in_channels": draw(st.integers(1, 3)),
        "inner": draw(st.sampled_from([None, inner])),
        "stem_width": draw(st.none() | width),
    }


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.one_of(mlps, vggs, resnets()))
def test_ours_to_published_and_back_is_exact(architecture):
    network = build(architecture)
    before = copy.deepcopy(network.state_dict())
    again = convert(published_state(network))
    assert again.architecture == describe(network) and again.convention == "published" and not again.added
    assert list(again.state) == list(before)
    assert all(torch.equal(again.state[name], before[name]) for name in before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.one_of(mlps, vggs, resnets()), st.data())
def test_a_network_without_one_of_its_tensors_is_refused(architecture, data):
    state = published_state(build(architecture))
    optional = re.compile(r".*num_batches_tracked|((?!bn|.*\.bn|features).*)\.bias|features.*")
    name = data.draw(st.sampled_from([name for name in state if not optional.fullmatch(name)]))
    # Without its last stage, a network is just a smaller one; all else is a gap.
    if convertible({key: tensor for key, tensor in state.items() if key != name}):
        raise AssertionError(f"{name} was not missed")


def convertible(state) -> bool:
    try:
        convert(state)
    except FusionError:
        return False
    return True


def test_the_published_reference_comes_back_exactly():
    state = randomised(PlainResNet([2, 2], 4, 3, True, True)).state_dict()
    again = published_state(ours_of(state))
    assert list(again) == list(state) and all(torch.equal(again[name], state[name]) for name in state)


def test_dropout_is_not_in_a_state_dict():
    assert convert(build({"name": "MLP", "in_features": 4, "hidden": [3], "num_classes": 2, "dropout": 0.5})
                   .state_dict()).architecture["dropout"] == 0.0  # fmt: skip


def test_data_parallel_s_prefix_is_taken_off():
    state = published_state(build({"name": "vgg8", "channels": [[2], [3]]}))
    again = convert({f"module.{name}": tensor for name, tensor in state.items()})
    assert list(again.state) == list(state)


# --- refusals of state dicts ---


def mlp_state(**changes):
    state = PlainMLP([6, 5, 4, 3], True, True).state_dict()
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


def vgg_state(norm=False, **changes):
    state = PlainVGG([4, 5, "M", 6, "M"], 3, True, norm).state_dict()
    renamed = {name.replace("__", "."): tensor for name, tensor in {**state, **changes}.items()}
    return {name: tensor for name, tensor in renamed.items() if tensor is not None}


def resnet_state(**changes):
    state = PlainResNet([3, 1], 4, 3, False, True).state_dict()
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


def without(state, pattern):
    return {name: tensor for name, tensor in state.items() if not re.match(pattern, name)}


def moved(state, offset):
    """VGG with the norms of each convolution that many places later."""
    indices = {0: 0, 1: 1 + offset}
    return {re.sub(r"features\.(\d+)", lambda m: f"features.{indices[int(m[1])]}", name): tensor
            for name, tensor in state.items() if not re.match(r"features\.[2-9]", name)}  # fmt: skip


W = torch.ones
BAD_STATES = {
    "nothing": ({}, "got none; rename"),
    "another network": ({"encoder.weight": W(3, 3)}, r"got 'encoder\.weight' of shape \[3, 3\]; rename"),
    "an unknown name": (mlp_state(attention=W(3)), r"only parameters of a MLP, got 'attention'"),
    "a last norm": ({**mlp_state(), "bn3.weight": W(3)}, r"no 'bn3\.weight' in such a network"),
    "a gap": (without(mlp_state(), "(fc|bn)2"), r"'fc2\.weight', got none"),
    "a layer zero": ({"fc0.weight": W(3, 3)}, r"got 'fc0\.weight'"),
    "a missing norm": (without(mlp_state(), r"bn2\."), r"'bn2\.weight', got none"),
    "a norm without statistics": (without(mlp_state(), r".*running_var"), r"'bn1\.running_var', got none"),
    "widths": (mlp_state(**{"fc2.weight": W(4, 7)}), r"'fc2\.weight' of shape \[4, 5\].*got \[4, 7\]"),
    "dimensions": (mlp_state(**{"fc2.weight": W(4)}), r"'fc2\.weight' with 2 dimensions, got shape \[4\]"),
    "an empty layer": ({"fc1.weight": W(0, 3), "fc2.weight": W(2, 0)}, r"hidden\[0\] to be a whole number from 1"),
    "NaN": (mlp_state(**{"fc2.bias": W(4) * torch.nan}), r"finite numbers in 'fc2\.bias', got NaN"),
    "infinity": (mlp_state(**{"bn1.running_var": W(5) / 0}), r"finite numbers in 'bn1\.running_var'"),
    "integers": (mlp_state(**{"fc2.weight": W(4, 5).long()}), r"'fc2\.weight' of type torch.float32, got torch.int64"),
    "mixed types": (mlp_state(**{"fc2.weight": W(4, 5).half()}), r"of type torch.float32, got torch.float16"),
    "complex": ({"fc1.weight": W(4, 5).cfloat()}, r"torch.float32 or .*got torch.complex64"),
    "a real count": (mlp_state(**{"bn1.num_batches_tracked": W(())}), r"type torch.int64, got torch.float32"),
    "sparse": (mlp_state(**{"fc2.weight": W(4, 5).to_sparse()}), r"dense tensor 'fc2\.weight', got torch.sparse"),
    "repeated": (mlp_state(**{"fc2.weight": W(1, 1).expand(4, 5)}), r"every number of 'fc2\.weight' in the file"),
    "no tensor": (mlp_state(epoch=3), r"tensors by their names, got int at 'epoch'"),
    "nested": ({"state_dict": mlp_state()}, r"got dict at 'state_dict'; save only the state dict"),
    "no name": ({1: W(3)}, r"got Tensor at 1;"),
    "a missing convolution": (without(vgg_state(), r"features\.2"), r"\.2, or at 3 .*next at features\.5"),
    "a missing first one": (without(vgg_state(), r"features\.0"), r"features\.0\.weight, got none"),
    "a missing classifier": (without(vgg_state(), "classifier"), r"'classifier\.0\.weight', got none"),
    "a flattened image": (vgg_state(classifier__weight=W(3, 24)), r"6 inputs.*got 24: our VGG averages"),
    "a wide classifier": (vgg_state(classifier__weight=W(3, 7)), r"'classifier\.weight' of shape \[3, 6\]"),
    "a kernel": (vgg_state(features__2__weight=W(5, 4, 5, 5)), r"'features\.2\.weight' of shape \[5, 4, 3, 3\]"),
    "a norm after the ReLU": (moved(vgg_state(norm=True), 1), r"got features\.2 after features\.0; a norm elsewhere"),
    "no norm at the end": (without(vgg_state(norm=True), r"features\.8"), r"'features\.8\.weight', got none"),
    "a missing block": (without(resnet_state(), r"layer1\.1"), r"'layer1\.1\.conv1\.weight', got none"),
    "a missing stage": (without(resnet_state(), r"layer1\."), r"'layer1\.0\.conv1\.weight', got none"),
    "a missing head": (without(resnet_state(), "linear"), r"'linear\.weight', got none"),
    "no stem": (without(resnet_state(), "conv1"), r"'conv1\.weight', got none"),
    "no projection": (without(resnet_state(), r".*shortcut"), r"'layer2\.0\.shortcut\.0\.weight', got none"),
    "two conventions": (resnet_state(**{"fc.weight": W(3, 8)}), r"torchvision ResNet, got .*shortcut\.0\.weight"),
    "alexnet": ({"features.0.weight": W(4, 3, 11, 11), "classifier.1.bias": W(5)}, r"VGG, got 'classifier\.1\.bias'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STATES)
def test_other_state_dicts_are_refused(case):
    state, message = BAD_STATES[case]
    with pytest.raises(FusionError, match=message) as error:
        convert(state)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_torchvision_s_networks_that_shapes_do_not_tell_are_refused():
    grouped = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4)
    with pytest.raises(FusionError, match=r"'layer1.0.conv2.weight' of shape .* \(grouped convolutions"):
        convert(grouped.state_dict())
    small = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    small.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    with pytest.raises(FusionError, match="Expected a 7x7 stem"):
        convert(small.state_dict())
    with pytest.raises(FusionError, match=r"Expected 'layer2.0.downsample.1.weight', got none"):
        convert(without(foreign("resnet18").state_dict(), r"layer2.0.downsample.1"))


def test_networks_without_published_names_are_refused():
    with pytest.raises(FusionError, match="Expected an MLP, VGG or ResNet, got Sequential"):
        published_state(nn.Sequential(nn.Linear(3, 2)))


# --- files ---


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def run(*args) -> None:
    cli.main(["convert", *map(str, args)])


def converted(source, output, **more) -> None:
    """As `run`, without the time it takes to set up the command line."""
    convert_file(str(source), output, **more)


def refused_file(source, output="ours.ckpt", **more) -> str:
    """The error of a conversion; no file was written or changed."""
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    with pytest.raises(FusionError) as error:
        converted(source, output, **more)
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


def refused(capsys, *args) -> str:
    """The one line that the command line ends with; no file was written or changed."""
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before
    out, error = capsys.readouterr()
    assert re.fullmatch(r"clafusion: error: [^\n]+\n", error) and not out
    return error


def published_file(path, args=None, **changes):
    state = randomised(PlainMLP([64, 8, 10], True, True), dtype=torch.float32).state_dict()
    content = {"model_state_dict": state, "test_accuracy": 97.25, "epoch": 12, "args": args or {"lr": 0.1}}
    torch.save({**content, **changes}, path)
    return content


def test_a_published_file_becomes_an_ordinary_checkpoint_and_comes_back(capsys):
    content = published_file("theirs.pt")
    run("--input", "theirs.pt", "--output", "ours.ckpt")
    said = capsys.readouterr().out
    assert said == ("theirs.pt: by the published names, MLP(in_features=64, hidden=[8], num_classes=10, bias=True, "
                    "batch_norm=True), 626 parameters\nassumed: ReLU after every layer but the last, no dropout\n"
                    "wrote ours.ckpt\n")  # fmt: skip
    network = ImageClassifier.load_from_checkpoint("ours.ckpt").eval()
    reference = PlainMLP([64, 8, 10], True, True).eval()
    reference.load_state_dict(content["model_state_dict"])
    samples = images(4, 8, channels=1).float()
    with torch.no_grad():
        assert torch.equal(network(samples), reference(samples))
    run("--input", "ours.ckpt", "--output", "back.pth", "--to", "published")
    again = torch.load("back.pth", weights_only=True)
    state, expected = again.pop("model_state_dict"), content.pop("model_state_dict")
    assert again == content and list(again) == ["test_accuracy", "epoch", "args"]
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


def test_a_converted_checkpoint_is_tested_by_the_command_line(capsys):
    published_file("theirs.checkpoint")
    converted("theirs.checkpoint", "ours.ckpt")
    cli.main(["test", "--ckpt_path", "ours.ckpt", "--data", "DigitsDataModule", "--trainer.accelerator", "cpu",
              "--trainer.enable_progress_bar", "false"])  # fmt: skip
    assert "test_acc" in capsys.readouterr().out


def test_a_converted_network_as_safetensors():
    published_file("theirs.pt")
    converted("theirs.pt", "ours.safetensors")
    assert load_network("ours.safetensors").architecture["hidden"] == [8]
    converted("ours.safetensors", "back.pt", to="published")
    again = torch.load("back.pt", weights_only=True)
    assert again["test_accuracy"] is None and again["epoch"] is None
    assert again["args"]["architecture"]["name"] == "MLP"


def test_a_plain_state_dict_in_either_format():
    state = {name: tensor.float() for name, tensor in foreign("resnet18").state_dict().items()
             if not name.endswith("tracked")}  # fmt: skip
    torch.save(state, "theirs.pth")
    save_file(state, "theirs.safetensors")
    for source in ("theirs.pth", "theirs.safetensors"):
        converted(source, "ours.ckpt", overwrite=True)
        assert torch.equal(load_parent("ours.ckpt").linear.weight, state["fc.weight"])


def test_torchvision_s_vgg_becomes_a_checkpoint_of_its_operations():
    model = foreign("vgg11").float()
    torch.save(model.state_dict(), "theirs.pth")
    converted("theirs.pth", "ours.ckpt")
    network, samples = load_parent("ours.ckpt"), images(2, 72).float()
    with torch.no_grad():
        assert torch.equal(network(samples), model(samples))
    assert "Expected an MLP, VGG or ResNet, got" in refused_file("ours.ckpt", "back.pt", to="published")


def test_a_namespace_is_read_without_being_run(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    nested = argparse.Namespace(lr=0.1, widths=(1, 2), deeper=argparse.Namespace(device=torch.device("cpu")))
    published_file("theirs.pt", args=nested, test_accuracy=torch.tensor(91.5))
    converted("theirs.pt", "ours.ckpt")
    remarks = {"test_accuracy": 91.5, "epoch": 12, "args": {"lr": 0.1, "widths": (1, 2), "deeper": {"device": "cpu"}}}
    assert read_checkpoint("ours.ckpt")["published"] == remarks
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("setting", ["0", "1"])
def test_no_code_of_a_file_is_run(monkeypatch, capsys, setting):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", setting)
    for args in (Evil(), argparse.Namespace(evil=Evil())):
        published_file("theirs.pt", args=args)
        error = refused(capsys, "--input", "theirs.pt", "--output", "ours.ckpt")
        assert "got pickled objects, which were not run" in error
    torch.save(Evil(), "whole.pt")
    refused(capsys, "--input", "whole.pt", "--output", "ours.ckpt")
    assert not Path("evil").exists()


def test_ours_in_another_file_format_keeps_how_it_was_fused(mlp_checkpoints):
    converted(mlp_checkpoints[0], "deep.safetensors")
    converted(mlp_checkpoints[0], "deep.pt", to="published")
    assert torch.load("deep.pt", weights_only=True)["epoch"] == 0
    expected = load_parent(mlp_checkpoints[0]).state_dict()
    for file in ("deep.safetensors", "deep.pt"):
        converted(file, "again.ckpt", overwrite=True)
        again = load_parent("again.ckpt").state_dict()
        assert all(torch.equal(again[name], expected[name]) for name in expected)
    checkpoint = torch.load("again.ckpt", weights_only=True)
    torch.save({**checkpoint, "fusion": {"seed": 3}}, "fused.ckpt")
    converted("fused.ckpt", "copy.ckpt")
    assert read_checkpoint("copy.ckpt")["fusion"] == {"seed": 3}


def test_layers_that_share_memory_in_a_file_are_independent_afterwards():
    shared = torch.ones(4, 4)
    torch.save({"fc1.weight": shared, "fc2.weight": shared}, "tied.pt")
    converted("tied.pt", "ours.ckpt")
    network = load_parent("ours.ckpt")
    assert network.fc1.weight.data_ptr() != network.fc2.weight.data_ptr()


def test_existing_outputs_are_replaced_only_on_demand(capsys):
    published_file("theirs.pt")
    Path("ours.ckpt").write_text("precious")
    error = refused(capsys, "--input", "theirs.pt", "--output", "ours.ckpt")
    assert "got ours.ckpt, which exists; give --overwrite" in error
    run("--input", "theirs.pt", "--output", "ours.ckpt", "--overwrite")
    assert load_parent("ours.ckpt").architecture["hidden"] == [8]


def bad_files() -> None:
    """Files that cannot be used, in the working directory."""
    published_file("good.pt")
    content = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(content[: len(content) // 2])
    Path("text.pth").write_text("not a checkpoint")
    Path("empty.pt").write_bytes(b"")
    Path("text.safetensors").write_text("{")
    Path("good.npz").write_bytes(content)
    torch.save([1, 2], "list.pt")
    published_file("number.pt", model_state_dict=3)
    published_file("gap.pt", model_state_dict={"fc2.weight": torch.ones(2, 2)})
    torch.save({"state_dict": {}, "hyper_parameters": {}}, "lightning.ckpt")
    loop: dict = {}
    published_file("loop.pt", args=loop | {"itself": loop})
    loop["again"] = loop
    published_file("loop.pt", args=loop)


BAD_FILES = {
    "missing.pt": "Expected a checkpoint, got missing.pt, which is no file",
    "https://example.org/net.pt": "Expected a local file, got the address https://example.org/net.pt; download it",
    "cut.pt": "got cut.pt, which is truncated or damaged",
    "text.pth": "got text.pth, which is truncated or damaged",
    "empty.pt": "got empty.pt, which is truncated or damaged",
    "text.safetensors": "Expected safetensors, got text.safetensors, which is truncated or damaged",
    "good.npz": "Expected a file named NAME.ckpt or .*, got good.npz; rename it",
    "list.pt": "got list.pt with a list",
    "number.pt": "Expected model_state_dict in number.pt to be a dict, got int",
    "gap.pt": r"Expected 'fc1.weight', got none; .* \(in gap.pt\)",
    "lightning.ckpt": "Expected tensors by their names, got dict at 'state_dict'; save only the state dict",
    "loop.pt": "Expected only tensors and plain values in loop.pt, got containers in containers without end",
}


def test_other_files_are_refused():
    bad_files()
    for file, message in BAD_FILES.items():
        assert re.search(message, refused_file(file)), file


@pytest.mark.parametrize("file", ["cut.pt", "https://example.org/net.pt"])
def test_the_command_line_ends_with_one_line(capsys, file):
    bad_files()
    error = refused(capsys, "--input", file, "--output", "ours.ckpt")
    assert re.search(BAD_FILES[file], error)


def test_other_formats_are_refused_by_the_command_line(capsys):
    published_file("good.pt")
    error = refused(capsys, "--input", "good.pt", "--output", "ours.ckpt", "--to", "theirs")
    assert "'published'" in error


def test_other_outputs_are_refused():
    published_file("good.pt")
    Path("folder.ckpt").mkdir()
    for output, to, message in (
        ("ours.pt", "ours", "named NAME.ckpt or NAME.safetensors, got ours.pt"),
        ("theirs.safetensors", "published", "got theirs.safetensors; change --output"),
        ("none/ours.ckpt", "ours", "Expected a folder that can be written, got none"),
        ("folder.ckpt", "ours", "got folder.ckpt, which exists"),
        ("s3://bucket/ours.ckpt", "ours", "Expected a local output file"),
    ):
        assert message in refused_file("good.pt", output, to=to, overwrite=True)


def test_the_network_in_another_lightning_module_is_found():
    network = torchvision.models.resnet18(num_classes=5)
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 3, "global_step": 9}, "theirs.ckpt")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, "parallel.pt")
    for name in ("theirs.ckpt", "parallel.pt"):
        cli.main(["convert", name, "ours.ckpt", "--overwrite"])
        assert torch.equal(load_parent("ours.ckpt")(images(2, 32).float()), network.eval()(images(2, 32).float()))


def mlp_of(seed: int) -> dict[str, torch.Tensor]:
    return {name: one.float() for name, one in mlp([5, 4], seed, bias=True).state_dict().items()}


def below(prefix: str, state) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


COUNT, LOSS = {"n_averaged": torch.tensor(4)}, {"loss.weight": torch.ones(4)}
#: What a file holds, and what is said about it.
WRAPPED = {
    "model": ({"model": mlp_of(0), "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, "under 'model'"),
    "net": ({"net": below("module", mlp_of(0)), "acc": 91.5}, "under 'net'\nassumed: names lose 'module.'"),
    "state_dict": ({"state_dict": below("model", mlp_of(0)) | LOSS}, "left out 'loss'\nassumed: names lose 'model.'"),
    "an average": (COUNT | below("module", mlp_of(0)), "left out 'n_averaged'\nassumed: names lose 'module.'"),
    "an average's": ({"model": COUNT | below("module", mlp_of(0))}, "'model'\nassumed: left out 'n_averaged'"),
    "a loss": (mlp_of(0) | LOSS, "left out 'loss'"),
    "other tensors": ({"model": mlp_of(0), "rng": {"cpu": torch.ones(9)}, "best": torch.tensor(1.0)}, "under 'model'"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_weights_are_found_below_what_wraps_them(case, capsys):
    content, said = WRAPPED[case]
    torch.save(content, "theirs.pt")
    converted("theirs.pt", "ours.ckpt")
    assert f"{said}\n" in capsys.readouterr().out
    assert torch.equal(load_parent("ours.ckpt").fc2.weight, mlp_of(0)["fc2.weight"])


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model": mlp_of(0), "model_ema": below("module", mlp_of(1)) | COUNT}, ("model", "model_ema")),
        ({"state_dict": mlp_of(0), "state_dict_ema": mlp_of(1)}, ("state_dict", "state_dict_ema")),
        ({"state_dict": below("net", mlp_of(0)) | below("ema_net", mlp_of(1))}, ("net", "ema_net")),
    ],
)
def test_of_several_networks_one_is_chosen(content, names):
    torch.save(content, "theirs.pt")
    assert f"Expected one network, got {', '.join(names)}; choose by --weights" in refused_file("theirs.pt")
    assert "none called other; choose by" in refused_file("theirs.pt", weights="other")
    for seed, name in enumerate(names):
        converted("theirs.pt", "ours.ckpt", weights=name, overwrite=True)
        assert torch.equal(load_parent("ours.ckpt").fc2.weight, mlp_of(seed)["fc2.weight"])


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_back_to_torchvision_with_the_same_outputs(name):
    theirs = foreign(name).float()
    torch.save(theirs.state_dict(), "theirs.pth")
    converted("theirs.pth", "ours.ckpt")
    converted("ours.ckpt", "back.pth", to="torchvision")
    again, samples = copy.deepcopy(theirs), images(2, 64).float()
    again.load_state_dict(torch.load("back.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(samples), theirs(samples))


def test_biases_that_torchvision_does_not_have_go_into_the_norms():
    network = resnet([1, 1, 1, 1], width=[64, 128, 256, 512], stem="imagenet", bias=True, batch_norm=True)
    state = torchvision_state(network)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    assert not any(name.endswith("bias") and "conv" in name for name in state)
    assert state.keys() == theirs.state_dict().keys()
    assert_same_function_as(convert(state), network)


def assert_same_function_as(conversion, network) -> None:
    again = restore(conversion.architecture).double().eval()
    again.load_state_dict(conversion.state)
    samples = images(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(samples), network(samples))


def test_what_torchvision_does_not_have_is_refused(mlp_checkpoints):
    message = (
        "Expected a ResNet with norms and a 7x7 stem or a VGG with three dense layers, as torchvision has them, got "
    )
    assert f"{message}MLP of" in refused_file(mlp_checkpoints[0], "back.pth", to="torchvision")
    with pytest.raises(FusionError, match=f"{message}ResNet of"):
        torchvision_state(resnet([1, 1]))
