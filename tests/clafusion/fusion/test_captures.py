"""A network is captured once, and those of the same graph with it; what a fusion knows is kept, for its report too."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from clafusion import FusionOptions, align_layers, fuse, trace
from clafusion.report.measurements import line_accuracies, report_data
from clafusion.tracing import reading
from tests.helpers import largest_difference, mlp, plain, relative_error, vectors

SAMPLES = vectors(40)


@pytest.fixture
def captured(monkeypatch):
    """What has been captured, with nothing known before."""
    found, capture = [], reading.export_graph
    monkeypatch.setattr(reading, "_KNOWN", OrderedDict())
    monkeypatch.setattr(reading, "export_graph", lambda model, example: found.append(model) or capture(model, example))
    return found


def parents(count=2):
    return [mlp(hidden, seed) for seed, hidden in enumerate(([9, 8, 7], [9, 6], [8, 7])[:count])]


@pytest.mark.parametrize("correction", ["none", "rescale", "repair", "refit"])
@pytest.mark.parametrize("anchor", [0, 1, "agreement"])
def test_each_parent_and_what_has_other_widths_or_biases_are_captured_once(correction, anchor, captured):
    fusion = fuse(parents(), [SAMPLES], FusionOptions(correction=correction, anchor=anchor))
    # With the deep parent's widths the result has its graph; inserted layers are in none.
    other_widths = fusion.options.anchor == 1
    assert len(captured) == 2 + other_widths + (correction == "repair")
    fuse(parents(), [SAMPLES], FusionOptions(correction=correction, anchor=anchor))
    assert len(captured) == 2 + other_widths + (correction == "repair")


def test_the_report_captures_nothing(captured):
    fusion = fuse(parents(3), [SAMPLES])
    captured.clear()
    report_data(fusion, SAMPLES)
    line_accuracies(fusion, SAMPLES, torch.zeros(len(SAMPLES)))
    assert not captured


def test_one_after_another_each_parent_is_captured_once(captured):
    fuse(parents(3), [SAMPLES], FusionOptions(many="iterative", correction="refit"))
    assert len(captured) == 3


def test_aligning_by_agreement_captures_each_parent_once(captured):
    align_layers(parents(), [SAMPLES], FusionOptions(anchor="agreement"))
    assert len(captured) == 2


def test_networks_of_one_graph_are_captured_once_and_read_with_their_own_tensors(captured):
    models = [mlp([9, 8], seed) for seed in range(3)]
    structures = [trace(model, SAMPLES) for model in models]
    assert len(captured) == 1
    for model, structure in zip(models, structures, strict=True):
        assert structure.capture.tensors["fc1.weight"] is model.fc1.weight
        assert torch.allclose(structure.run(SAMPLES), model(SAMPLES))
    assert relative_error(models[0], models[1], SAMPLES) > 0.1


def test_what_is_known_of_a_graph_keeps_no_network_in_memory(captured):
    model = mlp([9, 8], batch_norm=True)
    trace(model, SAMPLES)
    [known] = reading._KNOWN.values()
    assert not known.capture.tensors.keys() & model.state_dict().keys() and not known.logits.numel()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net[1], "negative_slope", 0.5),
        lambda net: setattr(net, "1", nn.ReLU()),
        lambda net: setattr(net[2], "eps", 0.3),
        lambda net: net.register_module("3", nn.Sequential(net[3], nn.Hardtanh())),
        lambda net: net[0].__setattr__("forward", lambda x: 2 * x[:, :5]),
        lambda net: net[3].register_parameter("bias", None),
    ],
)
def test_a_network_that_differs_in_anything_but_its_weights_is_captured_anew(change, captured):
    def network():
        layers = nn.Linear(12, 5), nn.LeakyReLU(0.1), nn.BatchNorm1d(5), nn.Linear(5, 3)
        return nn.Sequential(*layers).double().eval()

    trace(network(), SAMPLES)
    other = network()
    change(other)
    structure = trace(other, SAMPLES)
    assert len(captured) == 2 and torch.allclose(structure.run(SAMPLES), other(SAMPLES))


def test_the_last_graphs_alone_are_known(captured, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_KNOWN", 2)
    for width in (5, 6, 7, 7, 5):
        trace(mlp([width]), SAMPLES)
    assert len(captured) == 4 and len(reading._KNOWN) == 2


def test_what_is_known_already_changes_no_result(captured):
    first, again = (fuse(parents(3), [SAMPLES], FusionOptions(anchor=1)).model for _ in range(2))
    assert largest_difference(first, again) == 0


@torch.no_grad()
def test_a_fusion_stays_what_it_is_when_its_parents_change():
    models, labels = parents(), torch.zeros(len(SAMPLES))
    fusion = fuse(models, [SAMPLES], plain(correction="rescale"))
    kept = report_data(fusion, SAMPLES), line_accuracies(fusion, SAMPLES, labels)
    for parameter in (one for model in models for one in model.parameters()):
        parameter.zero_()
    assert (report_data(fusion, SAMPLES), line_accuracies(fusion, SAMPLES, labels)) == kept
