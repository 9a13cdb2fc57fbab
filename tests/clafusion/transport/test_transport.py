"""Ground costs, plans and maps."""

import ot
import pytest
import torch

from clafusion import FusionError, FusionOptions, transport_map
from clafusion.statistics.moments import Moments
from clafusion.transport import solvers
from clafusion.transport.solvers import as_map, gromov_plan, ground_cost, transport_plan

SOLVERS = ["exact", "sinkhorn", "unbalanced"]


def random_cost(n, m, seed=0):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(observations, neurons, seed=0):
    return torch.randn(observations, neurons, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mass(kind, n, seed):
    if kind == "uniform":
        return torch.full((n,), 1 / n, dtype=torch.float64)
    weights = random_cost(n, 3, seed) + 0.1
    norms = weights.norm(1 if kind == "l1" else 2, dim=1)
    return norms / norms.sum()


# --- ground costs ----------------------------------------------------------------------------------------------------


def test_euclidean_cost_is_the_distance_of_the_feature_vectors():
    x, y = features(30, 4), features(30, 5, 1)
    expected = torch.cdist(x.T, y.T)
    assert torch.allclose(ground_cost(Moments.of(x, y), "euclidean"), expected, atol=1e-10)
    assert torch.allclose(ground_cost(Moments.of(x, y), "euclidean", squared=True), expected**2, atol=1e-10)
    near = torch.cdist(x.T, x.T + 1e-3)
    assert torch.allclose(ground_cost(Moments.of(x, x + 1e-3), "euclidean"), near, atol=1e-6)


def test_correlation_and_cosine_costs_are_what_they_say():
    x, y = features(30, 4) + 2, features(30, 5, 1) - 1
    correlation = torch.corrcoef(torch.cat([x, y], 1).T)[:4, 4:]
    assert torch.allclose(ground_cost(Moments.of(x, y)), 1 - correlation, atol=1e-10)
    cosine = torch.nn.functional.cosine_similarity(x.T[:, None], y.T[None], dim=2)
    assert torch.allclose(ground_cost(Moments.of(x, y), "cosine"), 1 - cosine, atol=1e-10)


def test_normalisations():
    moments = Moments.of(features(30, 4), features(30, 5, 1))
    cost = ground_cost(moments)
    for normalize, divisor in {"max": cost.max(), "mean": cost.mean(), "median": cost.median()}.items():
        assert torch.allclose(ground_cost(moments, normalize=normalize), cost / divisor)
    assert torch.allclose(ground_cost(moments, normalize="log"), (1 + cost).log())


@pytest.mark.parametrize("normalize", ["none", "max", "mean", "median", "log"])
@pytest.mark.parametrize("kind", ["euclidean", "correlation", "cosine"])
def test_costs_are_finite_and_not_negative_whatever_neurons_do(kind, normalize):
    x, y = features(50, 4), features(50, 4, 1)
    x[:, 0], y[:, 0] = 0.0, 0.0
    x[:, 1], y[:, 1] = 3.7, 1e3
    y[:, 2] = x[:, 2]
    for pair in [(x, y), (torch.zeros(50, 3), torch.zeros(50, 3)), (x, x)]:
        cost = ground_cost(Moments.of(*pair), kind, normalize=normalize)
        assert cost.isfinite().all() and (cost >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1234.567])
def test_a_neuron_that_does_not_vary_is_at_distance_one_from_all(constant, scale):
    """Also when it is large and the others vary little: its variance is then nothing but rounding."""
    x, y = features(500, 3) * scale, features(500, 4, 1) * scale
    x[:, 0], y[:, 1] = constant, constant
    cost = ground_cost(Moments.of(x, y))
    assert torch.equal(cost[0], torch.ones(4).double()) and torch.equal(cost[:, 1], torch.ones(3).double())
    assert ((cost - 1).abs()[1:, [0, 2, 3]] > 1e-6).all()


def test_the_rounding_of_many_constants_is_no_variance():
    """Some are rounded up, some down."""
    constants = torch.logspace(-3, 3, 200, dtype=torch.float64).expand(300, 200)
    cost = ground_cost(Moments.of(constants, constants))
    assert torch.equal(cost, torch.ones_like(cost))


def test_a_neuron_that_varies_little_is_still_compared():
    x = features(500, 3)
    x[:, 0] *= 1e-5
    assert ground_cost(Moments.of(x, x)).diag().abs().max() < 1e-9


# --- plans and maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_assignment_costs_what_exact_transport_costs(seed):
    n = 2 + seed
    cost = random_cost(n, n, seed)
    if seed % 2:
        cost = (cost * 4).round()  # ties
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    assignment, programme = transport_plan(cost), transport_plan(cost, mass=(uniform, uniform))
    assert float((assignment * cost).sum()) == pytest.approx(float((programme * cost).sum()), abs=1e-10)
    assert sorted(map(int, (assignment * n).argmax(0))) == list(range(n))
    if seed % 2 == 0:
        assert torch.allclose(assignment, programme, atol=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "l1", "l2"])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 7), (7, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_columns_of_a_map_sum_to_one(solver, n, m, kind):
    masses = None if kind == "uniform" else (mass(kind, n, 1), mass(kind, m, 2))
    found = transport_map(random_cost(n, m), solver, masses)
    assert found.shape == (n, m) and found.dtype == torch.float64 and (found >= 0).all()
    assert torch.allclose(found.sum(0), torch.ones(m).double(), atol=1e-9)


@pytest.mark.parametrize("kind", ["uniform", "l1", "l2"])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize("m", [5, 8])
def test_plans_have_the_masses_as_marginals(solver, kind, m):
    masses = mass(kind, 5, 1), mass(kind, m, 2)
    plan = transport_plan(random_cost(5, m), solver, masses)
    assert torch.allclose(plan.sum(1), masses[0], atol=1e-7) and torch.allclose(plan.sum(0), masses[1], atol=1e-7)


def test_masses_need_not_sum_to_one():
    masses = mass("l1", 5, 1), mass("l1", 8, 2)
    scaled = 3 * masses[0], 7 * masses[1]
    assert torch.allclose(
        transport_plan(random_cost(5, 8), mass=scaled), transport_plan(random_cost(5, 8), mass=masses)
    )


def test_sinkhorn_approaches_the_exact_plan():
    cost = random_cost(6, 6)
    exact = transport_plan(cost)
    far, near = (float((transport_plan(cost, "sinkhorn", regularization=r) - exact).abs().max()) for r in (0.5, 0.03))
    assert near < 5e-2 < far


@pytest.mark.parametrize("regularization", [0.05, 1.0])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8)])
def test_sinkhorn_solves_the_problem_that_pot_solves(n, m, regularization):
    masses, cost = (mass("l1", n, 1), mass("l2", m, 2)), random_cost(n, m)
    theirs = ot.sinkhorn(*(one.numpy() for one in masses), cost.numpy(), regularization, stopThr=1e-12)
    plan = transport_plan(cost, "sinkhorn", masses, regularization)
    assert torch.allclose(plan, torch.from_numpy(theirs), atol=1e-9)


@pytest.mark.parametrize("marginal", [0.5, 5.0])
def test_unbalanced_solves_the_problem_that_pot_solves(marginal):
    masses = mass("l1", 5, 1), mass("l2", 8, 2)
    cost = random_cost(5, 8)
    plan = transport_plan(cost, "unbalanced", masses, 0.05, marginal)
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        *(m.numpy() for m in masses), cost.numpy(), 0.05, marginal, stopThr=1e-12
    )
    assert torch.allclose(plan, torch.from_numpy(theirs), atol=1e-7)


@pytest.mark.parametrize(("solver", "regularization"), [("sinkhorn", 1e-3), ("unbalanced", 1e-4)])
def test_iterations_that_do_not_converge_are_told(solver, regularization, monkeypatch):
    monkeypatch.setattr(solvers, "MOST_ITERATIONS", 300)
    message = (
        rf"got masses that still change by a share of .* the last of 300; raise regularization above {regularization}"
    )
    with pytest.warns(UserWarning, match=message):
        transport_plan(random_cost(20, 20), solver, regularization=regularization)
    transport_plan(random_cost(20, 20), solver, regularization=0.5)


@pytest.mark.parametrize("scale", [1, 500])
def test_unbalanced_and_sinkhorn_stand_costs_of_any_scale(scale):
    for solver in ("sinkhorn", "unbalanced"):
        found = transport_map(random_cost(6, 8) * scale, solver)
        assert torch.allclose(found.sum(0), torch.ones(8).double(), atol=1e-9)


def test_unbalanced_lets_mass_go_where_it_is_dear():
    cost = torch.tensor([[0.0, 1.0], [1.0, 50.0]])
    plan = transport_plan(cost, "unbalanced", regularization=0.01, marginal_regularization=0.5)
    assert plan[1].sum() < 0.4 and plan.sum() < 1
    tight = transport_plan(random_cost(3, 3), "unbalanced", regularization=0.05, marginal_regularization=20.0)
    assert torch.allclose(tight.sum(0), torch.full((3,), 1 / 3).double(), atol=5e-2)


def test_a_planted_permutation_is_recovered_from_noisy_features():
    x = features(200, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    y = x[:, order] + 0.05 * features(200, 12, 1)
    expected = torch.eye(12).double()[:, order]
    for kind in ("correlation", "euclidean", "cosine"):
        assert torch.equal(transport_map(ground_cost(Moments.of(x, y), kind)), expected)


def test_gromov_recovers_a_planted_permutation_from_distances_alone():
    places = torch.tensor([0.0, 1.0, 3.0, 7.0, 15.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 4, 1, 3])
    x = (places[:, None] - places[None]).abs()
    y = x[order][:, order]
    plan = gromov_plan(x, y)
    assert torch.allclose(as_map(plan), torch.eye(5).double()[:, order], atol=1e-8)


@pytest.mark.parametrize(("n", "m"), [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("kind", ["uniform", "l1"])
def test_gromov_maps_are_maps(n, m, kind):
    x, y = (torch.cdist(p, p) for p in (features(n, 3), features(m, 3, 1)))
    masses = None if kind == "uniform" else (mass(kind, n, 1), mass(kind, m, 2))
    found = as_map(gromov_plan(x, y, masses))
    assert torch.allclose(found.sum(0), torch.ones(m).double(), atol=1e-9) and (found >= 0).all()


def test_the_cost_may_be_of_any_float_type_and_is_left_as_it_is():
    cost = random_cost(4, 5).float()
    before = cost.clone()
    for solver in SOLVERS:
        assert transport_plan(cost, solver).dtype == torch.float64
    assert torch.equal(cost, before)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cost", [torch.zeros(3), torch.tensor([[float("nan"), 1.0]]), torch.full((2, 2), float("inf"))]
)
def test_refuses_costs_that_are_not_finite_matrices(cost):
    with pytest.raises(FusionError, match=r"Expected a finite cost matrix \[n, m\]"):
        transport_map(cost)


@pytest.mark.parametrize("solver", ["sinkhorn", "unbalanced"])
def test_without_regularisations_it_uses_those_of_the_options(solver):
    cost, options = random_cost(5, 8), FusionOptions()
    expected = transport_plan(cost, solver, None, options.regularization, options.marginal_regularization)
    assert torch.equal(transport_plan(cost, solver), expected)
    assert torch.equal(transport_map(cost, solver), as_map(expected))


def test_refuses_unknown_solvers():
    with pytest.raises(FusionError, match="Expected solver exact, sinkhorn or unbalanced, got 'simplex'"):
        transport_map(torch.zeros(2, 2), "simplex")


def test_refuses_a_plan_that_gives_some_neuron_nothing():
    with pytest.raises(FusionError, match="every neuron of the anchor to receive mass.*marginal_regularization"):
        as_map(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
