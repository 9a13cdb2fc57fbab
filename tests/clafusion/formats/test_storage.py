"""Networks as data and as files: everything comes back as it was, and nothing forged gets in."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

from clafusion import networks
from clafusion.errors import FusionError
from clafusion.formats.files import describe, load_network, restore, save_network
from clafusion.formats.graph_json import check_storable
from clafusion.tracing.exporting import export_graph

OWN: list[dict[str, Any]] = [
    {"name": "MLP", "in_features": 64, "hidden": [9], "num_classes": 3, "bias": True, "dropout": 0.5},
    {"name": "VGG", "channels": [[4], [5, 6]], "in_channels": 1, "batch_norm": True},
    {"name": "ResNet", "blocks": [1, 2], "width": 4, "in_channels": 1, "batch_norm": True},
]
TORCHVISION = [models.resnet18, models.vgg11_bn, models.mobilenet_v2, models.alexnet]


class Foreign(nn.Module):
    """Functions and methods where the others have modules, and a module that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.conv = nn.Conv2d(1, 4, (3, 1), padding="same", bias=False)
        self.head = nn.Linear(16, 3)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, input: Tensor) -> Tensor:
        x = F.max_pool2d(self.act(self.conv(input)), 2)
        x = x + F.avg_pool2d(x, 1)
        x = F.adaptive_avg_pool2d(x.relu(), (2, 2))
        return self.head(x.view(x.size(0), -1).reshape(x.shape[0], -1))


@pytest.fixture
def foreign() -> nn.Module:
    torch.manual_seed(0)
    return Foreign().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a foreign network."""
    path = tmp_path_factory.mktemp("saved") / "net"
    save_network(Foreign().eval(), path)
    return path.read_bytes()


def narrow(make: Callable[..., nn.Module]) -> nn.Module:
    """A torchvision network without the 100 million weights of its dense layers."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network: Any = make(num_classes=5)
        width = None
        for index, layer in enumerate(network.classifier if hasattr(network, "classifier") else []):
            if isinstance(layer, nn.Linear):
                network.classifier[index] = nn.Linear(width or layer.in_features, 8)
                width = 8
    network.to_empty(device="cpu")
    for layer in network.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return network.eval()


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], **tensors: Tensor) -> None:
    """Forge a file: its architecture changed by `change`, tensors added or replaced."""
    contents = load_file(path)
    architecture = describe(load_network(path))
    changed = change(architecture) or architecture
    metadata = {"format": "clafusion", "version": "1", "architecture": json.dumps(changed)}
    save_file({**contents, **tensors}, path, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", OWN)
def test_own_networks_round_trip(architecture: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = networks.build(architecture).to(dtype).eval()
    save_network(network, tmp_path / "net.safetensors")
    loaded = load_network(tmp_path / "net.safetensors")
    assert type(loaded) is type(network)
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert describe(loaded) == describe(network) == network.architecture
    x = torch.randn(2, 1, 8, 8, dtype=dtype)
    assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("make", TORCHVISION, ids=lambda make: make.__name__)
def test_torchvision_networks_round_trip(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    network = narrow(make)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_network(network, tmp_path / "net.safetensors")
    loaded = load_network(tmp_path / "net.safetensors")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), network(x))
    assert list(loaded.state_dict()) == list(network.state_dict())
    names = [name for name, _ in network.named_parameters()]
    assert [name for name, _ in loaded.named_parameters()] == names  # the order optimiser states go by
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_describe_is_json_and_stable(foreign: nn.Module) -> None:
    state = torch.get_rng_state()
    described = describe(foreign)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    again = restore(described)
    assert describe(again) == described
    assert list(again.state_dict()) == list(foreign.state_dict())
    again.load_state_dict(foreign.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), foreign(x))


def test_a_resized_foreign_network_describes_its_new_sizes(foreign: Any) -> None:
    foreign.conv.weight = nn.Parameter(torch.randn(6, 1, 3, 1))
    foreign.conv.bias = nn.Parameter(torch.randn(6))
    foreign.head.weight = nn.Parameter(torch.randn(3, 24))
    again = restore(describe(foreign))
    again.load_state_dict(foreign.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), foreign(x))


def test_an_own_network_changed_by_hand_is_stored_as_its_graph(tmp_path: Path) -> None:
    network: Any = networks.build(OWN[0]).eval()
    network.fc1.bias = None
    assert describe(network)["name"] == "aten"
    activated: Any = networks.build(OWN[1]).eval()
    activated.features[2] = nn.GELU()
    save_network(activated, tmp_path / "net")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_network(tmp_path / "net")(x), activated(x))


def test_a_tied_tensor_is_one_again(tmp_path: Path) -> None:
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.ReLU(), shared).eval()
    save_network(network, tmp_path / "net")
    loaded: Any = load_network(tmp_path / "net")
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), network(x))
    again: Any = restore(describe(loaded))
    again.load_state_dict({name: tensor.clone() for name, tensor in loaded.state_dict().items()}, assign=True)
    for one in (loaded, again, copy.deepcopy(loaded)):
        assert list(one.state_dict()) == list(network.state_dict())
        assert one.get_parameter("0.weight") is one.get_parameter("2.weight")
        assert len(list(one.parameters())) == 2


def test_saving_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "net"
    for width in (3, 5):
        save_network(networks.MLP(4, [width], 2), path)
    assert describe(load_network(path))["hidden"] == [5]
    with pytest.raises(FusionError):
        save_network(nn.Sequential(nn.Softmax(1)), path)
    assert describe(load_network(path))["hidden"] == [5]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/net", "folder", "file/net", "a" * 300])
def test_unwritable_paths(where: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FusionError, match=r"Expected to write .* choose a writable path") as caught:
        save_network(networks.MLP(4, [3], 2), tmp_path / where)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


class Controlled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.function, self.fc = function, nn.Linear(4, 4)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


@torch.library.custom_op("clafusion_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Calls(lambda x: x + torch.zeros(len(x), 4)), "any number of samples, got Calls, whose graph would hold for 3"),
        (Controlled(), "torch.export can capture, got Controlled"),
        (
            Calls(lambda x: doubled(x)),
            "got clafusion_tests.doubled.default in the network, which PyTorch does not have elsewhere",
        ),
        (
            Calls(lambda x: x.as_strided((x.shape[0], 4), (4, 1))),
            "got aten.as_strided.default in the network, which is not",
        ),
        (nn.Sequential(nn.Linear(4, 4), Calls(torch.erfinv)), "got aten.erfinv.default in 1, which is not among those"),
        (
            Calls(torch.relu, phase=torch.zeros(2, dtype=torch.complex64)),
            "Expected tensors of .*, got complex64 in phase",
        ),
        (nn.ModuleDict({"code": nn.Linear(2, 2)}), "torch.export can capture, got ModuleDict"),
    ],
)
def test_networks_that_cannot_be_stored_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(FusionError, match=message) as caught:
        describe(network.eval(), torch.randn(2, 4))
    assert "\n" not in str(caught.value)


def test_a_capture_is_refused_before_anything_is_computed() -> None:
    check_storable(export_graph(nn.Linear(4, 4).eval(), torch.randn(2, 4)))
    with pytest.raises(FusionError, match=r"got aten.erfinv.default in the network"):
        check_storable(export_graph(Calls(torch.erfinv).eval(), torch.randn(2, 4)))


class Sized(nn.Module):
    """Computes by the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * x.shape[-1]


def test_a_network_without_an_example_is_refused_if_the_size_would_be_guessed_wrong() -> None:
    with pytest.raises(FusionError, match="something else for every size of images, got none; pass example="):
        describe(Sized().eval())
    with pytest.raises(FusionError, match="Expected Softmax to say which samples it takes"):
        describe(nn.Softmax(1))
    assert describe(Sized().eval(), torch.randn(1, 1, 9, 9))["input"] == [1, 9, 9]


@pytest.mark.parametrize("carried", ["clafusion_input", "default_cfg", "config"])
def test_the_shape_that_a_network_declares_is_taken(carried: str) -> None:
    network: Any = Sized().eval()
    declared = {"clafusion_input": [1, 9, 9], "default_cfg": {"input_size": (1, 9, 9)}, "config": None}[carried]
    setattr(network, carried, declared or type("Config", (), {"image_size": 9})())
    assert describe(network)["input"] == [1, 9, 9]


@pytest.mark.parametrize("name", ["forward", "state_dict", "_modules", "_steps", "", "a..b", "." * 5, "a." * 100 + "b"])
def test_tensor_names_that_hide_something_are_refused(name: str) -> None:
    described = describe(nn.Linear(2, 2).eval())
    with pytest.raises(FusionError, match=r"Expected a (dotted )?name"):
        restore({**described, "tensors": [*described["tensors"], [name, "buffer", [1], "float"]]})


@pytest.mark.parametrize("name", ["code", "forward", "state_dict", "_modules"])
def test_module_names_that_hide_something_are_refused(name: str) -> None:
    architecture = {"name": "graph", "nodes": [], "modules": {name: {"type": "ReLU", "inplace": False}}}
    with pytest.raises(FusionError, match="Expected a plain dotted module name"):
        restore(architecture)


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "net"
    with pytest.raises(FusionError, match="no such file; check the path"):
        load_network(path)
    save_network(networks.MLP(4, [3], 2), path)
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FusionError, match="Expected a safetensors file"):
            load_network(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(FusionError, match="Expected a safetensors file"):
        load_network(path)
    with pytest.raises(FusionError, match="Expected a safetensors file"):
        load_network(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "Expected a file written by save_network"),
        ({"format": "pt"}, "Expected a file written by save_network"),
        ({"format": "clafusion", "version": "2", "architecture": "{}"}, "Expected a file written by save_network"),
        ({"format": "clafusion", "version": "1"}, "Expected a file written by save_network"),
        ({"format": "clafusion", "version": "1", "architecture": "{"}, "Expected JSON metadata"),
        ({"format": "clafusion", "version": "1", "architecture": "[" * 100_000}, "Expected JSON metadata"),
        ({"format": "clafusion", "version": "1", "architecture": "[]"}, 'an architecture with a "name"'),
    ],
)
def test_foreign_metadata(metadata: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "net", metadata=metadata)
    with pytest.raises(FusionError, match=message):
        load_network(tmp_path / "net")


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (lambda a: {**a, "hidden": [2**24] * 50}, {}, r"Expected a tensor 'fc10.weight' in .*, got none"),
        (lambda a: {**a, "hidden": [2**24]}, {}, r"'fc1.weight' of shape \[16777216, 4\], got \[3, 4\]"),
        (lambda a: {**a, "hidden": [2**60]}, {}, r"hidden\[0\] to be a whole number"),
        (lambda a: {**a, "bias": True}, {}, "Expected a tensor 'fc1.bias' in .*, got none"),
        (lambda a: None, {"extra": torch.ones(1)}, "Expected no tensor 'extra' in .*, got one"),
        (lambda a: None, {"fc2.weight": torch.ones(2, 4)}, r"'fc2.weight' of shape \[2, 3\], got \[2, 4\]"),
        (lambda a: None, {"fc2.weight": torch.ones(2, 3, dtype=torch.int64)}, "of type torch.float32, got torch.int64"),
    ],
)
def test_architectures_that_do_not_fit_their_tensors(
    change: Callable[[dict[str, Any]], Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    """Sizes of terabytes are refused at once: nothing is allocated before the real tensors agree."""
    path = tmp_path / "net"
    save_network(networks.MLP(4, [3], 2), path)
    rewrite(path, change, **tensors)
    with pytest.raises(FusionError, match=message):
        load_network(path)


def test_a_huge_foreign_architecture_allocates_nothing(foreign: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net"
    save_network(foreign, path)

    def enlarge(architecture: dict[str, Any]) -> None:
        tensor_named(architecture, "head.weight")[2] = [2**30, 2**20]

    rewrite(path, enlarge)
    with pytest.raises(FusionError, match=r"'head.weight' of shape \[1073741824, 1048576"):
        load_network(path)


LINEAR = "aten.linear.default"
EVIL = "__import__('pathlib').Path('OWNED').touch()"


def call(architecture: dict[str, Any], operation: str) -> list[Any]:
    """The first call of an operation: its name, arguments and options."""
    return next(entry for entry in architecture["nodes"] if entry[0] == operation)


def tensor_named(architecture: dict[str, Any], name: str) -> list[Any]:
    return next(entry for entry in architecture["tensors"] if entry[0] == name)


ZEROS = ["aten.zeros.default", [[2**20, 2**20]], {}]


@pytest.mark.parametrize(
    "forge",
    [
        lambda a: call(a, LINEAR).__setitem__(0, EVIL),
        lambda a: call(a, LINEAR).__setitem__(0, "os.system"),
        lambda a: call(a, LINEAR).__setitem__(0, ["os", "system"]),
        lambda a: call(a, LINEAR).__setitem__(0, "aten.from_file.default"),
        lambda a: call(a, LINEAR).__setitem__(0, "aten.set_.source_Tensor"),
        lambda a: call(a, LINEAR).__setitem__(0, "aten.linear.out"),
        lambda a: call(a, LINEAR).__setitem__(0, "aten.linear"),
        lambda a: call(a, LINEAR).__setitem__(0, "prim.linear.default"),
        lambda a: call(a, LINEAR)[1].append(EVIL),
        lambda a: call(a, LINEAR)[1].append(1),
        lambda a: call(a, LINEAR)[1].clear(),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"node": 10_000}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"node": -1}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"node": True}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"node": len(a["nodes"]) - 1}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"tensor": "__class__"}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"exec": EVIL}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {"tensor": ["head.weight"]}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, {}),
        lambda a: call(a, LINEAR)[1].__setitem__(0, "tanh"),
        lambda a: call(a, LINEAR)[1].__setitem__(0, [[[[[[[[]]]]]]]]),
        lambda a: call(a, LINEAR)[2].update({EVIL: 1}),
        lambda a: call(a, LINEAR)[2].update(input={"node": 0}),
        lambda a: call(a, LINEAR).append(1),
        lambda a: call(a, "aten.leaky_relu.default")[1].__setitem__(1, 2**70),
        lambda a: call(a, "aten.leaky_relu.default")[1].__setitem__(1, float("nan")),
        lambda a: call(a, "aten.leaky_relu.default")[1].__setitem__(1, {"number": "nine"}),
        lambda a: call(a, "aten.leaky_relu.default")[1].__setitem__(1, {"dtype": "float"}),
        lambda a: a["nodes"].append(ZEROS),
        lambda a: a["nodes"].append(["aten.zeros.default", [[3]], {"layout": 1}]),
        lambda a: a["nodes"].append(["aten.zeros.default", [[3]], {"dtype": {"dtype": "os"}}]),
        lambda a: a["nodes"].append(["aten.arange.default", [2**40], {}]),
        lambda a: a["nodes"].append(["getitem", [{"input": 0}, 0], {}]),
        lambda a: a["nodes"].append(["mul", [[1], 10**9], {}]),
        lambda a: a["nodes"].append(["mul", [3], {}]),
        lambda a: a["nodes"].append([["mul"], [3, 3], {}]),
        lambda a: a["nodes"].append("mul"),
        lambda a: a["nodes"].clear(),
        lambda a: a["nodes"].reverse(),
        lambda a: a["nodes"].extend([a["nodes"][0]] * 30_000),
        lambda a: a.update(nodes=None),
        lambda a: a.update(nodes=[3]),
        lambda a: a.update(logits=None),
        lambda a: a.update(logits=[{"node": 0}]),
        lambda a: a.update(logits={"dtype": "float"}),
        lambda a: a.update(version=2),
        lambda a: a.update(extra=1),
        lambda a: a.update(input=[-1]),
        lambda a: a.update(input="[1]"),
        lambda a: a.pop("tensors"),
        lambda a: a["tensors"].append(a["tensors"][0]),
        lambda a: a["tensors"].append(3),
        lambda a: a["tensors"].append([EVIL, "buffer", [1], "float"]),
        lambda a: a["tensors"].append(["x", "same", "y"]),
        lambda a: a["tensors"].append(["__class__", "buffer", [1], "float"]),
        lambda a: a["tensors"].append(["head.weight.x", "buffer", [1], "float"]),
        lambda a: a["tensors"].extend([f"x{i}", "buffer", [], "float"] for i in range(30_000)),
        lambda a: a["tensors"][0].__setitem__(1, "module"),
        lambda a: a["tensors"][0].__setitem__(2, [2**31 - 1] * 16),
        lambda a: a["tensors"][0].__setitem__(2, [1] * 10_000),
        lambda a: a["tensors"][0].__setitem__(2, 1),
        lambda a: a["tensors"][0].__setitem__(3, "object"),
        lambda a: a["tensors"][0].__setitem__(3, ["float"]),
    ],
)
def test_forged_graphs_are_refused(
    forge: Callable[[dict[str, Any]], Any], saved: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net").write_bytes(saved)

    def change(architecture: dict[str, Any]) -> None:
        forge(architecture)

    rewrite(Path("net"), change)
    with pytest.raises(FusionError) as caught:
        load_network("net")
    assert "\n" not in str(caught.value)
    assert not Path("OWNED").exists()


def test_damaged_headers_never_escape_as_other_errors(foreign: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net"
    save_network(foreign, path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    choose = torch.Generator().manual_seed(0)
    for _ in range(200):
        place = 8 + int(torch.randint(header, (), generator=choose))
        letter = b'0159abcz"{}[]:,. '[int(torch.randint(17, (), generator=choose))]
        path.write_bytes(whole[:place] + bytes([letter]) + whole[place + 1 :])
        try:
            assert isinstance(load_network(path), nn.Module)
        except FusionError as error:
            assert "\n" not in str(error)
