"""Networks as data and as files: everything comes back as it was, and nothing forged gets in."""

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
    assert describe(network)["name"] == "graph"
    activated: Any = networks.build(OWN[1]).eval()
    activated.features[2] = nn.GELU()
    save_network(activated, tmp_path / "net")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_network(tmp_path / "net")(x), activated(x))


def test_shared_tensors_are_stored(tmp_path: Path) -> None:
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.ReLU(), shared).eval()
    save_network(network, tmp_path / "net")
    x = torch.randn(2, 3)
    assert torch.equal(load_network(tmp_path / "net")(x), network(x))


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
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Controlled(), "torch.fx can trace, got Controlled"),
        (Calls(lambda x: F.dropout(x)), "'dropout' at node 'dropout'; use nn.Dropout"),
        (Calls(lambda x: F.dropout2d(x)), "'dropout2d' at node 'dropout2d'; use nn.Dropout2d"),
        (Calls(lambda x: torch.cat([x, x])), "call_function 'cat' at node 'cat'"),
        (Calls(lambda x: x.permute(1, 0)), "call_method 'permute' at node 'permute'"),
        (Calls(lambda x: x.view(torch.int32)), "plain numbers and flags as arguments, got torch.int32"),
        (Calls(lambda x: x.real), "plain numbers and flags as arguments, got 'real'"),
        (Scaled(), "get_attr 'scale' at node 'scale'"),
        (nn.Sequential(nn.Softmax(1)), "got Softmax at '0'"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "got ParametrizedLinear at '0'"),
        (nn.ModuleDict({"code": nn.Linear(2, 2)}), "trace, got ModuleDict"),
    ],
)
def test_networks_that_cannot_be_stored_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(FusionError, match=message) as caught:
        describe(network)
    assert "\n" not in str(caught.value)


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
        architecture["modules"]["head"]["out_features"] = 2**40

    rewrite(path, enlarge)
    with pytest.raises(FusionError, match=r"'head.\w+' of shape \[1099511627776"):
        load_network(path)


EVIL = "__import__('pathlib').Path('OWNED').touch()"


def node(architecture: dict[str, Any], op: str) -> dict[str, Any]:
    return next(entry for entry in architecture["nodes"] if entry["op"] == op)


@pytest.mark.parametrize(
    "forge",
    [
        lambda a: node(a, "call_module").update(name=EVIL),
        lambda a: node(a, "call_module").update(name="self"),
        lambda a: node(a, "call_module").update(name="torch"),
        lambda a: node(a, "call_module").update(name="ｘ"),
        lambda a: node(a, "call_module").update(name="lambda"),
        lambda a: node(a, "call_module").update(target=EVIL),
        lambda a: node(a, "call_module").update(target="forward"),
        lambda a: node(a, "call_method").update(target=EVIL),
        lambda a: node(a, "call_method").update(target="__class__"),
        lambda a: node(a, "call_method").update(args=[{"node": EVIL}]),
        lambda a: node(a, "call_method")["args"].append(EVIL),
        lambda a: node(a, "call_method").update(kwargs={EVIL: 1}),
        lambda a: node(a, "call_function").update(target="os.system"),
        lambda a: node(a, "call_function").update(target="builtins.eval"),
        lambda a: node(a, "call_function").update(target=["os", "system"]),
        lambda a: node(a, "call_function").update(target="builtins.getattr", args=[{"node": "conv"}, "__class__"]),
        lambda a: node(a, "call_function").update(target="builtins.getattr", args=[{"node": "conv"}, "tanh"]),
        lambda a: node(a, "placeholder").update(target=f"x={EVIL}"),
        lambda a: node(a, "placeholder").update(target="*x"),
        lambda a: node(a, "placeholder").update(target="lambda"),
        lambda a: node(a, "placeholder").update(target="self"),
        lambda a: node(a, "placeholder").update(args=[EVIL]),
        lambda a: node(a, "placeholder").update(op="get_attr", target="conv.weight"),
        lambda a: node(a, "output").update(op=EVIL),
        lambda a: node(a, "output").update(args=[{"exec": EVIL}]),
        lambda a: a["modules"].update({EVIL: {"type": "ReLU", "inplace": False}}),
        lambda a: a["modules"].update({"__class__": {"type": "ReLU", "inplace": False}}),
        lambda a: a["modules"]["act"].update(type="os.system"),
        lambda a: a["modules"]["act"].update(negative_slope=EVIL),
        lambda a: a["modules"]["act"].update(extra=1),
        lambda a: a["modules"]["conv"].update(groups=0),
        lambda a: a["modules"]["conv"].update(kernel_size=float("nan")),
        lambda a: a["nodes"].pop(),
        lambda a: a["nodes"].reverse(),
        lambda a: a["nodes"].insert(1, a["nodes"][1]),
        lambda a: a["nodes"].extend([a["nodes"][0]] * 30_000),
        lambda a: a.update(nodes=None),
        lambda a: a.update(nodes=[3]),
        lambda a: a.pop("modules"),
    ],
)
def test_forged_graphs_are_refused(
    forge: Callable[[dict[str, Any]], Any], foreign: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    save_network(foreign, "net")

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
