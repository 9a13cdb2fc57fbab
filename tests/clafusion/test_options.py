"""The options: plain values, each checked when they are made."""

import dataclasses
import inspect
import json
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from clafusion import FusionError, FusionOptions, fuse
from tests.helpers import mlp, vectors

HINTS = get_type_hints(FusionOptions)
LITERALS = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
EXPECTED = {
    "layer_measure", "debiased", "pin_first", "pin_last", "mapping", "balance", "relu", "features", "cost", "squared",
    "normalize", "solver", "regularization", "marginal_regularization", "mass", "streams", "head", "anchor", "weights",
    "combine", "many", "correction", "num_samples", "seed",
}  # fmt: skip


def test_the_promised_fields_are_there():
    assert set(HINTS) >= EXPECTED


def test_every_field_is_documented():
    documented = inspect.getdoc(FusionOptions)
    for name in HINTS:
        assert f"\n    {name}: " in documented


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "gated", "correction": "repair"}, "correction refit with teacher gated, got repair"),
        ({"targets": "union", "correction": "none"}, "correction refit with targets union, got none"),
        ({"width": 0.5}, "targets union with width 0.5, got auto"),
        ({"budget": "macs"}, "targets union with budget macs, got auto"),
        ({"width": 0.5, "targets": "union", "many": "iterative"}, "many many_to_one with width 0.5, got iterative"),
        ({"width": 0.0, "targets": "union"}, "positive width, got 0.0"),
        ({"gate_temperature": -1.0}, "positive gate_temperature, got -1.0"),
    ],
)
def test_what_has_no_effect_is_refused(given, message):
    with pytest.raises(FusionError, match=f"Expected (a )?{message}"):
        FusionOptions(**given)


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FusionOptions().seed = 3


@pytest.mark.parametrize("name", LITERALS)
def test_choices_are_accepted_and_others_refused(name):
    for value in LITERALS[name]:
        # Every correction but none needs one map per stream; what is fitted to something needs refit.
        needed = {"teacher": {}, "targets": {}, "budget": {"targets": "union"}}.get(name, {"correction": "none"})
        assert getattr(FusionOptions(**{**needed, name: value}), name) == value
    for wrong in ("nonsense", None, 1, [LITERALS[name][0]]):
        with pytest.raises(FusionError, match=f"Expected {name} to be one of {', '.join(LITERALS[name])}, got"):
            FusionOptions(**{name: wrong})


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if hint is bool])
def test_flags_are_true_or_false(name):
    for wrong in (1, "true", None):
        with pytest.raises(FusionError, match=f"Expected {name} to be bool, got"):
            FusionOptions(**{name: wrong})


@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if hint is int])
def test_counts_are_whole_numbers(name):
    for wrong in (1.0, True, "3", None):
        with pytest.raises(FusionError, match=f"Expected {name} to be int, got"):
            FusionOptions(**{name: wrong})


def test_the_anchor_is_an_index_or_chosen():
    assert FusionOptions(anchor="agreement").to_dict()["anchor"] == "agreement"
    for wrong in (1.0, True, None):
        with pytest.raises(FusionError, match="Expected anchor to be a whole number, agreement, or the name of a par"):
            FusionOptions(anchor=wrong)


def test_the_anchor_may_have_a_name_where_the_parents_have():
    names, paths = ["deep/best.ckpt", "shallow/best.ckpt"], ["runs/deep/best.ckpt", "runs/shallow/best.ckpt"]
    for given in ("shallow/best.ckpt", "runs/shallow/best.ckpt", 1):
        assert FusionOptions(anchor=given).for_parents(names, paths).anchor == 1
    assert FusionOptions(anchor="agreement").for_parents(names).anchor == "agreement"
    with pytest.raises(FusionError, match="be deep/best.ckpt, shallow/best.ckpt, a number from 0, or agreement, got c"):
        FusionOptions(anchor="c.ckpt").for_parents(names)
    with pytest.raises(FusionError, match="Expected anchor to be the number of a network or agreement, got 'c.ckpt'"):
        fuse([mlp([5]), mlp([5])], [vectors(9)], FusionOptions(anchor="c.ckpt"))


@pytest.mark.parametrize(
    ("name", "least"),
    [("pin_first", 0), ("pin_last", 0), ("anchor", 0), ("anchor_lead", 1), ("num_samples", 2), ("memory_budget", 1)],
)
def test_counts_have_a_least_value(name, least):
    FusionOptions(**{name: least})
    with pytest.raises(FusionError, match=f"Expected {name} of at least {least}, got {least - 1}"):
        FusionOptions(**{name: least - 1})


@pytest.mark.parametrize("name", ["regularization", "marginal_regularization", "anchor_lead", "ridge"])
def test_regularisations_are_positive_numbers(name):
    assert getattr(FusionOptions(**{name: 1}), name) == 1
    for wrong in (float("nan"), float("inf"), *(() if name == "anchor_lead" else (0, -1.0))):
        with pytest.raises(FusionError, match=f"Expected a positive {name}, got"):
            FusionOptions(**{name: wrong})
    for wrong in ("0.1", True, None):
        with pytest.raises(FusionError, match=f"Expected {name} to be a number, got"):
            FusionOptions(**{name: wrong})


def test_squared_needs_distances():
    FusionOptions(squared=True, cost="euclidean")
    with pytest.raises(FusionError, match="squared only with cost euclidean, got cost correlation"):
        FusionOptions(squared=True)


@pytest.mark.parametrize("correction", ["rescale", "repair", "refit"])
def test_corrections_need_shared_streams(correction):
    with pytest.raises(FusionError, match=f"none with streams per_layer, got {correction}; share the streams"):
        FusionOptions(streams="per_layer", correction=correction)


def test_weights_become_floats():
    assert FusionOptions(weights=[1, 3]).weights == (1.0, 3.0)
    assert FusionOptions(weights=(0, 1)) == FusionOptions(weights=[0.0, 1.0])
    hash(FusionOptions(weights=[1, 2]))


@pytest.mark.parametrize("wrong", ["12", 0.5, ["1", "2"], [True, False], {"a": 1}, [None]])
def test_weights_are_numbers(wrong):
    with pytest.raises(FusionError, match="Expected weights to be a list of numbers or None, got"):
        FusionOptions(weights=wrong)


@pytest.mark.parametrize("wrong", [[-1, 2], [0, 0], [], [float("nan"), 1], [1, float("nan")], [float("inf"), 1]])
def test_weights_are_shares(wrong):
    with pytest.raises(FusionError, match="weights of at least 0 with a positive sum, got"):
        FusionOptions(weights=wrong)


def test_the_published_settings():
    paper = FusionOptions.paper()
    assert (paper.pin_first, paper.pin_last, paper.num_samples, paper.debiased) == (1, 1, 200, False)
    assert (paper.features, paper.cost, paper.squared, paper.solver) == ("preactivations", "euclidean", False, "exact")
    assert (paper.streams, paper.head, paper.mass, paper.normalize) == ("per_layer", "transport", "uniform", "none")
    assert (paper.layer_measure, paper.mapping, paper.balance, paper.correction) == ("cka", "optimal", "insert", "none")
    assert paper.combine == "transport" and paper.weights is None


def test_the_published_settings_can_be_changed():
    assert FusionOptions.paper(anchor=1, debiased=True) == dataclasses.replace(
        FusionOptions.paper(), anchor=1, debiased=True
    )
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        FusionOptions.paper(anker=1)


def test_options_are_plain_data_and_come_back():
    for options in (FusionOptions(), FusionOptions.paper(weights=[1, 2])):
        plain = json.loads(json.dumps(options.to_dict()))
        assert plain == options.to_dict() and FusionOptions(**plain) == options
