"""The published settings on residual networks: which map moves which axis, and what inserted blocks are."""

import pytest
import torch

from clafusion import FusionOptions, fuse, trace
from clafusion.tracing.writers import writers_of
from tests.helpers import foreign, images, relative_error, resnet

SAMPLES = images(16, 8)


@pytest.fixture(scope="module")
def parents():
    return resnet([2, 2, 1], 0), resnet([1, 1, 1], 1)


@pytest.fixture(scope="module")
def fusion(parents):
    return fuse(parents, [SAMPLES], FusionOptions.paper(anchor=1))


def moved_by(model, parameter):
    """For the outputs and the inputs of a weight the layers whose maps, averaged, move them; none where they stay."""
    writers = writers_of(trace(model, SAMPLES[:2]))
    return [writers[f"{parameter}.weight", dim] for dim in (0, 1)]


@pytest.mark.parametrize(
    ("parameter", "outputs", "inputs"),
    [
        ("conv1", ("conv1",), ()),
        # The first block of the first stage has no projection: the stem's map enters it.
        ("layer1.0.conv1", ("layer1.0.conv1",), ("conv1",)),
        ("layer1.0.conv2", ("layer1.0.conv2",), ("layer1.0.conv1",)),
        ("layer1.1.conv1", ("layer1.1.conv1",), ("layer1.0.conv2",)),
        ("layer1.1.conv2", ("layer1.1.conv2",), ("layer1.1.conv1",)),
        # The first block of a stage: conv1 and the projection read the stream that enters the stage.
        ("layer2.0.conv1", ("layer2.0.conv1",), ("layer1.1.conv2",)),
        ("layer2.0.conv2", ("layer2.0.conv2",), ("layer2.0.conv1",)),
        ("layer2.0.shortcut.0", ("layer2.0.shortcut.0",), ("layer1.1.conv2",)),
        # After a projection block: the mean of conv2's and the projection's.
        ("layer2.1.conv1", ("layer2.1.conv1",), ("layer2.0.conv2", "layer2.0.shortcut.0")),
        ("layer2.1.conv2", ("layer2.1.conv2",), ("layer2.1.conv1",)),
        ("layer3.0.conv1", ("layer3.0.conv1",), ("layer2.1.conv2",)),
        ("layer3.0.shortcut.0", ("layer3.0.shortcut.0",), ("layer2.1.conv2",)),
        ("linear", ("linear",), ("layer3.0.conv2", "layer3.0.shortcut.0")),
    ],
)
def test_which_maps_move_which_axis(parents, parameter, outputs, inputs):
    assert moved_by(parents[0], parameter) == [outputs, inputs]


def test_norms_move_with_their_layer():
    writers = writers_of(trace(resnet([2, 2], batch_norm=True), SAMPLES[:2]))
    for norm, layer in {
        "bn1": "conv1", "layer1.0.bn2": "layer1.0.conv2", "layer2.0.shortcut.1": "layer2.0.shortcut.0",
    }.items():  # fmt: skip
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert writers[f"{norm}.{key}", 0] == (layer,)


def test_torchvision_blocks_are_read_alike():
    writers = writers_of(trace(foreign("resnet50"), images(2, 32)))
    assert writers["layer2.1.conv1.weight", 1] == ("layer2.0.conv3", "layer2.0.downsample.0")
    assert writers["layer2.2.conv1.weight", 1] == ("layer2.1.conv3",)
    assert writers["layer2.0.downsample.0.weight", 1] == ("layer1.2.conv3",)
    assert writers["fc.weight", 1] == ("layer4.2.conv3",)


def test_every_layer_and_the_head_have_a_map(parents, fusion):
    weighted = [name.removesuffix(".weight") for name, _ in parents[0].named_parameters()]
    assert sorted(fusion.maps[0]) == sorted(weighted) and fusion.maps[1] == {}
    for mapping in fusion.maps[0].values():
        assert torch.allclose(mapping.sum(0), torch.ones(mapping.shape[1]).double())


def test_inserted_blocks_have_both_convolutions_zero(parents, fusion):
    assert fusion.alignments[1] == ((0,), (0,), (0,), (0,), (0,))
    for block in (fusion.balanced[1].layer1[1], fusion.balanced[1].layer2[1]):
        assert not block.conv1.weight.any() and not block.conv2.weight.any()
    assert fusion.balanced[1].layer1[0].conv1.weight.any()
    assert relative_error(fusion.balanced[1], parents[1], SAMPLES) == 0


def test_the_maps_are_applied_as_published(parents, fusion):
    """Every weight by hand: incoming maps before the outgoing one, then the plain mean."""
    maps, balanced = fusion.maps[0], fusion.balanced[1].state_dict()

    def mean(*names):
        return sum(maps[name] for name in names) / len(names)

    for name, inputs in {
        "layer1.0.conv1": ("conv1",),
        "layer1.1.conv1": ("layer1.0.conv2",),
        "layer1.1.conv2": ("layer1.1.conv1",),
        "layer2.0.shortcut.0": ("layer1.1.conv2",),
        "layer2.1.conv1": ("layer2.0.conv2", "layer2.0.shortcut.0"),
        "layer2.1.conv2": ("layer2.1.conv1",),
        "linear": ("layer3.0.conv2", "layer3.0.shortcut.0"),
    }.items():
        weight = parents[0].get_submodule(name).weight.detach()
        moved = torch.einsum("oi...,oO,iI->OI...", weight, maps[name], mean(*inputs))
        expected = (moved + balanced[f"{name}.weight"]) / 2
        assert torch.allclose(fusion.model.get_submodule(name).weight, expected), name


def test_a_map_solves_the_transport_of_its_layers_features(parents, fusion):
    """conv2 by the output of its block before the ReLU, the projection by its own."""
    from clafusion.transport.solvers import transport_map

    features = {}
    for side, model in enumerate((parents[0], fusion.balanced[1])):
        with torch.no_grad():
            entering = model.layer1(model.conv1(SAMPLES).relu())
            block = model.layer2[0]
            inner, shortcut = block.conv1(entering), block.shortcut(entering)
            features[side] = {
                "layer2.0.conv1": inner,
                "layer2.0.shortcut.0": shortcut,
                "layer2.0.conv2": block.conv2(inner.relu()) + shortcut,
            }
    for name in features[0]:
        x, y = (features[side][name].transpose(0, 1).flatten(1) for side in (0, 1))
        assert torch.equal(fusion.maps[0][name], transport_map(torch.cdist(x, y))), name


def test_the_maps_of_deep_pairs_are_forced():
    """With both pins nothing is left to choose in ResNet34 and ResNet18."""
    models = resnet([3, 4, 6, 3], 0, width=2), resnet([2, 2, 2, 2], 1, width=2)
    fusion = fuse(models, [SAMPLES], FusionOptions.paper())
    assert fusion.alignments[1] == ((0,), (0, 2), (0, 3), (0, 5), (0, 2), (0,))
    assert all(cost is None for cost in fusion.layer_costs[1])
