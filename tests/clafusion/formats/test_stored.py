"""Networks of other libraries as stored graphs: they compute, train and are copied like the networks themselves."""

import copy
import importlib.util
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from clafusion import FusionError, describe, load_network, restore, save_network
from clafusion.formats.files import captured, snapshot
from clafusion.formats.stored import StoredNetwork
from clafusion.formats.stored_operations import OPERATIONS, TRAINING, overload_of
from clafusion.tracing.outputs import logits_in
from tests.helpers import REFERENCE, large

HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}
HF = {**HF, "patch_size": 8, "num_labels": 7}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def torchvision_network(name: str, **options: Any) -> nn.Module:
    if name == "vit":
        return models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=7, dropout=0.2)
    if name == "swin":
        return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=7)
    if name == "maxvit":
        return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=7)
    made: nn.Module = getattr(models, name)(num_classes=7, **options)
    return made


def timm_network(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model(name, num_classes=7, **options)
    return made


def transformers_network(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    made: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return made


TORCHVISION: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 32),
    "densenet121": ({}, 32),
    "efficientnet_b0": ({"stochastic_depth_prob": 0.0}, 32),
    "mobilenet_v3_small": ({}, 32),
    "shufflenet_v2_x0_5": ({}, 32),
    "squeezenet1_1": ({}, 32),
    "regnet_y_400mf": ({}, 32),
    "googlenet": ({"aux_logits": False, "init_weights": False}, 64),
    "vit": ({}, 32),
    "swin": ({}, 32),
    "maxvit": ({}, 64),
}
TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (VIT, 32),
    "deit_tiny_distilled_patch16_224": (VIT, 32),
    "beit_base_patch16_224": (VIT, 32),
    "cait_xxs24_224": (VIT, 32),
    "eva02_tiny_patch14_224": ({**VIT, "img_size": 28, "patch_size": 14}, 28),
    "convnext_atto": ({}, 32),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "resnetv2_50x1_bit": ({}, 32),
    "mobileone_s0": ({}, 32),
    "ghostnet_050": ({}, 32),
    "seresnet18": ({}, 32),
}
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "ViT": (HF, 32),
    "DeiT": (HF, 32),
    "Dinov2": ({name: value for name, value in HF.items() if name != "intermediate_size"}, 32),
    "Beit": ({**HF, "use_relative_position_bias": True, "use_mask_token": False, "drop_path_rate": 0.0}, 32),
    "ConvNext": ({"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_labels": 7}, 64),
    "Swin": (
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "drop_path_rate": 0.0, "num_labels": 7}, 32
    ),
    "ResNet": ({"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_labels": 7}, 32),
}  # fmt: skip
MAKERS: dict[str, tuple[Callable[..., nn.Module], dict[str, tuple[dict[str, Any], int]]]] = {
    "torchvision": (torchvision_network, TORCHVISION),
    "timm": (timm_network, TIMM),
    "transformers": (transformers_network, TRANSFORMERS),
}
#: An export takes seconds for each of these.
SLOW = frozenset(
    (
        "densenet121",
        "efficientnet_b0",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "regnet_y_400mf",
        "googlenet",
        "maxvit",
    )
    + ("cait_xxs24_224", "convnext_atto", "resnetv2_50x1_bit", "mobileone_s0", "ghostnet_050", "seresnet18", "ResNet")
)
ZOO = [
    pytest.param(library, name, marks=[pytest.mark.slow, large] if name in SLOW else [])
    for library, (_, table) in MAKERS.items()
    for name in table
]


def made(library: str, name: str) -> tuple[nn.Module, int]:
    """A network in eval mode whose every part matters, and the size of its images."""
    make, table = MAKERS[library]
    options, size = table[name]
    torch.manual_seed(0)
    network = make(name, **options).eval()
    with torch.no_grad():
        for key, tensor in (*network.named_parameters(), *network.named_buffers()):
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                continue
            if key.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif tensor.ndim < 2 and tensor.numel() > 1 and not key.endswith("inv_freq"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif tensor.numel() and isinstance(tensor, nn.Parameter) and not tensor.any():
                tensor.normal_(std=0.1)
    return network, size


def images(number: int, size: int, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-6 * second.abs().max())


@pytest.mark.parametrize(("library", "name"), ZOO)
def test_networks_of_other_libraries_round_trip(library: str, name: str, tmp_path: Path) -> None:
    network, size = made(library, name)
    save_network(network, tmp_path / "net", images(1, size))
    loaded = load_network(tmp_path / "net")
    assert isinstance(loaded, StoredNetwork)
    with torch.no_grad():
        expected = logits_in(network(images(5, size)))
        assert expected.std() > 0 and same(loaded(images(5, size)), expected)
    check_names(loaded, network)
    check_gradients(loaded, network, images(2, size))
    check_training(loaded, network, images(4, size))
    # An export of what was loaded finds the graph that it was loaded from.
    assert captured(loaded.eval(), images(1, size)).architecture == describe(loaded)


def check_names(loaded: nn.Module, network: nn.Module) -> None:
    own, ours = network.state_dict(), loaded.state_dict()
    constants = list(ours)[len(own) :]
    assert list(ours)[: len(own)] == list(own) and all(name.startswith("_constants.") for name in constants)
    assert all(torch.equal(ours[name], own[name]) and ours[name].dtype == own[name].dtype for name in own)
    parameters = [name for name, _ in network.named_parameters()]
    assert [name for name, _ in loaded.named_parameters()] == parameters  # the order optimiser states go by


def check_gradients(loaded: nn.Module, network: nn.Module, samples: Tensor) -> None:
    for one in (loaded, network):
        one.zero_grad()
        logits_in(one(samples)).square().sum().backward()
    theirs, ours = dict(network.named_parameters()), dict(loaded.named_parameters())
    reached = [name for name, one in theirs.items() if one.grad is not None]
    assert reached and all(ours[name].grad is not None for name in reached)
    for name in reached:
        assert torch.allclose(ours[name].grad, theirs[name].grad, rtol=1e-3, atol=1e-5), name  # type: ignore[arg-type]


def check_training(loaded: nn.Module, network: nn.Module, samples: Tensor) -> None:
    """One step in training mode: the same numbers are dropped, and the same statistics are kept."""
    outputs = []
    for one in (loaded, network):
        one.train()
        torch.manual_seed(3)
        outputs.append(logits_in(one(samples)).detach())
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5)
    own, ours = network.state_dict(), loaded.state_dict()
    for name in own:
        assert torch.allclose(ours[name], own[name], rtol=1e-5, atol=1e-6), name


def test_another_number_of_samples_and_another_size_of_images(tmp_path: Path) -> None:
    network, _ = made("torchvision", "resnet18")
    save_network(network, tmp_path / "net")
    loaded = load_network(tmp_path / "net")
    with torch.no_grad():
        for number, size in ((1, 32), (7, 32), (2, 50)):
            assert same(loaded(images(number, size)), network(images(number, size)))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_copies_and_pickles(name: str) -> None:
    network, size = made("torchvision", name)
    taken = snapshot(network, images(1, size))
    stored = restore(taken.architecture).eval()
    stored.load_state_dict(taken.state)
    expected = stored(images(3, size))
    for one in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert torch.equal(one(images(3, size)), expected)
        assert describe(one) == describe(stored)
        assert not {id(part) for part in one.parameters()} & {id(part) for part in stored.parameters()}
    repr(stored)


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "vit"), ("torchvision", "swin"), ("transformers", "ViT")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(library: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network, size = made(library, name)
    save_network(network, tmp_path / "net", images(1, size))
    loaded = load_network(tmp_path / "net").to(dtype)
    described = describe(loaded)
    assert described == describe(network, images(1, size))
    samples = images(2, size).to(dtype)
    with torch.no_grad():
        # Attention takes its fast path in the network itself, which rounds elsewhere.
        expected = logits_in(network.to(dtype)(samples)).double()
        bound = {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert (loaded(samples).double() - expected).abs().max() <= bound * expected.abs().max()
    assert loaded(samples).dtype == dtype
    save_network(loaded, tmp_path / "net")
    assert {one.dtype for one in load_network(tmp_path / "net").parameters()} == {dtype}
    save_network(network, tmp_path / "net", samples)  # captured in that precision
    with torch.no_grad():
        assert load_network(tmp_path / "net").float()(images(2, size)).dtype == torch.float32


class Cast(nn.Module):
    """A softmax in its own precision, and back in that of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).softmax(1, dtype=torch.float64).to(x.dtype) + torch.zeros(x.shape[0], 4, dtype=x.dtype)


def test_types_that_a_graph_names_follow_the_network() -> None:
    network = Cast().eval()
    stored = restore(describe(network)).to(torch.bfloat16)
    assert stored(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert restore(describe(network)).double()(torch.randn(3, 4).double()).dtype == torch.float64


def test_autocast() -> None:
    network, size = made("torchvision", "vit")
    taken = snapshot(network, images(1, size))
    stored = restore(taken.architecture).eval()
    stored.load_state_dict(taken.state)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, expected = stored(images(2, size)), network(images(2, size))
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(actual.float(), expected.float(), atol=2e-2)


class Normed(nn.Module):
    def __init__(self, momentum: float | None, track: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3, momentum=momentum, track_running_stats=track) for _ in "ab"])
        self.instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.drop, self.planes = nn.Dropout(0.3), nn.Dropout2d(0.3)
        self.act = nn.RReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.norms[1](self.norms[0](x)))  # one of them twice
        return F.alpha_dropout(self.drop(self.planes(self.act(self.instance(x)))).mean((2, 3)), 0.3, self.training)


@pytest.mark.parametrize(("momentum", "track"), [(0.1, True), (0.3, True), (None, True), (0.1, False)])
def test_training_updates_statistics_and_drops(momentum: float | None, track: bool) -> None:
    network: nn.Module = Normed(momentum, track).eval()
    taken = snapshot(network, images(1, 8))
    stored = restore(taken.architecture)
    stored.load_state_dict(taken.state)
    for step in range(3):
        check_training(stored, network, images(4, 8, seed=step) + step)
    assert stored.state_dict()["norms.0.num_batches_tracked"] == 6 if track else True
    for one in (stored, network):
        one.eval()
    assert torch.equal(stored(images(4, 8)), network(images(4, 8)))


def test_half_is_dropped_in_training_only() -> None:
    stored = restore(describe(nn.Sequential(nn.Linear(4, 1000), nn.Dropout(0.5)).eval()))
    stored.get_parameter("0.bias").data.fill_(1.0)
    stored.get_parameter("0.weight").data.zero_()
    assert abs(float((stored(torch.randn(20, 4)) == 0).float().mean()) - 0.5) < 0.02
    assert float(stored.eval()(torch.randn(20, 4)).detach().min()) == 1


class Constants(nn.Module):
    """Reads a buffer that its state dict leaves out, and a constant computed from one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unused = nn.Linear(4, 4), nn.Linear(2, 2)
        self.register_buffer("hidden", torch.tensor([1.0, 2.0, 3.0, float("inf")]), persistent=False)
        self.register_buffer("kept", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.hidden, Tensor) and isinstance(self.kept, Tensor)
        return (self.fc(x) * self.kept).clamp(-self.hidden, self.hidden)


def test_constants_are_part_of_the_state() -> None:
    network = Constants().eval()
    taken = snapshot(network)
    stored = restore(taken.architecture).eval()
    with pytest.raises(RuntimeError, match="_constants"):
        stored.load_state_dict(network.state_dict())
    stored.load_state_dict(taken.state)
    assert list(stored.state_dict()) == [*network.state_dict(), "_constants.0", "_constants.1"]
    assert torch.equal(stored(torch.ones(2, 4)), network(torch.ones(2, 4)))


def test_a_restored_network_is_random_but_not_dead() -> None:
    network, size = made("torchvision", "vit")
    described = describe(network, images(1, size))
    first, second = (restore(described).eval() for _ in range(2))
    outputs = [one(images(2, size)) for one in (first, second)]
    assert all(output.isfinite().all() and output.std() > 1e-3 for output in outputs)
    assert not torch.equal(*outputs)


def test_every_value_goes_after_its_last_use() -> None:
    network = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.Tanh())]).eval()
    stored = restore(describe(network))
    assert isinstance(stored, StoredNetwork)
    alive: list[Any] = []

    def see(name: str, value: Tensor) -> None:
        import weakref

        alive.append(weakref.ref(value))
        assert sum(one() is not None for one in alive) <= 3

    with torch.no_grad():
        stored.observe(torch.randn(2, 8), see)
    assert len(alive) == 40


def test_no_operation_of_the_table_writes() -> None:
    known = {name: overload for name in OPERATIONS if (overload := overload_of(name)) is not None}
    assert len(known) > 250  # the others are of another PyTorch
    assert [name for name, overload in known.items() if overload._schema.is_mutable] == []
    assert [name for name in known if any(word in name for word in ("strided", "resize", "from_file", "_unsafe"))] == []
    arguments = {name: known[name]._schema.arguments[place].name for name, place in TRAINING.items()}
    assert set(arguments.values()) == {"train", "training", "use_input_stats"}
    assert overload_of("aten.relu_.default") is None and overload_of("aten.linear.out") is None


def test_an_operation_that_this_torch_lacks_is_refused_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe(nn.Linear(2, 2).eval())
    described["nodes"][0][0] = "aten.linear_of_tomorrow.default"
    table = OPERATIONS | {"aten.linear_of_tomorrow.default"}
    for module in ("graph_json", "stored_operations"):
        monkeypatch.setattr(f"clafusion.formats.{module}.OPERATIONS", table)
    with pytest.raises(FusionError, match="'aten.linear_of_tomorrow.default', operation 0, which this PyTorch lacks"):
        restore(described)


class FirstForeign(nn.Module):
    """Stored by the first version in `saved/foreign.safetensors`, see the README there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.a, self.b = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.out(F.adaptive_avg_pool2d(x, 2).flatten(1))


def test_files_of_the_first_version_are_read_and_written_again(tmp_path: Path) -> None:
    path = REFERENCE / "first_version" / "saved" / "foreign.safetensors"
    loaded = load_network(path)
    network = FirstForeign().eval()
    network.load_state_dict(loaded.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(x), network(x))
    described = describe(loaded)
    assert described["name"] == "graph" and describe(copy.deepcopy(loaded)) == described
    save_network(loaded, tmp_path / "net")
    again = load_network(tmp_path / "net")
    assert torch.equal(again(x), network(x)) and describe(again) == described
    assert load_network(path.with_name("functions.safetensors"))(x).shape == (3, 3)


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
@pytest.mark.parametrize(("name", "shape"), [("vit_tiny_patch16_224", [3, 32, 32]), ("resnet10t", [3, 176, 176])])
def test_networks_of_timm_say_which_images_they_take(name: str, shape: Sequence[int]) -> None:
    network = timm_network(name, **(VIT if name.startswith("vit") else {})).eval()
    assert describe(network)["input"] == shape
