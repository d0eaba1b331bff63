"""Least squares: the remaining inputs of a layer take over what the cut ones carried.

With inputs of centred covariance `C` and damping `d`, the weights over kept inputs `S` that come nearest to the whole layer's
output are `W' = W A'` with `A = (C + d)[S, S]^-1 (C + d)[S, :]` (He et al. 2017, Channel Pruning for Accelerating Very Deep
Neural Networks, section 3.1, which refits on sampled rows; the covariance gives the same without them). `A` is the identity
on kept inputs.

Channels are cut in one order, so what is kept is always the beginning of it. Let `L L'` be the Cholesky factorisation of
`C + d` with inputs in that order. Then `A = L_S^-T L'[S, :]`, and `W'^T = L_S^-T (L' W^T)[S]`: with `L' W^T` worked out
once, every width is one triangular solve.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky, solve_triangular

DAMPING = 1e-3  # of the mean variance
Matrix = NDArray[np.float64]
Index = NDArray[np.int64]


def damped(covariance: Matrix) -> Matrix:
    """The covariance with `DAMPING` of its mean variance on the diagonal."""
    level = DAMPING * float(np.trace(covariance)) / len(covariance) + 1e-12
    made: Matrix = covariance + np.eye(len(covariance)) * level
    return made


def factor(covariance: Matrix) -> Matrix:
    """Lower Cholesky factor of a damped covariance; damped further where rounding made it indefinite."""
    level = 0.0
    while True:
        try:
            made: Matrix = cholesky(covariance + np.eye(len(covariance)) * level, lower=True, check_finite=False)
            return made
        except LinAlgError:
            level = max(10 * level, 1e-6 * float(np.trace(covariance)) / len(covariance) + 1e-12)


@dataclass(frozen=True)
class Nested:
    """All least-squares reconstructions of one layer whose inputs are cut in one order.

    `order` are its `f` inputs from first to last kept; `lower` (`f x f`) and `projected` (`f x rows`, in single precision like
    the weights) as in the module's words.
    """

    order: Index
    lower: Matrix
    projected: NDArray[np.float32]

    @staticmethod
    def of(weight: Matrix, covariance: Matrix, order: Index) -> "Nested":
        """From `rows x f` weights and the `f x f` centred covariance."""
        lower = factor(damped(covariance)[np.ix_(order, order)])
        return Nested(order, lower, (lower.T @ weight[:, order].T).astype(np.float32))

    def at(self, count: int, rows: Index) -> Matrix:
        """Weights (`len(rows) x count`) over the first `count` inputs of the order, those sorted by index."""
        new = solve_triangular(
            self.lower[:count, :count],
            self.projected[:count][:, rows].astype(np.float64),
            lower=True,
            trans="T",
            check_finite=False,
        )
        made: Matrix = new[np.argsort(self.order[:count])].T
        return made


def reconstruct(weight: Matrix, covariance: Matrix, keep: Index) -> Matrix:
    """The same for any set of kept inputs: `rows x f` weights to `rows x kept` ones."""
    whole = damped(covariance)
    lower = factor(whole[np.ix_(keep, keep)])
    half = solve_triangular(lower, whole[keep] @ weight.T, lower=True, check_finite=False)
    made: Matrix = solve_triangular(lower, half, lower=True, trans="T", check_finite=False).T
    return made
