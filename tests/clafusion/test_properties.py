"""What holds for every network that can be fused, tried on random architectures (the same ones in every run)."""

import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from clafusion import FusionOptions, fuse, insert_identities, trace
from clafusion.alignment.layer_costs import width_of
from clafusion.statistics.moments import Moments, Observation, paired_moments
from clafusion.statistics.samples import rows
from clafusion.tracing.execution import GraphRunner
from tests.architectures import CLASSES, architectures, flags, pairs
from tests.helpers import CORRECTIONS, permuted, relative_error

pytestmark = pytest.mark.filterwarnings(
    # Networks of a few neurons on a few samples: a layer may be refit from fewer observations than it has unknowns.
    "ignore:Expected at least as many observations:UserWarning",
    "ignore:Expected layers and norms that can be corrected:UserWarning",
)
SAMPLES = 48


def tried(count: int):
    """Deterministic, and few enough for every run of the suite."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


@tried(15)
@given(architectures(), st.integers(0, 99))
def test_permuting_every_free_space_leaves_the_function_as_it_is(drawn, seed):
    model, samples = drawn.build(seed), drawn.samples(3)
    assume(model(samples).any())
    other, orders = permuted(model, samples, seed)
    assert relative_error(other, model, samples) < 1e-10
    assert set(orders) == set(trace(model, samples).free_spaces) and orders


def told_apart(model: nn.Module, samples: torch.Tensor, features: str, cost: str) -> bool:
    """Whether no two neurons are alike in what they are compared by, and the network gives anything at all."""
    structure = trace(model, samples[:2])
    values = dict(GraphRunner(structure.capture).observe(samples, {layer.pre for layer in structure.layers}))
    for layer in structure.layers:
        x = rows(values[layer.pre]).T if features == "preactivations" else model.get_submodule(layer.name)
        if isinstance(x, nn.Module):
            bias = [] if x.bias is None else [x.bias[:, None]]
            x = torch.cat([x.weight.flatten(1), *bias], 1)
        x = x - x.mean(1, keepdim=True) if cost == "correlation" else x
        x = x if cost == "euclidean" else x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if len(x) > 1 and not torch.nn.functional.pdist(x).min() > 1e-6:
            return False
    return bool(model(samples).any())


@tried(15)
@given(
    architectures(),
    st.integers(0, 99),
    st.sampled_from(CORRECTIONS),
    st.sampled_from(["preactivations", "weights"]),
    st.sampled_from(["correlation", "euclidean", "cosine"]),
)
@torch.no_grad()
def test_a_network_fused_with_a_permuted_copy_of_itself_is_itself(drawn, seed, correction, features, cost):
    model, samples = drawn.build(seed), drawn.samples(SAMPLES)
    assume(told_apart(model, samples, features, cost))
    other, orders = permuted(model, samples[:2], seed)
    fusion = fuse(
        [model, other], [samples], FusionOptions(correction=correction, targets="matched", features=features, cost=cost)
    )
    for space, order in orders.items():
        assert torch.equal(fusion.maps[1][space], torch.eye(len(order)).double()[order]), space
    assert relative_error(fusion.model, model, samples) < 1e-8


@st.composite
def aligned_pairs(draw):
    """A deeper and a shallower network, and any layer map between them."""
    deep, shallow = draw(pairs())
    stages = zip(*(trace(one.build(), one.samples(2)).stages for one in (deep, shallow)), strict=True)
    alignment = []
    for ours, theirs in stages:
        fixed = [place for place, unit in enumerate(ours) if not unit.insertable]
        others = draw(st.permutations([place for place, unit in enumerate(ours) if unit.insertable]))
        alignment.append(tuple(sorted([*fixed, *others[: len(theirs) - len(fixed)]])))
    return deep, shallow, alignment


@tried(12)
@given(aligned_pairs(), flags)
def test_insertion_is_exact_wherever_it_puts_the_layers(pair, zero_branches):
    deep, shallow, alignment = pair
    samples, original = shallow.samples(6), shallow.build(1)
    grown = insert_identities(original, deep.build(), alignment, samples, zero_branches)
    assert relative_error(grown, original, samples) < 1e-9


@tried(12)
@given(
    pairs(), st.integers(0, 1), st.sampled_from(CORRECTIONS), st.sampled_from(["exact", "sinkhorn"]), flags,
    st.sampled_from(["activations", "preactivations", "weights"]),
)  # fmt: skip
def test_any_depths_and_widths_give_a_finite_network_of_the_anchors_widths(
    pair, anchor, correction, solver, first, features
):
    parents = [drawn.build(seed) for seed, drawn in enumerate(pair)]
    samples = pair[0].samples(SAMPLES)
    anchor, parents = (1 - anchor, parents[::-1]) if first else (anchor, parents)
    options = FusionOptions(anchor=anchor, correction=correction, targets="matched", solver=solver, features=features)
    with warnings.catch_warnings():
        # Where neurons are far apart a small regularization may need more iterations than there are.
        warnings.filterwarnings("ignore", "Expected Sinkhorn's iterations to converge")
        fusion = fuse(parents, [samples], options)
    assert fusion.model(samples).isfinite().all() and fusion.model(samples).shape[1] == CLASSES
    fused, theirs, deep = (trace(net, samples[:2]) for net in (fusion.model, parents[anchor], pair[0].build()))
    assert [len(stage) for stage in fused.stages] == [len(stage) for stage in deep.stages]
    for stage, expected in zip(fused.stages, theirs.stages, strict=True):
        assert width_of(fused, stage[-1]) == width_of(theirs, expected[-1])
    summary = json.loads(json.dumps(fusion.summary(), allow_nan=False))
    assert FusionOptions(**summary["options"]) == options and summary["num_samples"] == SAMPLES


def everything(model: nn.Module) -> dict[str, object]:
    """All of a network that could be changed by accident, copied."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "hooks": [dict(module._forward_hooks) for module in model.modules()],
        "attributes": [repr(module) for module in model.modules()],
    }


@tried(15)
@given(pairs(), st.sampled_from(CORRECTIONS), st.sampled_from(["shared", "per_layer"]), st.data())
def test_parents_are_left_as_they_are(pair, correction, streams, data):
    parents, fired = [drawn.build(seed) for seed, drawn in enumerate(pair)], []
    for parent in parents:
        for module in parent.modules():
            module.training = data.draw(flags)
        for parameter in parent.parameters():
            parameter.requires_grad = data.draw(flags)
        parent.register_forward_hook(lambda *_: fired.append(1))
    before = [everything(parent) for parent in parents]
    correction = correction if streams == "shared" else "none"
    fuse(parents, [pair[0].samples(SAMPLES)], FusionOptions(correction=correction, targets="matched", streams=streams))
    for parent, kept in zip(parents, before, strict=True):
        now = everything(parent)
        tensors, kept_tensors = now.pop("tensors"), kept.pop("tensors")
        assert now == kept and not fired
        assert all(torch.equal(tensor, kept_tensors[name]) for name, tensor in tensors.items())


# --- statistics ------------------------------------------------------------------------------------------------------


@tried(30)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]), st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_streamed_statistics_are_stacked_ones(parts, n, m, extent, precision, offset):
    (dtype, tolerance), count = precision, sum(parts)
    generator = torch.Generator().manual_seed(count)
    x, y = (
        (torch.randn(count, neurons, extent, extent, generator=generator, dtype=torch.float64) + offset).to(dtype)
        for neurons in (n, m)
    )
    streamed = None
    for one, other in zip(x.split(parts), y.split(parts), strict=True):
        streamed = Moments.of(one, other, onto=streamed)
    flat = [side.double().movedim(1, -1).flatten(0, -2) for side in (x, y)]
    assert streamed.count == count * extent**2
    for got, expected in [
        (streamed.x, flat[0].sum(0)), (streamed.y, flat[1].sum(0)), (streamed.xx, flat[0].square().sum(0)),
        (streamed.yy, flat[1].square().sum(0)), (streamed.xy, flat[0].T @ flat[1]),
    ]:  # fmt: skip
        scale = max(1.0, float(expected.abs().max()))
        assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance * scale)


@tried(15)
@given(architectures(), st.integers(1, 30))
def test_statistics_do_not_depend_on_how_the_samples_are_cut(drawn, size):
    structures, samples = [trace(drawn.build(seed), drawn.samples(2)) for seed in range(2)], drawn.samples(31)
    nodes = {layer.post: tuple(Observation(k, layer.post, 1, None) for k in (0, 1)) for layer in structures[0].layers}
    runners = [GraphRunner(structure.capture) for structure in structures]
    whole, cut = (paired_moments(runners, nodes, samples, batch) for batch in (31, size))
    assert whole.keys() == cut.keys()
    for key, moments in whole.items():
        for name in ("x", "y", "xx", "yy", "xy"):
            assert torch.allclose(getattr(moments, name), getattr(cut[key], name), rtol=1e-10, atol=1e-10), (key, name)
