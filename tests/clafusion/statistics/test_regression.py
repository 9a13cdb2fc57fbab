"""The regressions against oracles of other kinds: convolutions with unit weights, least squares, L-BFGS."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from clafusion import trace
from clafusion.correction.affine import design_rows, folded_layer
from clafusion.statistics import regression
from clafusion.statistics import regression as ridge
from clafusion.statistics.regression import RidgeSystem, rectified_regression, soft_label_regression
from clafusion.statistics.samples import rows
from clafusion.tracing.execution import GraphRunner


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- design rows -----------------------------------------------------------------------------------------------------

LAYERS = {
    "point": {"kernel_size": 1},
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "large stride": {"kernel_size": 2, "stride": 3},
    "oblong": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    "oblong padding": {"kernel_size": (2, 3), "padding": (3, 1), "stride": (2, 1)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same even": {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "same reflect": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 4},
}


def conv(outputs: int, arguments: dict) -> nn.Conv2d:
    return nn.Conv2d(4, outputs, bias=False, **arguments).double()


def design_of(layer: nn.Module, x: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
    """The design rows of a layer that begins a network; padding may be an operation of its own in its graph."""
    head = nn.Linear(layer(x).flatten(1).shape[1], 3).double()
    structure = trace(nn.Sequential(layer, nn.Flatten(), head), x)
    part = folded_layer(structure, structure.layers[0])
    [(_, inputs)] = GraphRunner(structure.capture).observe(x, [part.layer.input])
    return design_rows(part, inputs, observations)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # PyTorch's copy
@pytest.mark.parametrize("name", LAYERS)
def test_design_rows_are_what_unit_weights_give(name):
    """A layer with one neuron per input, which copies it, gives the design matrix itself."""
    arguments, x = LAYERS[name], normal(3, 4, 7, 6)
    layer = conv(4, arguments)
    groups, fan_in = layer.groups, layer.weight[0].numel()
    copying = conv(groups * fan_in, arguments)
    with torch.no_grad():
        copying.weight.copy_(torch.eye(fan_in).repeat(groups, 1).reshape(copying.weight.shape))
        expected = rows(copying(x)).unflatten(1, (groups, fan_in))
        everything = torch.arange(len(expected))
        some = torch.randperm(len(expected), generator=torch.Generator().manual_seed(1))[:11]
        assert torch.equal(design_of(layer, x, everything), expected)
        assert torch.equal(design_of(layer, x, some), expected[some])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_weights_times_design_rows_are_the_output(name):
    """Group by group, in the order in which the statistics count observations."""
    layer, x = conv(8, LAYERS[name]), normal(3, 4, 7, 6)
    with torch.no_grad():
        expected = rows(layer(x))
        design = design_of(layer, x, torch.arange(len(expected)))
        weight = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
        assert torch.allclose(torch.einsum("ngi,goi->ngo", design, weight).flatten(1), expected, atol=1e-12)


def test_design_rows_against_explicit_loops():
    layer, x = conv(2, {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "groups": 2}), normal(2, 4, 5, 4)
    expected = []
    for sample in x:
        padded = torch.zeros(4, 7, 8).double()
        padded[:, 1:6, 2:6] = sample
        for top in range(0, 6, 2):
            for left in range(6):
                patch = padded[:, top : top + 2, left : left + 3]
                expected.append(torch.stack([patch[:2].flatten(), patch[2:].flatten()]))
    assert torch.equal(design_of(layer, x, torch.arange(2 * 3 * 6)), torch.stack(expected))


def test_design_rows_of_a_dense_layer_are_its_inputs():
    x, some = normal(6, 5), torch.tensor([4, 0, 0])
    assert torch.equal(design_of(nn.Linear(5, 3).double(), x, some), x[some][:, None])


# --- ridge regression ------------------------------------------------------------------------------------------------


def problem(count: int, inputs: int = 6, outputs: int = 3, groups: int = 1, intercept: bool = False, seed: int = 0):
    x = normal(count, groups, inputs, seed=seed)
    x = torch.cat([x, torch.ones(count, groups, 1)], 2) if intercept else x
    return x, normal(groups, count, outputs, seed=seed + 1), normal(groups, outputs, x.shape[2], seed=seed + 2)


def regress(system: RidgeSystem, target: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """The regression of a target, of which the prior weights leave a part."""
    return system.regress(target - system.apply(prior.double()), prior)


def least_squares(x, t, prior, ridge: float, intercept: bool) -> torch.Tensor:
    """Ridge as extra rows of an ordinary least-squares problem, group by group."""
    solved = []
    for g, target in enumerate(t):
        penalised = x.shape[2] - intercept
        scale = (ridge * x[:, g, :penalised].square().sum(0).mean()).sqrt()
        extra = torch.eye(x.shape[2]).double()[:penalised] * scale
        a, b = torch.cat([x[:, g], extra]), torch.cat([target, extra @ prior[g].T])
        solved.append(torch.from_numpy(np.linalg.lstsq(a.numpy(), b.numpy(), rcond=None)[0]).T)
    return torch.stack(solved)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("count", [2, 4, 7, 50], ids=["far fewer rows than unknowns", "fewer", "as many", "more"])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_solve_is_least_squares_with_ridge_rows(count, groups, intercept, ridge):
    x, t, prior = problem(count, groups=groups, intercept=intercept)
    solved = regress(RidgeSystem.of(x, ridge, intercept), t, prior)
    assert torch.allclose(solved, least_squares(x, t, prior, ridge, intercept), atol=1e-9)


@pytest.mark.parametrize("count", [2, 50])
def test_the_size_of_the_blocks_changes_nothing(count, monkeypatch):
    x, t, prior = problem(count, groups=2, intercept=True)
    whole = RidgeSystem.of(x, 1e-2, True)
    monkeypatch.setattr(ridge, "BLOCK", 30)
    parts = RidgeSystem.of(x, 1e-2, True)
    assert torch.allclose(parts.factor, whole.factor, atol=1e-12)
    assert torch.allclose(regress(parts, t, prior), regress(whole, t, prior), atol=1e-12)


def test_the_gram_matrix_of_the_observations_is_factorised_where_it_is_much_smaller():
    wide, tall = (RidgeSystem.of(problem(count, intercept=True)[0], 1e-2, True) for count in (2, 3))
    assert wide.factor.shape == (1, 2, 2) and tall.factor.shape == (1, 6, 6)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_ridge_few_and_equal_observations_are_met_with_the_smallest_change(dtype, intercept):
    x, t, prior = problem(5, inputs=40, intercept=intercept)
    x[4], t[:, 4] = x[3], t[:, 3]
    solved = regress(RidgeSystem.of(x.to(dtype), 0.0, intercept), t, prior)
    assert torch.allclose(solved, least_squares(x, t, prior, 1e-9, intercept), atol=1e-4)
    assert torch.allclose(torch.einsum("ngi,goi->gno", x, solved), t, atol=1e-5)


def test_a_gram_matrix_that_rounding_made_indefinite_is_computed_again_in_float64():
    x, t, prior = problem(50, intercept=True)
    x[:, :, :6] = 1 + 1e-4 * x[:, :, :6]
    rounded = x.float()
    inputs = rounded[:, :, :6]
    assert ridge._cholesky(ridge._gram(inputs, inputs.double().mean(0)), torch.tensor([5e-9])) is None
    solved = regress(RidgeSystem.of(rounded, 1e-10, True), t, prior)
    assert torch.allclose(solved, least_squares(rounded.double(), t, prior, 1e-10, True), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [2, 50])
def test_moments_are_those_of_what_the_weights_give(dtype, count):
    x, _, weight = problem(count, groups=2, intercept=True)
    mean, variance = RidgeSystem.of(x.to(dtype), 1e-2, True).moments(weight[..., 2:5], slice(2, 5))
    outputs = torch.einsum("ngi,goi->ngo", x[..., 2:5].to(dtype).double(), weight[..., 2:5]).flatten(1)
    assert mean.dtype == torch.float64
    assert torch.allclose(mean, outputs.mean(0)) and torch.allclose(variance, outputs.var(0, correction=0))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("count", [2, 50])
def test_a_prior_that_fits_comes_back(count, intercept):
    x, _, prior = problem(count, groups=2, intercept=intercept)
    t = torch.einsum("ngi,goi->gno", x, prior)
    assert torch.allclose(regress(RidgeSystem.of(x, 1e-4, intercept), t, prior), prior, atol=1e-12)


def test_an_input_without_signal_keeps_its_weights():
    x, t, prior = problem(50, intercept=True)
    x[:, :, 2] = 0
    solved = regress(RidgeSystem.of(x, 1e-4, True), t, prior)
    assert torch.allclose(solved[..., 2], prior[..., 2], atol=1e-14)
    assert not torch.allclose(solved[..., 1], prior[..., 1], atol=1e-2)


@pytest.mark.parametrize("intercept", [False, True])
def test_a_dead_layer_keeps_its_weights_and_the_bias_takes_the_mean(intercept):
    x, t, prior = problem(50, intercept=intercept)
    x[:, :, :6] = 0
    solved = regress(RidgeSystem.of(x, 1e-4, intercept), t, prior)
    assert torch.allclose(solved[..., :6], prior[..., :6], atol=1e-14)
    assert not intercept or torch.allclose(solved[0, :, 6], t[0].mean(0), atol=1e-9)


def test_constant_and_equal_inputs_are_no_obstacle():
    x, t, prior = problem(50, intercept=True)
    x[:, :, 1], x[:, :, 3] = 2.5, x[:, :, 4]
    solved = regress(RidgeSystem.of(x, 1e-6, True), t, prior)
    assert torch.allclose(solved, least_squares(x, t, prior, 1e-6, True), atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_a_heavy_ridge_leaves_the_intercept_free(intercept):
    x, t, prior = problem(50, intercept=intercept)
    solved = regress(RidgeSystem.of(x, 1e9, intercept), t, prior)
    assert torch.allclose(solved[..., :6], prior[..., :6], atol=1e-6)
    if intercept:
        rest = (t[0] - x[:, 0, :6] @ prior[0, :, :6].T).mean(0)
        assert torch.allclose(solved[0, :, 6], rest, atol=1e-6)


def test_the_ridge_has_the_unit_of_its_inputs():
    """Inputs a thousand times larger ask for weights a thousand times smaller, whatever the ridge."""
    x, t, prior = problem(50)
    one = regress(RidgeSystem.of(x, 0.1, False), t, prior)
    other = regress(RidgeSystem.of(x * 1000, 0.1, False), t, prior / 1000)
    assert torch.allclose(other * 1000, one, atol=1e-10)


# --- what a ReLU lets through ----------------------------------------------------------------------------------------


def rectified_problem(count=200, offset=None, shift=0.0, intercept=True, seed=0, groups=2):
    x, t, prior = problem(count, intercept=intercept, seed=seed, groups=groups)
    offset = torch.zeros(()).double() if offset is None else offset
    return x, t + shift, offset, prior


def rectify(x, target, offset, prior, ridge, intercept=True) -> torch.Tensor:
    system = RidgeSystem.of(x, ridge, intercept)
    return rectified_regression(system, target, system.apply(prior) + offset, prior)


def rectified_error(weight, x, target, offset) -> torch.Tensor:
    y = torch.einsum("ngi,goi->gno", x, weight) + offset
    return torch.where(target > 0, target - y, y.clamp_min(0)).square().sum()


def rectified_objective(weight, x, target, offset, prior, ridge, intercept=True) -> torch.Tensor:
    penalised = slice(x.shape[2] - intercept)
    pull = ridge * x[:, :, penalised].square().sum(0).mean(1)
    distance = (weight - prior)[:, :, penalised].square().sum((1, 2))
    return rectified_error(weight, x, target, offset) + (pull * distance).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("on_offset", [False, True], ids=["alone", "on an offset"])
@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_rectified_regression_descends_to_the_minimum(ridge, on_offset, seed, monkeypatch):
    offset = normal(2, 200, 3, seed=9) if on_offset else None
    arguments = rectified_problem(offset=offset, seed=seed)

    def objective(steps):
        monkeypatch.setattr(regression, "RECTIFIED_STEPS", steps)
        return float(rectified_objective(rectify(*arguments, ridge), *arguments, ridge))

    in_practice = objective(regression.RECTIFIED_STEPS)
    x, target, offset, prior = arguments
    ridge_only = regress(RidgeSystem.of(x, ridge, True), target - offset, prior)
    start = objective(0)
    assert start == pytest.approx(float(rectified_objective(ridge_only, *arguments, ridge)))
    least = minimum(lambda w: rectified_objective(w, *arguments, ridge), prior)
    assert objective(400) == pytest.approx(least, rel=1e-8)
    assert in_practice - least < 0.05 * (start - least)


@pytest.mark.parametrize("intercept", [True, False])
def test_with_few_observations_it_takes_the_same_steps(intercept):
    """In coefficients of the observations and in those of the inputs."""
    x, target, offset, prior = rectified_problem(2, offset=normal(2, 2, 3, seed=9), intercept=intercept)
    few = RidgeSystem.of(x, 1e-2, intercept)
    penalised = x[:, :, : x.shape[2] - intercept]
    factor = ridge._cholesky(ridge._gram(penalised, few.mean[:, :, 0]), few.penalty.flatten())
    plain = dataclasses.replace(few, factor=factor, kernel=None)
    assert few.kernel is not None
    base = plain.apply(prior) + offset
    expected = rectified_regression(plain, target, base, prior)
    assert torch.allclose(rectified_regression(few, target, base, prior), expected, atol=1e-10)
    assert not torch.allclose(expected, regress(plain, target - offset, prior), atol=1e-2)


def minimum(objective, start: torch.Tensor) -> float:
    """The least value of a smooth convex function, by L-BFGS."""

    def value_and_gradient(flat):
        weight = torch.from_numpy(flat).reshape(start.shape).requires_grad_(True)
        value = objective(weight)
        value.backward()
        return value.item(), weight.grad.flatten().numpy()

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    return minimize(value_and_gradient, start.flatten().numpy(), jac=True, method="L-BFGS-B", options=options).fun


@pytest.mark.parametrize("seed", range(5))
def test_rectified_regression_is_better_at_what_passes_the_relu(seed):
    x, target, offset, prior = rectified_problem(seed=seed)
    plain = regress(RidgeSystem.of(x, 1e-4, True), target - offset, prior)
    rectified = rectify(x, target, offset, prior, 1e-4)
    assert rectified_error(rectified, x, target, offset) < 0.98 * rectified_error(plain, x, target, offset)


@pytest.mark.parametrize("offset", [None, normal(2, 200, 3, seed=9)])
@pytest.mark.parametrize("intercept", [True, False])
def test_where_every_target_passes_it_is_plain_ridge(offset, intercept):
    arguments = rectified_problem(offset=offset, shift=50.0, intercept=intercept)
    x, target, offset, prior = arguments
    assert (target > 0).all()
    expected = least_squares(x, target - offset, prior, 1e-2, intercept)
    assert torch.allclose(rectify(*arguments, 1e-2, intercept), expected, atol=1e-9)


def test_a_fit_that_is_right_stays_whatever_passes():
    x, _, offset, prior = rectified_problem(offset=normal(2, 200, 3, seed=9))
    target = torch.einsum("ngi,goi->gno", x, prior) + offset
    assert 0.2 < (target > 0).double().mean() < 0.8
    assert torch.allclose(rectify(x, target, offset, prior, 1e-3), prior, atol=1e-12)


# --- soft labels -----------------------------------------------------------------------------------------------------


def soft_labels(count=150, classes=4, seed=0, intercept=True):
    x, _, prior = problem(count, outputs=classes, intercept=intercept, seed=seed)
    return x[:, 0], (2 * normal(count, classes, seed=seed + 5)).softmax(1), prior[0]


def soft_regress(x, probabilities, prior, ridge, intercept):
    """The regression of a single group."""
    return soft_label_regression(x[:, None], probabilities[None], prior[None], ridge, intercept)[0]


def soft_objective(weight, x, probabilities, prior, ridge, intercept=True) -> torch.Tensor:
    free = x.shape[1] - intercept
    pull = ridge * x[:, :free].square().sum(0).mean()
    cross_entropy = -(probabilities * (x @ weight.T).log_softmax(1)).sum()
    return cross_entropy + pull / 2 * (weight - prior)[:, :free].square().sum()


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_soft_label_regression_ends_where_the_gradient_is_zero(seed, ridge, intercept):
    x, probabilities, prior = soft_labels(seed=seed, intercept=intercept)
    weight = soft_regress(x, probabilities, prior, ridge, intercept).requires_grad_(True)
    objective = soft_objective(weight, x, probabilities, prior, ridge, intercept)
    objective.backward()
    start = prior.clone().requires_grad_(True)
    soft_objective(start, x, probabilities, prior, ridge, intercept).backward()
    assert weight.grad.norm() < 1e-6 * start.grad.norm()
    least = minimum(lambda w: soft_objective(w, x, probabilities, prior, ridge, intercept), prior)
    assert objective.item() == pytest.approx(least, rel=1e-9)


def test_groups_are_regressions_of_their_own():
    problems, ridges = [soft_labels(seed=seed) for seed in range(3)], [1e-3, 0.1, 10.0]
    apart = [soft_regress(*one, ridge, True) for one, ridge in zip(problems, ridges, strict=True)]
    x, probabilities, priors = (torch.stack(many) for many in zip(*problems, strict=True))
    together = soft_label_regression(x.transpose(0, 1), probabilities, priors, torch.tensor(ridges), True)
    assert torch.allclose(together, torch.stack(apart), atol=1e-7)


def test_soft_label_regression_never_goes_up(monkeypatch):
    x, probabilities, prior = soft_labels()
    objectives = []
    for steps in (0, 1, 2, 3, 5, 10, 30, 100):
        monkeypatch.setattr(regression, "SOFT_LABEL_STEPS", steps)
        weight = soft_regress(x, probabilities, prior, 1e-4, True)
        objectives.append(float(soft_objective(weight, x, probabilities, prior, 1e-4)))
    assert all(later <= earlier + 1e-9 for earlier, later in zip(objectives, objectives[1:], strict=False))
    assert objectives[0] > 1.5 * objectives[-1]


@pytest.mark.parametrize("count", [2, 150])
def test_a_start_that_is_right_stays(count):
    x, _, prior = soft_labels(count)
    weight = soft_regress(x, (x @ prior.T).softmax(1), prior, 1e-4, True)
    assert torch.allclose(weight, prior, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_iterations_return_float64(dtype):
    x, target, offset, prior = rectified_problem()
    x, target, offset = (tensor.to(dtype) for tensor in (x, target, offset))
    assert rectify(x, target, offset, prior, 1e-4).dtype == torch.float64
    assert soft_regress(x[:, 0], target[0].softmax(1), prior[0], 1e-4, True).dtype == torch.float64
