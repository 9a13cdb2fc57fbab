"""Corrections: what is right is left alone, what is measured is matched, what is regressed is the closed form."""

import copy
import functools

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from clafusion import Ensemble, FusionError, FusionOptions, fuse, insert_identities, networks, trace
from clafusion.balancing.correspondence import itself
from clafusion.correction import refit
from clafusion.correction.steps import steps_of
from clafusion.correction.targets import Targets
from clafusion.networks import MLP
from clafusion.statistics.samples import rows
from clafusion.tracing.resizing import resized
from clafusion.transport.balanced import Balanced
from tests.helpers import images, largest_difference, mlp, permuted, randomised, relative_error, resnet, vectors, vgg

CORRECTIONS = ["rescale", "repair", "refit"]
FLAGS = {
    "bias": {"bias": True},
    "norm": {"batch_norm": True},
    "both": {"bias": True, "batch_norm": True},
    "neither": {},
}
FAMILIES = {
    "mlp": (lambda seed, **more: mlp([9, 8, 7], seed, **more), vectors(80)),
    "vgg": (lambda seed, **more: vgg([[5], [6, 7]], seed, **more), images(30, 8)),
    "basic": (lambda seed, **more: resnet([1, 2], seed, **more), images(30, 8)),
    "bottleneck": (lambda seed, **more: resnet([1, 2], seed, width=3, block="bottleneck", **more), images(40, 8)),
}
DEEPER = {
    "mlp": {"hidden": [9, 8, 7, 7, 7]},
    "vgg": {"channels": [[5, 5], [6, 7, 7]]},
    "basic": {"blocks": [3, 3]},
    "bottleneck": {"blocks": [2, 3]},
}
IGNORE_SCARCITY = pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning")


def corrected(models, samples, correction, **more):
    return fuse(models, [samples], FusionOptions(**{"correction": correction, "targets": "matched", "seed": 3, **more}))


# --- what is right is left alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("flags", "dtype", "tolerance"),
    [("neither", torch.float64, 1e-9), ("bias", torch.float64, 1e-9), *((name, torch.float32, 1e-5) for name in FLAGS)],
)
def test_fused_with_a_permuted_copy_is_itself(family, flags, correction, dtype, tolerance):
    make, samples = FAMILIES[family]
    model, samples = make(1, **FLAGS[flags]).to(dtype), samples.to(dtype)
    other, _ = permuted(model, samples[:2], seed=1)
    assert relative_error(corrected([model, other], samples, correction).model, model, samples) < tolerance


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("flags", "anchor"), [("both", 0), ("neither", 1)])
def test_fused_with_its_own_deeper_self_is_itself(family, flags, correction, anchor):
    make, samples = FAMILIES[family]
    shallow = make(1, **FLAGS[flags])
    deep = networks.build({**shallow.architecture, **DEEPER[family]}).double()
    alignment = [tuple(range(len(stage))) for stage in trace(shallow, samples[:2]).stages]
    deeper = insert_identities(shallow, deep, alignment, samples[:4])
    copied, _ = permuted(shallow, samples[:2], seed=1)
    fused = corrected([deeper, copied], samples, correction, mapping="chain", anchor=anchor).model
    assert len(trace(fused, samples[:2]).units) > len(trace(shallow, samples[:2]).units)
    assert relative_error(fused, shallow, samples) < 1e-9


def narrowed(name: str, seed: int = 0) -> nn.Module:
    """A network of torchvision's with an eighth of its channels."""
    model = torchvision.models.get_model(name, num_classes=10).eval()
    structure = trace(model, torch.zeros(2, 3, 64, 64))
    sizes = {space: max(4, structure.sizes[space] // 8) for space in structure.free_spaces}
    return randomised(resized(model, structure, sizes), seed)


NETWORKS = [(name, correction) for name in ("resnet18", "mobilenet_v2", "alexnet") for correction in CORRECTIONS]


@IGNORE_SCARCITY
@pytest.mark.parametrize(("name", "correction"), NETWORKS)
def test_networks_of_torchvision(name, correction):
    samples = images(16, 64 if name == "alexnet" else 32)
    model = narrowed(name)
    other, _ = permuted(model, samples[:2], seed=1)
    fused = corrected([model, other], samples, correction, features="preactivations").model
    assert relative_error(fused, model, samples) < 2e-9
    if correction == "refit":
        stranger = corrected([model, narrowed(name, 1)], samples, correction).model
        assert stranger(samples).isfinite().all() and relative_error(stranger, model, samples) > 1e-2


class Projected(nn.Module):
    """A residual block whose branch and projection may each have a bias or none."""

    def __init__(self, branch: bool, projection: bool) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.conv2, self.projection = nn.Conv2d(5, 6, 3, bias=branch, padding=1), nn.Conv2d(4, 6, 1, bias=projection)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.conv2(self.conv1(x).relu()) + self.projection(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("projection", [True, False])
def test_a_bias_on_either_side_of_the_addition_is_kept(branch, projection, correction):
    model, samples = randomised(Projected(branch, projection)), images(30, 8)
    other, _ = permuted(model, samples[:2], seed=1)
    assert relative_error(corrected([model, other], samples, correction).model, model, samples) < 1e-9


@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_refit_with_all_the_weight_on_the_anchor_gives_the_anchor(family, anchor):
    make, samples = FAMILIES[family]
    models = [make(0, bias=True), networks.build({**make(0, bias=True).architecture, **DEEPER[family]}).double()]
    randomised(models[1], 1)
    weights = [float(k == anchor) for k in range(2)]
    samples = torch.cat([samples, 1.5 * samples.flip(0)])
    fusion = corrected(models, samples, "refit", anchor=anchor, weights=weights, mapping="chain")
    assert relative_error(fusion.model, models[anchor], samples) < 1e-8


# --- what is measured is matched -------------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of(model: nn.Module, samples: Tensor, behind_norms: bool = True) -> dict[str, Tensor]:
    """What every Linear and Conv2d gives, after the norm behind it or before, by forward hooks in running order."""
    found: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def keep(module, _, output):
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[names[module]] = rows(output)
        elif behind_norms and isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            found[list(found)[-1]] = rows(output)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    model(samples)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("correction", ["rescale", "repair"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_neuron_has_the_mean_spread_of_the_parents(family, flags, correction):
    """In the corrected network every layer sees corrected inputs, so that all moments can be seen at its end."""
    make, samples = FAMILIES[family]
    models, weights = [make(0, **FLAGS[flags]), make(1, **FLAGS[flags])], [0.7, 0.3]
    fusion = corrected(models, samples, correction, weights=weights)
    structure = trace(fusion.model, samples[:2])
    got = outputs_of(fusion.model, samples)
    parents = [outputs_of(parent, samples) for parent in fusion.balanced]
    checked = 0
    for layer in structure.layers:
        moments, [space] = [], structure.written(layer).spaces
        for maps, outputs in zip(fusion.maps, parents, strict=True):
            x = outputs[layer.name]
            mapping = maps.get(space, torch.eye(x.shape[1]).double())
            moments.append(torch.stack([x.std(0, correction=0), x.mean(0)]) @ mapping)
        deviation, mean = weights[0] * moments[0] + weights[1] * moments[1]
        assert torch.allclose(got[layer.name].std(0, correction=0), deviation, atol=1e-9), layer.name
        # The head of a network with norms alone has nothing that could hold a shift.
        if correction == "repair" and not (flags == "norm" and space == structure.output):
            assert torch.allclose(got[layer.name].mean(0), mean, atol=1e-9), layer.name
            checked += 1
    assert checked > 1 or correction == "rescale"


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_gives_biases_to_a_network_that_has_nothing_to_shift_with(family):
    make, samples = FAMILIES[family]
    models = [make(0), make(1)]
    fused = corrected(models, samples, "repair").model
    assert not models[0].architecture["bias"] and fused.architecture["bias"]
    assert all(m.bias is not None and m.bias.any() for m in fused.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    rebuilt = networks.build(fused.architecture).double().eval()
    rebuilt.load_state_dict(fused.state_dict())
    assert torch.equal(rebuilt(samples), fused(samples))
    for other in ("none", "rescale", "refit"):
        assert not corrected(models, samples, other).model.architecture["bias"]
    assert list(corrected([make(0, batch_norm=True)] * 2, samples, "repair").model.state_dict()) == list(
        make(0, batch_norm=True).state_dict()
    )


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("flags", ["norm", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_running_statistics_are_averages_over_the_samples(family, flags, correction, monkeypatch):
    monkeypatch.setattr(refit, "ROWS_PER_INPUT", 10**6)  # or they would be averages over the observations it uses
    make, samples = FAMILIES[family]
    fused = corrected([make(0, **FLAGS[flags]), make(1, **FLAGS[flags])], samples, correction).model
    seen: dict[nn.Module, Tensor] = {}
    norms = [module for module in fused.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]})) for norm in norms]
    with torch.no_grad():
        fused(samples)
    assert len(seen) == len(norms) > 1 and len(hooks) == len(norms)
    for norm, given in seen.items():
        assert torch.allclose(rows(given).mean(0), norm.running_mean, atol=1e-9)
        assert torch.allclose(rows(given).var(0, correction=0), norm.running_var, atol=1e-9)


def test_constant_neurons_keep_the_mean_of_their_values():
    for seed in range(12):
        models, generator = [mlp([9, 8, 7], k, bias=True) for k in range(2)], torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for model in models:
                model.fc2.weight[:3] = 0
                model.fc2.bias[:3] = torch.rand(3, generator=generator) + 0.1
        fused = corrected(models, vectors(197, seed=seed), "rescale", combine="average").model
        assert torch.allclose(fused.fc2.bias[:3], (models[0].fc2.bias + models[1].fc2.bias)[:3] / 2, atol=1e-9)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_constant_and_dead_inputs_do_no_harm(correction):
    samples = vectors(80)
    samples[:, 0], samples[:, 1] = 0, 3
    models = [mlp([9, 8], seed, bias=True) for seed in range(2)]
    with torch.no_grad():
        for model in models:
            model.fc1.bias[:2] -= 1000
    fused = corrected(models, samples, correction).model
    assert all(tensor.isfinite().all() for tensor in fused.state_dict().values())
    assert fused(samples).abs().max().item() < 100


# --- what is regressed is the closed form ----------------------------------------------------------------------------


def linear_chain(seed: int) -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)), seed)


def test_refit_of_linear_layers_is_ridge_regression_by_hand():
    models, samples, ridge = [linear_chain(0), linear_chain(1)], vectors(200, 6), 0.05
    options = {"head": "anchor", "ridge": ridge, "weights": [0.2, 0.4], "anchor_lead": 3.0}
    fusion = corrected(models, samples, "refit", **options)
    averaged = corrected(models, samples, "none", **options).model
    maps = [fusion.maps[1][space].numpy() for space in ("0", "1")]
    hidden = [[model[:depth](samples).detach().numpy() for depth in (1, 2, 3)] for model in models]
    targets = [0.6 * hidden[0][depth] + 0.4 * hidden[1][depth] @ maps[depth] for depth in (0, 1)] + [hidden[0][2]]
    x = samples.numpy()
    for layer, prior, target in zip(fusion.model, averaged, targets, strict=True):
        weight, bias = ridge_by_hand(x, target, prior.weight.detach().numpy(), ridge)
        assert np.allclose(layer.weight.detach().numpy(), weight, atol=1e-9)
        assert np.allclose(layer.bias.detach().numpy(), bias, atol=1e-9)
        x = x @ weight.T + bias
    assert not torch.allclose(fusion.model[1].weight, averaged[1].weight, atol=1e-2)


def ridge_by_hand(x, target, prior, ridge):
    """On centred data, where the intercept drops out."""
    centre, middle = x.mean(0), target.mean(0)
    pull = ridge * np.square(x).sum() / x.shape[1] * np.eye(x.shape[1])
    gram = (x - centre).T @ (x - centre) + pull
    weight = np.linalg.solve(gram, (x - centre).T @ (target - middle) + pull @ prior.T).T
    return weight, middle - weight @ centre


# --- everything else stays what it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("family", ["mlp", "basic"])
@pytest.mark.parametrize("flags", ["neither", "both"])
def test_parents_are_untouched_and_two_runs_are_one(family, flags, correction):
    make, samples = FAMILIES[family]
    models = [make(k, **FLAGS[flags]).float().train() for k in range(2)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    state, given = torch.get_rng_state(), samples.clone()
    one, two = (corrected(models, samples, correction) for _ in range(2))
    assert largest_difference(one.model, two.model) == 0
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(samples, given)
    for model, expected in zip(models, before, strict=True):
        assert model.training and all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
        assert list(model.state_dict()) == list(expected)
    uncorrected = corrected(models, samples, "none")
    assert largest_difference(one.balanced[1], uncorrected.balanced[1]) == 0


# --- every setting, and what it is good for --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order]).double() / 8 - 1, torch.from_numpy(y[order])


def trained(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    randomised(model, seed).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        chosen = slice(step % 12 * 100, step % 12 * 100 + 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval().requires_grad_(True)


@pytest.fixture(scope="module")
def trained_mlps(digits) -> list[nn.Module]:
    shapes = [[24, 20, 16], [20, 16], [28, 16, 12]]
    return [trained(networks.MLP(64, hidden, 10, bias=True), *digits, k) for k, hidden in enumerate(shapes)]


SETTINGS: dict[str, tuple[list[int], dict]] = {
    "pair": ([0, 1], {}),
    "shallow anchor": ([0, 1], {"anchor": 1}),
    "merge": ([0, 1], {"balance": "merge"}),
    "merge to the deep anchor": ([0, 1], {"balance": "merge", "anchor": 1}),
    "unequal widths": ([0, 2], {"weights": [0.3, 0.7]}),
    "three": ([0, 1, 2], {}),
    "iterative": ([0, 1, 2], {"many": "iterative", "anchor": 2}),
    "head transport": ([0, 1], {"head": "transport"}),
    "head anchor": ([0, 1], {"head": "anchor", "anchor": 1}),
    "soft map": ([0, 1], {"solver": "sinkhorn"}),
    "average": ([0, 0], {"combine": "average"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_refit_comes_closer_to_the_parents(setting, trained_mlps, digits):
    """On samples it has not seen, to their mean probability and, where the head may be averaged, their mean logits."""
    chosen, options = SETTINGS[setting]
    parents = [trained_mlps[k] for k in chosen]
    if options.get("combine") == "average":
        parents[1] = trained(copy.deepcopy(parents[0]), *digits, 5)
    aim = parents[options["anchor"]] if options.get("head") == "anchor" else Ensemble(parents, options.get("weights"))
    errors = {}
    for correction in ("none", *CORRECTIONS):
        fused = corrected(parents, digits[0][:1200], correction, **options).model
        assert all(tensor.isfinite().all() for tensor in fused.state_dict().values())
        with torch.no_grad():
            got, wanted = (model(digits[0][1200:]).log_softmax(1) for model in (fused, aim))
        errors[correction] = float(nn.functional.kl_div(got, wanted, log_target=True, reduction="batchmean"))
    assert errors["refit"] < 0.7 * errors["none"], errors


@pytest.mark.parametrize("flags", ["neither", "both"])
def test_refit_comes_closer_for_residual_networks_too(flags, digits):
    x = digits[0].unflatten(1, (1, 8, 8))
    parents = [
        trained(networks.ResNet(blocks, 6, 10, in_channels=1, **FLAGS[flags]), x, digits[1], seed)
        for seed, blocks in enumerate(([2, 1], [1, 1]))
    ]
    errors = {}
    for correction in ("none", "refit"):
        fused = corrected(parents, x[:600], correction).model
        with torch.no_grad():
            got, wanted = (model(x[1200:]).log_softmax(1) for model in (fused, Ensemble(parents)))
        errors[correction] = float((got - wanted).square().mean())
    assert errors["refit"] < 0.5 * errors["none"], errors


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """The features of the last hidden layer of an MLP."""
    *body, _ = (module for module in model.modules() if isinstance(module, nn.Linear))
    return functools.reduce(lambda h, layer: layer(h).relu(), body, x).detach()


@pytest.mark.parametrize("anchor", [0, 1])
@torch.no_grad()
def test_the_lead_of_the_anchor_is_about_its_features_and_not_about_what_is_predicted(anchor, trained_mlps, digits):
    parents, (x, _) = [trained_mlps[k] for k in (0, 2)], digits
    aim = Ensemble(parents)(x).log_softmax(1)
    distances, errors = {}, {}
    for lead in (1.0, 6.0, 1e12):
        fused = corrected(parents, x, "refit", anchor=anchor, anchor_lead=lead).model
        distances[lead] = float((hidden(fused, x) - hidden(parents[anchor], x)).square().mean())
        errors[lead] = float(nn.functional.kl_div(fused(x).log_softmax(1), aim, log_target=True, reduction="batchmean"))
    assert 1000 * distances[1e12] < 2 * distances[6.0] < distances[1.0]
    alone = nn.functional.kl_div(parents[anchor](x).log_softmax(1), aim, log_target=True, reduction="batchmean")
    assert max(errors[6.0], errors[1e12]) < 0.8 * float(alone), (errors, alone)


def test_the_lead_of_the_anchor_is_against_each_of_the_others():
    models = [MLP(6, [5, 4], 3).eval() for _ in range(4)]
    parents = tuple(itself(trace(model, vectors(2, 6).float())) for model in models)
    structure = parents[0].structure
    owners = {unit.name: dict.fromkeys(range(4), 1.0) for unit in structure.units}
    weights = [0.1, 0.4, 0.3, 0.2]
    targets = Targets(
        Balanced(parents, owners, 1, 0, structure.axes), [{}] * 4, weights, FusionOptions(anchor_lead=3.0)
    )
    (first, *_, last) = steps_of(structure)
    found = targets.shares(first)
    assert found == pytest.approx({0: 0.1 / 3.4, 1: 7 * 0.4 / 3.4, 2: 0.3 / 3.4, 3: 0.2 / 3.4})
    assert targets.shares(last) == pytest.approx(dict(enumerate(weights)))


# --- what it says ----------------------------------------------------------------------------------------------------


def test_fewer_observations_than_inputs_are_named_once_and_do_no_harm():
    model, few = mlp([9, 8, 7], bias=True), vectors(9)
    other, _ = permuted(model, few[:2], seed=1)
    message = (
        r"^Expected at least as many observations as inputs to refit every layer from, got 9 for the 13 of 'fc1' "
        r"and 1 more; the ridge decides the rest, pass more samples$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        fused = corrected([model, other], few, "refit").model
    assert len(caught) == 1
    assert relative_error(fused, model, few) < 1e-9
    with pytest.warns(UserWarning, match=message) as caught:
        assert corrected([model, mlp([9, 8, 7], 1, bias=True)], few, "refit").model(few).isfinite().all()
    assert len(caught) == 1


def test_positions_are_observations():
    """Four images of 8x8 are enough for the convolutions, and too few for the head."""
    with pytest.warns(UserWarning, match="got 4 for the 7 of 'linear|got 4 for the 7 of 'classifier") as caught:
        corrected([vgg([[5], [7]], 0), vgg([[5], [7]], 1)], images(4, 8), "refit")
    assert len(caught) == 1


def test_every_step_of_a_fold_says_the_same():
    models = [mlp([9, 8], seed) for seed in range(3)]
    with pytest.warns(UserWarning, match="got 9 for the 12 of 'fc1'; the ridge") as caught:
        corrected(models, vectors(9), "refit", many="iterative")
    assert len({str(warning.message) for warning in caught}) == 1


@pytest.mark.parametrize("correction", ["none", "rescale", "repair"])
def test_nothing_but_refit_needs_many_observations(correction):
    corrected([mlp([9, 8, 7]), mlp([9, 8, 7], 1)], vectors(5), correction)


def late_norm() -> nn.Module:
    """A norm behind a ReLU, one behind a pooling, and one where it belongs."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5),
        nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(6),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_norm_that_cannot_be_corrected_is_named_and_everything_else_is(correction):
    model, stranger, samples = randomised(late_norm(), 0), randomised(late_norm(), 1), images(60, 8)
    other, _ = permuted(model, samples[:2], seed=1)
    message = (
        "^Expected layers and norms that can be corrected, got the norm '2', which follows no layer directly and 1 "
        "more; this stays averaged, everything else is corrected$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        assert relative_error(corrected([model, other], samples, correction).model, model, samples) < 1e-9
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=message):
        fused = corrected([model, stranger], samples, correction).model
    averaged = corrected([model, stranger], samples, "none").model
    same = {name for name, tensor in fused.state_dict().items() if torch.equal(tensor, averaged.state_dict()[name])}
    assert {name.split(".")[0] for name in same if "num_batches" not in name} == {"2", "7"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "reset"}, "correction to be one of none, rescale, repair, refit, got 'reset'"),
        ({"correction": None}, "correction to be one of none, rescale, repair, refit, got None"),
        ({"ridge": 0.0}, "Expected a positive ridge, got 0.0"),
        ({"ridge": -1}, "Expected a positive ridge, got -1"),
        ({"ridge": float("nan")}, "Expected a positive ridge, got nan"),
        ({"ridge": True}, "Expected ridge to be a number, got True"),
        *(({"correction": name, "streams": "per_layer"}, f"per_layer, got {name}; share") for name in CORRECTIONS),
    ],
)
def test_refuses(options, message):
    with pytest.raises(FusionError, match=message):
        FusionOptions(**options)
