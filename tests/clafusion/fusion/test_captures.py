"""Every network is captured once; what a fusion knows is kept, for its report as well."""

import pytest
import torch

from clafusion import FusionOptions, align_layers, fuse
from clafusion.report.measurements import line_accuracies, report_data
from clafusion.tracing import structure
from tests.helpers import mlp, plain, vectors

SAMPLES = vectors(40)


@pytest.fixture
def captured(monkeypatch):
    """What has been captured."""
    models, capture = [], structure.capture
    monkeypatch.setattr(structure, "capture", lambda model, example: models.append(model) or capture(model, example))
    return models


def parents(count=2):
    return [mlp(hidden, seed) for seed, hidden in enumerate(([9, 8, 7], [9, 6], [8, 7])[:count])]


@pytest.mark.parametrize("correction", ["none", "rescale", "repair", "refit"])
@pytest.mark.parametrize("anchor", [0, 1, "agreement"])
def test_each_parent_the_inserted_one_and_the_corrected_network_are_captured_once(correction, anchor, captured):
    models = parents()
    fusion = fuse(models, [SAMPLES], FusionOptions(correction=correction, anchor=anchor))
    corrected = [] if correction == "none" else [fusion.model]
    assert list(map(id, captured)) == list(map(id, [*models, fusion.balanced[1], *corrected]))


def test_the_report_captures_nothing(captured):
    fusion = fuse(parents(3), [SAMPLES])
    captured.clear()
    report_data(fusion, SAMPLES)
    line_accuracies(fusion, SAMPLES, torch.zeros(len(SAMPLES)))
    assert not captured


def test_one_after_another_each_parent_is_captured_once(captured):
    models = parents(3)
    fuse(models, [SAMPLES], FusionOptions(many="iterative", correction="refit"))
    # Besides the parents: in each of two steps an inserted and a corrected network, and in the second what is added to.
    assert [sum(model is one for one in captured) for model in models] == [1, 1, 1] and len(captured) == 8


def test_aligning_by_agreement_captures_each_parent_once(captured):
    align_layers(parents(), [SAMPLES], FusionOptions(anchor="agreement"))
    assert len(captured) == 2


@torch.no_grad()
def test_a_fusion_stays_what_it_is_when_its_parents_change():
    models, labels = parents(), torch.zeros(len(SAMPLES))
    fusion = fuse(models, [SAMPLES], plain(correction="rescale"))
    kept = report_data(fusion, SAMPLES), line_accuracies(fusion, SAMPLES, labels)
    for parameter in (one for model in models for one in model.parameters()):
        parameter.zero_()
    assert (report_data(fusion, SAMPLES), line_accuracies(fusion, SAMPLES, labels)) == kept
