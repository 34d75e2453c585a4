"""Curves over the length n of a row: theta(n), through statistics of length buckets, and r(n), through rows."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_curves", "fit_scale"]

_NEWTON_STEPS = 50
_MAX_LOGIT = 30.0
_NEGLIGIBLE = -30.0  # ln r


def fit_curves(
    log_length: NDArray[np.float64], row_count: NDArray[np.int64], scores: NDArray[np.float64], *, degree: int
) -> NDArray[np.float32]:
    """Fits, for every layer, head and target, a least-squares polynomial in ln n.

    A bucket weighs as the square root of its number of rows. Weighing by rows would leave short contexts to chance,
    since half of all rows are longer than half the range; weighing buckets alike would trust a bucket of few rows as
    much as one of many.

    Args:
        log_length: `[num_targets, num_buckets]`, mean ln n of a bucket's rows.
        row_count: `[num_targets, num_buckets]`; buckets without rows are left out.
        scores: `[num_layers, num_heads, num_targets, num_buckets]`, the thresholds to go through, scaled logits.
        degree: of the polynomial, at least 0. A target with too few filled buckets gets the highest degree that they
            determine, and zeros above.

    Returns:
        `[num_layers, num_heads, num_targets, degree + 1]` float32, ascending powers of ln n.

    Raises:
        ValueError: a target has no rows.
    """
    num_layers, num_heads, num_targets, _ = scores.shape
    coefficients = np.zeros((num_layers, num_heads, num_targets, degree + 1))
    for target in range(num_targets):
        filled = row_count[target] > 0
        if not filled.any():
            raise ValueError(f"target {target} has no rows")
        terms = min(degree + 1, int(filled.sum()))
        # powers of ln n itself are nearly parallel; around their mean they are not
        centre = log_length[target, filled].mean()
        powers = np.vander(log_length[target, filled] - centre, terms, increasing=True)
        weight = row_count[target, filled] ** 0.25  # of a residual, whose square then weighs as sqrt(row_count)
        wanted = scores[:, :, target, filled].reshape(num_layers * num_heads, -1).T
        centred, *_ = np.linalg.lstsq(powers * weight[:, None], wanted * weight[:, None])
        shifted = _shift(terms, centre) @ centred
        coefficients[:, :, target, :terms] = shifted.T.reshape(num_layers, num_heads, terms)
    return coefficients.astype(np.float32)


def fit_scale(
    unread_mass: NDArray[np.float32], estimate: NDArray[np.float32], lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Returns r, by the length n of a row, with which what a denominator knows of unread keys is right on average.

    In a row whose candidates hold 1 - unread, the denominator knows r * x / (1 - unread + r * x), where x is what r = 1
    estimates. With ln r = c_0 + c_1 ln n that is a logistic regression of the unread mass, whose solution has no error
    left on average, nor any that grows with ln n. (A ratio of sums would go by the few rows with an x far above 1.)

    Args:
        unread_mass: `[..., num_rows]`, share of the softmax of keys that are no candidates.
        estimate: the same shape, x; 0 in rows that count for nothing.
        lengths: `[num_rows]`, n.

    Returns:
        `[..., 2]`, c_0 and c_1; `_NEGLIGIBLE` and 0 where nothing is left unread.
    """
    unread, x = unread_mass.astype(np.float64), estimate.astype(np.float64)
    # a row whose candidates hold nothing has lost everything, whatever r
    counts = (x > 0) & (unread < 1)
    offset = np.log(np.where(counts, x, 1.0)) - np.log1p(-np.where(counts, unread, 0.0))
    log_length = np.log(lengths)
    centre = log_length.mean()
    slope_of = np.stack([np.ones_like(log_length), log_length - centre], axis=-1)
    ridge = np.diag([1e-9, 1e-3])  # few rows decide nothing about the slope
    found = np.zeros((*unread.shape[:-1], 2))
    for _ in range(_NEWTON_STEPS):
        logit = np.clip(offset + found @ slope_of.T, -_MAX_LOGIT, _MAX_LOGIT)
        known = 1 / (1 + np.exp(-logit))
        gradient = (counts * (unread - known)) @ slope_of - found @ ridge
        weight = counts * known * (1 - known)
        curvature = np.einsum("...n,ni,nj->...ij", weight, slope_of, slope_of) + ridge
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # a start far off has no curvature to speak of
        found += step / np.maximum(1.0, np.abs(step).max(axis=-1, keepdims=True))
    is_unread = (counts * unread).sum(axis=-1) > 0
    found[..., 0] -= found[..., 1] * centre
    return np.where(is_unread[..., None], found, [_NEGLIGIBLE, 0.0])


def _shift(terms: int, centre: float) -> NDArray[np.float64]:
    """The matrix that turns coefficients of powers of (x - centre) into coefficients of powers of x."""
    matrix = np.zeros((terms, terms))
    for power in range(terms):
        expanded = np.polynomial.polynomial.polypow([-centre, 1.0], power)
        matrix[: power + 1, power] = expanded
    return matrix
