"""Least squares: the remaining inputs of a layer take over what the cut ones carried."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

DAMPING = 1e-3  # of the mean variance, added to the diagonal
Matrix = NDArray[np.float64]


def mixing(covariance: Matrix, keep: NDArray[np.int64]) -> Matrix:
    """The matrix `A` (kept x all) for which `x[keep] @ A` is the least-squares estimate of all inputs `x`.

    With inputs of this centred covariance `C`, A = (C[S, S] + damping)^-1 C[S, :] (He et al. 2017, Channel Pruning for
    Accelerating Very Deep Neural Networks, section 3.1, which refits on sampled rows; the Gram matrix gives the same without
    them). Kept inputs are taken as they are.
    """
    among = covariance[np.ix_(keep, keep)]
    damping = DAMPING * float(np.trace(covariance)) / len(covariance) + 1e-12
    while True:
        try:
            factor = cho_factor(among + np.eye(len(keep)) * damping, lower=True, check_finite=False)
            break
        except LinAlgError:  # too few examples for so many features
            damping *= 10
    estimate: Matrix = cho_solve(factor, covariance[keep], check_finite=False)
    estimate[:, keep] = np.eye(len(keep))
    return estimate


def reconstruct(weight: Matrix, covariance: Matrix, keep: NDArray[np.int64], mean: Matrix) -> tuple[Matrix, Matrix]:
    """Weights over the kept inputs, and the shift of the bias, that come nearest to the whole layer's output.

    Args:
        weight: `out x f` over all features.
        covariance: centred, `f x f`.
        keep: kept features, ascending.
        mean: `f`-dim mean of the features.
    Returns:
        `out x kept` weights and the `out`-dim shift `weight @ mean - new @ mean[keep]`.
    """
    new: Matrix = weight @ mixing(covariance, keep).T
    return new, weight @ mean - new @ mean[keep]
