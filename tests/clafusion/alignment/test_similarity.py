"""CKA and CCA: against the published implementation, against their definitions, and on noise."""

import numpy as np
import pytest
import torch

from clafusion import FusionError, cca, linear_cka
from clafusion.alignment.similarity import cka_from_hsic, gram, hsic
from tests.helpers import REFERENCE


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "similarity.npz") as file:
        return {name: torch.from_numpy(np.asarray(value)) for name, value in file.items()}


@pytest.mark.parametrize("pair", "abcd")
def test_equals_the_published_values(reference, pair):
    x, y = reference[f"{pair}_X"].double(), reference[f"{pair}_Y"].double()
    for name, value in {
        "cka": linear_cka(x, y, debiased=False),
        "fcka": linear_cka(x, y, debiased=False),
        "cka_debiased": linear_cka(x, y, debiased=True),
        "fcka_debiased": linear_cka(x, y),
        "cca": cca(x, y),
    }.items():
        assert float(value) == pytest.approx(float(reference[f"{pair}_f64_{name}"]), abs=1e-10), name


def noise(samples, features, seed):
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))


def test_independent_noise_is_unlike_once_debiased():
    x, y = noise(200, 8192, 0), noise(200, 8192, 1)
    assert linear_cka(x, y, debiased=False) > 0.95
    assert abs(linear_cka(x, y)) < 0.02


def test_debiased_hsic_is_unbiased():
    """Its mean over small batches is that of independent data, zero, far below the biased one's."""
    values = [hsic(gram(noise(8, 30, 2 * i)), gram(noise(8, 30, 2 * i + 1)), True) for i in range(400)]
    spread = torch.stack(values)
    assert abs(spread.mean()) < 4 * spread.std() / 400**0.5


def test_debiased_hsic_is_song_et_al_term_by_term():
    """Equation 3 as sums over distinct indices: E of x_ij (y_ij + y_qr - 2 y_iq)."""
    grams = gram(noise(6, 3, 0)), gram(noise(6, 4, 1))
    x, y = (one - one.diag().diag() for one in grams)
    total = 0.0
    for i in range(6):
        for j in set(range(6)) - {i}:
            for q in set(range(6)) - {i, j}:
                for r in set(range(6)) - {i, j, q}:
                    total += float(x[i, j] * (y[i, j] + y[q, r] - 2 * y[i, q]))
    assert float(hsic(*grams, True)) == pytest.approx(total / (6 * 5 * 4 * 3), rel=1e-10)


@pytest.mark.parametrize("debiased", [True, False])
def test_invariances(debiased):
    x, y = noise(40, 6, 0).double(), noise(40, 9, 1).double()
    rotation = torch.linalg.qr(noise(6, 6, 2).double()).Q
    value = linear_cka(x, y, debiased)
    assert linear_cka(y, x, debiased) == pytest.approx(float(value), abs=1e-12)
    assert linear_cka(3 * x @ rotation + 5, y, debiased) == pytest.approx(float(value), abs=1e-12)
    assert linear_cka(x, x, debiased) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e9 / 3])
def test_a_constant_representation_is_unlike_everything(value):
    constant = torch.full((11, 3), value, dtype=torch.float64)
    for debiased in (True, False):
        assert linear_cka(constant, noise(11, 4, 0), debiased) == 0
        assert linear_cka(constant, constant, debiased) == 0
    assert cka_from_hsic(*(torch.tensor(0.0) for _ in range(3))) == 0


def test_cca_of_equal_spans_is_one_and_of_orthogonal_ones_zero():
    basis = torch.linalg.qr(noise(30, 10, 0).double()).Q
    mixing = noise(4, 4, 1).double()
    assert cca(basis[:, :4], basis[:, :4] @ mixing) == pytest.approx(1.0, abs=1e-10)
    assert cca(basis[:, :4], basis[:, 4:]) == pytest.approx(0.0, abs=1e-10)
    assert cca(basis[:, :4], basis[:, 2:6]) == pytest.approx(0.5, abs=1e-10)


def test_cca_counts_ranks_not_columns():
    x = noise(30, 2, 0).double()
    assert cca(torch.cat([x, x], 1), x) == pytest.approx(1.0, abs=1e-10)
    assert cca(torch.zeros(30, 3), x) == 0


def test_convolutional_features_are_flattened_per_sample():
    x, y = noise(20, 12, 0), noise(20, 8, 1)
    maps = x.view(20, 3, 2, 2), y.view(20, 2, 2, 2)
    assert linear_cka(*maps) == linear_cka(x, y)
    assert cca(*maps) == cca(x, y)


def test_computes_in_float64():
    x, y = noise(50, 10, 0), noise(50, 10, 1)
    assert linear_cka(x, y).dtype == cca(x, y).dtype == torch.float64
    assert linear_cka(x, y) == linear_cka(x.double(), y.double())


@pytest.mark.parametrize(
    ("function", "x", "y"),
    [
        (linear_cka, torch.zeros(3, 2), torch.zeros(3, 2)),
        (linear_cka, torch.zeros(5, 2), torch.zeros(6, 2)),
        (linear_cka, torch.zeros(5), torch.zeros(5)),
        (cca, torch.zeros(1, 2), torch.zeros(1, 2)),
    ],
)
def test_refuses_what_cannot_be_compared(function, x, y):
    with pytest.raises(FusionError, match=r"Expected features \[samples, features\] of the same samples, at least"):
        function(x, y)
