"""The similarity of two representations of the same samples: linear CKA and CCA.

All functions take features [samples, features] of the same samples in the same order and compute in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.statistics.samples import check_features

#: The unbiased estimator divides by n (n - 3).
MIN_SAMPLES = 4


def linear_cka(x: Tensor, y: Tensor, debiased: bool = True) -> Tensor:
    r"""Linear centred kernel alignment (Kornblith et al. 2019, eq. 3).

    .. math:: \mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}},
              \quad K = XX^\top,\ L = YY^\top

    The biased value of two *independent* random representations approaches one as the features outnumber the samples;
    the debiased one (Song et al. 2012) has expectation near zero there.

    Args:
        x: features of one layer, [samples, features].
        y: features of the other, [samples, other features].
        debiased: use the unbiased estimator of HSIC.

    Returns:
        A float64 scalar; 0 where either representation is constant.

    Example:
        >>> x = torch.arange(6.0)[:, None] ** torch.tensor([1.0, 2.0])
        >>> round(float(linear_cka(x, 3 * x)), 4)
        1.0
    """
    _check(x, y, MIN_SAMPLES if debiased else 2)
    gram_x, gram_y = gram(x), gram(y)
    own = (hsic(one, one, debiased) for one in (gram_x, gram_y))
    return cka_from_hsic(hsic(gram_x, gram_y, debiased), *own)


def cca(x: Tensor, y: Tensor) -> Tensor:
    r"""Mean squared canonical correlation of the features as they are, not centred (Kornblith et al. 2019, eq. 5).

    .. math:: R^2_{\mathrm{CCA}} = \lVert Q_Y^\top Q_X \rVert_F^2 / \min(r_X, r_Y)

    with orthonormal bases of the column spaces, of ranks :math:`r_X, r_Y`. It is 1 for any two layers with at least as
    many independent features as samples.

    Args:
        x: features of one layer, [samples, features].
        y: features of the other, [samples, other features].

    Returns:
        A float64 scalar in [0, 1].
    """
    _check(x, y, 2)
    q_x, q_y = _basis(x), _basis(y)
    rank = min(q_x.shape[1], q_y.shape[1])
    return (q_y.T @ q_x).square().sum() / max(rank, 1)


def gram(x: Tensor) -> Tensor:
    """The Gram matrix of samples, [samples, samples], of the centred features."""
    rows = x.flatten(1).double()
    mean = rows.mean(0)
    rows = rows - mean
    # What is left of a feature that does not vary is the rounding of its mean, which must not pass for a signal.
    rounding = torch.finfo(torch.float64).eps * len(rows) * mean.abs()
    rows = rows * (rows.abs().amax(0) > rounding)
    return rows @ rows.T


def hsic(gram_x: Tensor, gram_y: Tensor, debiased: bool) -> Tensor:
    """The Hilbert-Schmidt independence criterion of two Gram matrices [n, n] of centred features.

    Biased: `tr(K L)` (Gretton et al. 2005). Debiased: eq. 3 of Song et al. 2012; unbiased for any mini-batch, so that
    its mean over batches estimates the value of the whole set (Nguyen, Raghu, Kornblith 2021).
    """
    if not debiased:
        return (gram_x * gram_y).sum()
    n = gram_x.shape[0]
    x, y = (one - one.diag().diag() for one in (gram_x, gram_y))
    row_x, row_y = x.sum(0), y.sum(0)
    trace = (x * y).sum() + row_x.sum() * row_y.sum() / ((n - 1) * (n - 2)) - 2 * (row_x @ row_y) / (n - 2)
    return trace / (n * (n - 3))


def cka_from_hsic(kl: Tensor, kk: Tensor, ll: Tensor) -> Tensor:
    """CKA from the three (sums of) HSIC values; 0 where a representation does not vary."""
    check_features(kl, kk, ll)
    scale = (kk.clamp_min(0) * ll.clamp_min(0)).sqrt()
    return torch.where(scale > 0, kl / scale, torch.zeros_like(kl))


def hsic_sums(
    x: Sequence[Tensor], y: Sequence[Tensor], debiased: bool, onto: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """HSIC of each Gram matrix in x with each in y [n, m], of each in x with itself [n, 1], and of each in y [1, m].

    They are added to those of earlier mini-batches, `onto`; `cka_from_hsic` takes the sums.
    """
    own = [torch.stack([hsic(one, one, debiased) for one in grams]) for grams in (x, y)]
    crossed = torch.stack([torch.stack([hsic(one, other, debiased) for other in y]) for one in x])
    sums = [crossed, own[0][:, None], own[1][None, :]]
    return sums if onto is None else [before + batch for before, batch in zip(onto, sums, strict=True)]


def _basis(x: Tensor) -> Tensor:
    """An orthonormal basis of the column space."""
    rows = x.flatten(1).double()
    u: Tensor
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    tolerance = s.max() * max(rows.shape) * torch.finfo(torch.float64).eps
    return u[:, s > tolerance]


def _check(x: Tensor, y: Tensor, samples: int) -> None:
    if min(x.ndim, y.ndim) < 2 or x.shape[0] != y.shape[0] or x.shape[0] < samples:
        raise FusionError(
            f"Expected features [samples, features] of the same samples, at least {samples}, got {list(x.shape)} and "
            f"{list(y.shape)}"
        )
    check_features(x, y)
