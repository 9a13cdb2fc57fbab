"""The published settings against the published implementation, on its pair of trained MLPs."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from clafusion import Fusion, FusionOptions, fuse, networks
from tests.helpers import REFERENCE

FASHION = Path("/usr/share/datasets/fashion-mnist")
HIDDEN = {"model0": [400, 200, 100, 50, 25], "model1": [400, 200, 100]}
needs_fashion = pytest.mark.skipif(
    not (FASHION / "t10k-images-idx3-ubyte.gz").is_file(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "mlp.npz") as file:
        return {name: torch.from_numpy(np.asarray(value)) for name, value in file.items()}


@pytest.fixture(scope="module")
def parents(reference):
    models = []
    for name, hidden in HIDDEN.items():
        model = networks.build({"name": "MLP", "in_features": 784, "hidden": hidden, "num_classes": 10})
        prefix = f"{name}."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)})
        models.append(model.eval())
    return models


@pytest.fixture(scope="module")
def fusion(parents, reference) -> Fusion:
    return fuse(parents, [reference["samples"]], FusionOptions.paper(anchor=1))


def accuracy(model) -> float:
    with gzip.open(FASHION / "t10k-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    with gzip.open(FASHION / "t10k-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8)
    with torch.no_grad():
        predicted = torch.cat([model((x / 255 - 0.1307) / 0.3081).argmax(1) for x in pixels.split(2000)])
    return 100 * float((predicted == labels).double().mean())


def probes(reference):
    x = reference["samples"]
    return {"x": x, "negated": -x, "reversed": x.flip(-1)}


def test_the_parents_are_the_published_ones(parents, reference):
    for name, model in zip(HIDDEN, parents, strict=True):
        for probe, samples in probes(reference).items():
            with torch.no_grad():
                assert torch.allclose(model(samples).double(), reference[f"logits.{name}.{probe}"], atol=1e-4)


def test_the_alignment_is_the_published_one(fusion):
    assert fusion.alignments[1] == ((0, 1, 4), (0,)) and fusion.template == 0


def test_the_maps_are_the_published_plans_divided_by_their_marginals(fusion, reference):
    assert list(fusion.maps[0]) == [f"fc{index}" for index in range(1, 7)] and not fusion.maps[1]
    for index in range(6):
        plan = reference[f"T{index}"].double()
        expected = plan / plan.sum(0)
        assert torch.allclose(fusion.maps[0][f"fc{index + 1}"], expected, atol=1e-9), f"T{index}"


def test_the_fused_network_is_the_published_one_as_a_function(fusion, reference):
    assert [list(p.shape) for p in fusion.model.parameters()] == [
        [400, 784], [200, 400], [200, 200], [200, 200], [100, 200], [10, 100]
    ]  # fmt: skip
    for probe, samples in probes(reference).items():
        expected = reference[f"logits.fused.{probe}"]
        with torch.no_grad():
            error = (fusion.model(samples).double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-3, probe


def test_other_settings_are_told_apart(parents, reference):
    """The control of the comparison above."""
    other = fuse(parents, [reference["samples"]], FusionOptions.paper(anchor=1, cost="correlation"))
    expected = reference["logits.fused.x"]
    with torch.no_grad():
        assert (other.model(reference["samples"]) - expected).abs().max() / expected.abs().max() > 1e-2


@needs_fashion
def test_the_published_accuracies(parents, fusion):
    assert [round(accuracy(model), 2) for model in parents] == [87.39, 85.85]
    assert round(accuracy(fusion.balanced[1]), 2) == 85.85
    assert accuracy(fusion.model) == pytest.approx(82.76, abs=0.02)


@needs_fashion
def test_the_published_accuracy_of_merging(parents, reference):
    merged = fuse(parents, [reference["samples"]], FusionOptions.paper(anchor=1, balance="merge", relu="sum"))
    assert accuracy(merged.model) == pytest.approx(84.02, abs=0.02)
    assert merged.model.architecture["hidden"] == [400, 200, 100]
