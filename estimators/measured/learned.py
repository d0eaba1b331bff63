"""Times of nodes with more free sizes than a grid can hold, learned from a few of them.

The logarithm of the time is a Gaussian process over those of the sizes: a power law, a smooth departure from it that also knows
which sizes whole blocks of 16 or 4 fill, and noise. How smooth, how much of it is noise and whether blocks count is what makes
the mean error least when each node is left out, which needs no refit (Rasmussen and Williams, Gaussian Processes for Machine
Learning, 2006, section 5.4.2).
"""

from collections.abc import Mapping
from itertools import product

import numpy as np

from tightrope.estimators.measured.grid import STEP, Axis, Floats, Ints, Sizes

LENGTHS, NOISES, BLOCKS = (0.5, 1.0, 2.0, 4.0), (0.001, 0.01, 0.1, 1.0), (0.0, 1.0)
TREND = 10.0  # prior variance of the power law, in units of that of the departure
LEAST_MS = 1e-4


class Learned:
    """Times along axes, learned from timed nodes.

    Args:
        known: milliseconds of at least two nodes by their sizes.

    Attributes:
        left_out: relative errors of the timed nodes, in their order, each left out of what is learned; smoothness and noise are
            those chosen by all of them.
        error: the mean of their absolute values.
    """

    def __init__(self, axes: tuple[Axis, ...], known: Mapping[Sizes, float]) -> None:
        self.axes = axes
        sizes = self._counted(np.array([*known], np.int64))
        logs = np.log(sizes)
        spread = logs.std(axis=0)
        self._middle, self._spread = logs.mean(axis=0), np.where(spread > 0, spread, 1.0)
        self._trend, fills = self._places(sizes)
        times = np.log(np.maximum([*known.values()], LEAST_MS))
        self._mean = float(times.mean())
        best = np.inf
        for length, noise, blocks in product(LENGTHS, NOISES, BLOCKS):
            smooth = np.concatenate([self._trend, blocks * fills], axis=1) / length
            inverse = np.linalg.inv(self._kernel(smooth, smooth, self._trend) + noise * np.eye(len(times)))
            weights = inverse @ (times - self._mean)
            left_out = np.expm1(-weights / np.diag(inverse))
            error = float(np.mean(np.abs(left_out)))
            if error < best:
                best, self.left_out = error, left_out
                self._weights, self._smooth, self._length, self._blocks = weights, smooth, length, blocks
        self.error = best

    def at(self, sizes: Ints) -> Floats:
        """The times at `n x k` sizes; NaN beyond the axes."""
        counted = self._counted(sizes)
        inside = np.all([(a.values[0] <= c) & (c <= a.values[-1]) for a, c in zip(self.axes, counted.T, strict=True)], axis=0)
        found = np.full(len(sizes), np.nan)
        trend, fills = self._places(counted[inside])
        smooth = np.concatenate([trend, self._blocks * fills], axis=1) / self._length
        found[inside] = np.exp(self._mean + self._kernel(smooth, self._smooth, trend) @ self._weights)
        return found

    def _counted(self, sizes: Ints) -> Ints:
        """The sizes along the axes, as they count, `n x axes`."""
        return np.array([[axis.at(row) for axis in self.axes] for row in sizes.tolist()], np.int64).reshape(-1, len(self.axes))

    def _places(self, sizes: Ints) -> tuple[Floats, Floats]:
        """The logarithms of counted sizes, as far apart along each axis, and how well the sizes fill blocks, `n x axes` each."""
        return (np.log(sizes) - self._middle) / self._spread, (sizes % STEP == 0) + 0.5 * (sizes % 4 == 0)

    def _kernel(self, smooth: Floats, others: Floats, trend: Floats) -> Floats:
        """Covariance of nodes, at these places and in the trend, with the timed ones, `n x timed`."""
        square = ((smooth[:, None] - others) ** 2).sum(axis=2)
        found: Floats = TREND * (1 + trend @ self._trend.T) + np.exp(-square / 2)
        return found
