"""The published arithmetic on more than two networks, against a second implementation on state dicts and POT alone."""

import copy

import numpy as np
import ot
import pytest
import torch
from torch import Tensor, nn

from clafusion import FusionOptions, fuse
from tests.helpers import images, relative_error, resnet

SAMPLES = images(12, 8, seed=5)
#: As 34, 18, 34, 18: with both ends pinned, these are the only places where the blocks of the shallower ones can be.
DEEP, SHALLOW = [3, 2], [2, 1]
PLACES = {1: (0, 2), 2: (0,)}
WIDTHS = [4, 6, 5, 4]


@pytest.fixture(scope="module")
def parents() -> list[nn.Module]:
    return [resnet(SHALLOW if k % 2 else DEEP, k, width=WIDTHS[k]) for k in range(4)]


def deepened(model: nn.Module, width: int) -> nn.Module:
    """The network with blocks of two zero convolutions where it lacks some."""
    if len(model.layer1) == DEEP[0]:
        return model
    deep = resnet(DEEP, width=width)
    state = {name: torch.zeros_like(tensor) for name, tensor in deep.state_dict().items()}
    for name, tensor in model.state_dict().items():
        layer, *rest = name.split(".", 2)
        if layer.startswith("layer"):
            name = f"{layer}.{PLACES[int(layer[-1])][int(rest[0])]}.{rest[1]}"
        state[name] = tensor
    deep.load_state_dict(state)
    return deep


@torch.no_grad()
def layer_features(model: nn.Module) -> dict[str, Tensor]:
    """What each layer is compared by: conv2 by its block's output before the ReLU, all others by their own."""
    found = {"conv1": model.conv1(SAMPLES)}
    stream = found["conv1"].relu()
    for stage, layer in enumerate((model.layer1, model.layer2), 1):
        for place, block in enumerate(layer):
            name = f"layer{stage}.{place}"
            found[f"{name}.conv1"] = block.conv1(stream)
            shortcut = block.shortcut(stream)
            if len(block.shortcut):
                found[f"{name}.shortcut.0"] = shortcut
            found[f"{name}.conv2"] = block.conv2(found[f"{name}.conv1"].relu()) + shortcut
            stream = found[f"{name}.conv2"].relu()
    found["linear"] = model(SAMPLES)
    return {name: tensor.transpose(0, 1).flatten(1) for name, tensor in found.items()}


def layer_maps(other: nn.Module, anchor: nn.Module) -> dict[str, Tensor]:
    """Exact transport of uniform masses at euclidean cost, divided by the anchor's mass."""
    theirs, ours = layer_features(other), layer_features(anchor)
    maps = {}
    for name, x in theirs.items():
        cost = ot.dist(x.numpy(), ours[name].numpy(), metric="euclidean")
        plan = ot.emd(np.full(len(cost), 1 / len(cost)), np.full(cost.shape[1], 1 / cost.shape[1]), cost)
        maps[name] = torch.from_numpy(plan) * cost.shape[1]
    return maps


def moved(other: nn.Module, anchor: nn.Module) -> dict[str, Tensor]:
    """The other's weights by layer: the map of what enters first, then that of what leaves."""
    maps, state, result = layer_maps(other, anchor), other.state_dict(), {}
    entering, result["conv1"] = maps["conv1"], torch.einsum("oiyx,oO->Oiyx", state["conv1.weight"], maps["conv1"])
    for stage, layer in enumerate((other.layer1, other.layer2), 1):
        for place, block in enumerate(layer):
            name = f"layer{stage}.{place}"
            inputs = {"conv1": entering, "conv2": maps[f"{name}.conv1"], "shortcut.0": entering}
            leaving = [f"{name}.conv2"]
            if len(block.shortcut):
                leaving.append(f"{name}.shortcut.0")
            else:
                del inputs["shortcut.0"]
            for kind, map_in in inputs.items():
                key = f"{name}.{kind}"
                result[key] = torch.einsum("oiyx,iI,oO->OIyx", state[f"{key}.weight"], map_in, maps[key])
            entering = sum(maps[key] for key in leaving) / len(leaving)
    result["linear"] = torch.einsum("oi,iI,oO->OI", state["linear.weight"], entering, maps["linear"])
    return {f"{name}.weight": tensor for name, tensor in result.items()}


def mixed(anchor: nn.Module, others: list[nn.Module], shares: list[float]) -> nn.Module:
    result = copy.deepcopy(anchor)
    states = [anchor.state_dict(), *(moved(other, anchor) for other in others)]
    result.load_state_dict(
        {name: sum(share * state[name] for share, state in zip(shares, states, strict=True)) for name in states[0]}
    )
    return result


@pytest.mark.parametrize("weights", [None, [4, 1, 3, 2]])
@pytest.mark.parametrize("many", ["many_to_one", "iterative"])
def test_four_resnets_are_fused_as_published(parents, many, weights):
    anchor, *others = (deepened(parent, width) for parent, width in zip(parents, WIDTHS, strict=True))
    shares = torch.tensor(weights or [1, 1, 1, 1]).double()
    if many == "many_to_one":
        expected = mixed(anchor, others, (shares / shares.sum()).tolist())
    else:
        # Folded one by one, so that the result is the mean that was asked for.
        expected = anchor
        for count, other in enumerate(others, 1):
            share = float(shares[count] / shares[: count + 1].sum())
            expected = mixed(expected, [other], [1 - share, share])
    found = fuse(parents, [SAMPLES], FusionOptions.paper(many=many, weights=weights)).model
    assert found.architecture == anchor.architecture
    assert relative_error(found, expected, images(6, 8, seed=9)) < 1e-9
