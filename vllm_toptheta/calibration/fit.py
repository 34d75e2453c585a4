"""The curve theta(n): a polynomial in ln n through the statistics of the length buckets."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_curves"]


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


def _shift(terms: int, centre: float) -> NDArray[np.float64]:
    """The matrix that turns coefficients of powers of (x - centre) into coefficients of powers of x."""
    matrix = np.zeros((terms, terms))
    for power in range(terms):
        expanded = np.polynomial.polynomial.polypow([-centre, 1.0], power)
        matrix[: power + 1, power] = expanded
    return matrix
