"""How the score answers to the options of a space: regression on all trials told, with few assumptions and much shrinkage.

What a decision gives up is a number in [0, 1] (0 for its dearest option): what calibration says that it loses, where the space
knows that (`Space.losses`); else the share of channels or of rank that goes, and for bits the quantisation step relative to the
coarsest. The loss of score is a sum over decisions of a curve in that number, plus products for decisions that meet in one layer,
plus the totals over all decisions of a kind, which is what most trials can tell first. How much each of these parts may matter is
estimated from the trials by the variance components that make them most likely (Zhou et al. 2019, "MM algorithms for variance
components models").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.space import Space, Variable

Float = NDArray[np.float64]
Index = NDArray[np.int64]

_ITERATIONS = 12
_FLOOR = 1e-6
_POWER = 0.75  # of a loss: scores fall sooner than in proportion (chosen on 800 policies of a residual net on BitFusion)


def given_up(space: Space, variable: Variable) -> Float:
    """What each option of a decision gives up, in [0, 1]."""
    options, losses = np.array(variable.options), space.losses.get(variable.name, ())
    if len(losses) == len(options):
        return np.asarray(losses, dtype=np.float64) ** _POWER
    if variable.kind.endswith("bits"):
        steps = 2.0**-options
        return np.asarray((steps - steps[-1]) / (steps[0] - steps[-1]))
    return np.asarray(1 - options / options[-1])


class Response:
    """A regression over option numbers, `d`-dim integer vectors; see the module.

    `fit` it, then `predict` with the posterior mean or with a draw of the posterior (Thompson 1933).
    """

    def __init__(self, space: Space) -> None:
        variables = space.variables
        self.sizes = np.array([len(v.options) for v in variables])
        most = max(self.sizes, default=1)
        self._lost = np.array([np.pad(given_up(space, v), (0, most - len(v.options))) for v in variables])  # d x options
        kinds = sorted({v.kind for v in variables})
        self._kinds = np.array([[float(v.kind == k) for k in kinds] for v in variables])
        self._kinds /= np.sqrt(self._kinds.sum(0))
        layers = [_layers(space, v) for v in variables]
        met = [(i, j) for i, j in combinations(range(len(variables)), 2) if layers[i] & layers[j]]
        self._left, self._right = (np.array([p[k] for p in met], dtype=np.int64) for k in (0, 1))
        d, pairs = len(variables), len(met)
        # parts: the totals of the kinds, that of all, the decisions, the products; one variance each
        self._parts = np.repeat(np.arange(4), [len(kinds), 1, 3 * d, pairs])
        self._middle: Float = np.zeros(len(self._parts))
        self._variances = np.ones(4)
        self._offset, self.noise = 0.0, 0.0

    def features(self, options: Index) -> Float:
        """`n x p` features of `n x d` option numbers."""
        lost = self._lost[np.arange(options.shape[1]), options]
        total = lost.mean(1, keepdims=True)
        curves = (lost, 2 * lost**2, 0.5 * (lost > 0))
        return np.concatenate([lost @ self._kinds, 4 * total**2, *curves, lost[:, self._left] * lost[:, self._right]], axis=1)

    def fit(self, options: Sequence[Index], values: Sequence[float]) -> None:
        """Learn from trials; `values` are to be high."""
        x, y = self.features(np.array(options)), np.array(values)
        self._middle, self._offset, self._scale = x.mean(0), float(y.mean()), float(y.std()) or 1.0
        self._x, self._y = x - self._middle, (y - self._offset) / self._scale
        n, count = len(y), self._variances.size
        norms = np.bincount(self._parts, (self._x**2).sum(0), count) / n
        variances, noise = 1.0 / (count * np.maximum(norms, _FLOOR)), 0.3
        for _ in range(_ITERATIONS):
            inverse = np.linalg.inv((self._x * variances[self._parts]) @ self._x.T + noise * np.eye(n))
            alpha = inverse @ self._y
            explained = np.bincount(self._parts, (self._x.T @ alpha) ** 2, count)
            expected = np.bincount(self._parts, np.einsum("ij,ij->j", self._x, inverse @ self._x), count)
            variances *= np.sqrt((explained + _FLOOR) / (expected + _FLOOR))
            noise *= np.sqrt((float(alpha @ alpha) + _FLOOR) / (float(np.trace(inverse)) + _FLOOR))
            noise = max(noise, 1e-3)
        self._variances, self.noise = variances, noise
        self._inverse = np.linalg.inv((self._x * variances[self._parts]) @ self._x.T + noise * np.eye(n))

    def guess(self, rng: np.random.Generator) -> Float:
        """Weights before anything is told: every kind counts by what it gives up, times a factor drawn for it."""
        found = np.zeros(len(self._parts))
        kinds = self._kinds.shape[1]
        found[:kinds] = -np.exp(rng.normal(size=kinds)) * np.sqrt((self._kinds > 0).sum(0))
        return found

    def weights(self, rng: np.random.Generator | None = None) -> Float:
        """The posterior mean of the `p` weights, or a draw of the posterior (by Matheron's rule)."""
        prior = self._variances[self._parts]
        if rng is None:
            return np.asarray(prior * (self._x.T @ (self._inverse @ self._y)) * self._scale)
        drawn = rng.normal(size=len(prior)) * np.sqrt(prior)
        told = self._x @ drawn + rng.normal(size=len(self._y)) * np.sqrt(self.noise)
        return np.asarray((drawn + prior * (self._x.T @ (self._inverse @ (self._y - told)))) * self._scale)

    def predict(self, options: Index, weights: Float) -> Float:
        """Values of `n x d` option numbers."""
        return np.asarray(self._offset + (self.features(options) - self._middle) @ weights)


def _layers(space: Space, variable: Variable) -> frozenset[str]:
    """The layers that a decision changes."""
    network: Any = space.network
    if variable.kind != "channels":
        return frozenset((variable.target,))
    return frozenset(x.name for x in (*network.writers(variable.target), *network.readers(variable.target)))
