"""CMA-ES with a diagonal covariance (Ros and Hansen 2008, "A simple modification in CMA-ES achieving linear time and space
complexity"), which learns fast enough for some hundred trials in tens of decisions.

What it learns from are the policies as executed, which are not the points it drew: they are taken in as Hansen 2011, "Injecting
external solutions into CMA-ES", has it, their distance from the mean clipped. So it can be told anyone's trials.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.policy import Policy

Point = NDArray[np.float64]


class CMAES:
    """One normal distribution over [0,1]^d, moved and reshaped after every generation of trials told; begins at the best even one.

    Args:
        population: trials of a generation, None for `4 + 3 log d`.
        sigma: first standard deviation.
        cheaper: share of the trials that aim below the budget.
    """

    def __init__(self, problem: Problem, *, population: int | None = None, sigma: float = 0.2, cheaper: float = 0.1) -> None:
        self._problem, self._aim, self._even = problem, Aim(problem, cheaper=cheaper), problem.even
        d = problem.space.dimension
        self._size = population or 4 + int(3 * np.log(d))
        weights = np.log((self._size + 1) / 2) - np.log(np.arange(1, self._size // 2 + 1))
        self._weights = weights / weights.sum()
        mu = 1 / (self._weights**2).sum()
        # Hansen 2016, "The CMA evolution strategy: a tutorial", table 1; the rates of the covariance (d + 2) / 3 times as high
        self._c_sigma, self._d_sigma = (mu + 2) / (d + mu + 5), 1 + 2 * max(0.0, np.sqrt((mu - 1) / (d + 1)) - 1)
        self._d_sigma += self._c_sigma
        self._c_c = (4 + mu / d) / (d + 4 + 2 * mu / d)
        self._c_1 = min(0.5, (d + 2) / 3 * 2 / ((d + 1.3) ** 2 + mu))
        self._c_mu = min(1 - self._c_1, (d + 2) / 3 * 2 * (mu - 2 + 1 / mu) / ((d + 2) ** 2 + mu), 0.5)
        self._mu, self._length = mu, np.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
        self._mean: Point | None = None
        self._sigma, self._spread = sigma, np.ones(d)
        self._path, self._steps = np.zeros(d), np.zeros(d)
        self._told: list[tuple[float, Point]] = []  # value and point, of the generation that is not complete

    def ask(self, number: int) -> Policy:
        problem, rng, even = self._problem, self._problem.rng(number), self._even.policies
        limits = self._aim.limits(rng)
        if number < len(even):
            return even[number]
        mean = problem.space.encode(even[0]) if self._mean is None else self._mean
        return fit(problem, np.clip(mean + self._sigma * self._spread * rng.normal(size=mean.shape), 0, 1), limits)

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        if trial.score is None:
            return
        self._told.append((self._problem.value(trial.score, trial.cost), self._problem.space.encode(trial.policy)))
        if self._mean is None:
            if trial.number + 1 < len(self._even.policies):
                return
            self._mean, self._told = max(self._told, key=lambda told: told[0])[1], []
        elif len(self._told) == self._size:
            ranked = sorted(self._told, key=lambda told: -told[0])
            self._move(np.array([point for _, point in ranked[: len(self._weights)]]))
            self._told = []

    def losses(self) -> Mapping[str, float]:
        return {"sigma": self._sigma}

    def _move(self, best: Point) -> None:
        """Move towards the best points of a generation, best first."""
        mean, d = self._mean, best.shape[1]
        assert mean is not None
        steps = (best - mean) / (self._sigma * self._spread)
        lengths = np.sqrt((steps**2).sum(1))
        steps *= np.minimum(1, (np.sqrt(d) + 2 * d / (d + 2)) / np.maximum(lengths, 1e-12))[:, None]
        step = self._weights @ steps
        self._mean = np.clip(mean + self._sigma * self._spread * step, 0, 1)
        self._path = (1 - self._c_sigma) * self._path + np.sqrt(self._c_sigma * (2 - self._c_sigma) * self._mu) * step
        length = float(np.linalg.norm(self._path))
        small = length < (1.4 + 2 / (d + 1)) * self._length
        self._steps = (1 - self._c_c) * self._steps + small * np.sqrt(self._c_c * (2 - self._c_c) * self._mu) * self._spread * step
        variance = (1 - self._c_1 - self._c_mu) * self._spread**2 + self._c_1 * self._steps**2
        self._spread = np.sqrt(variance + self._c_mu * self._spread**2 * (self._weights @ steps**2))
        rise = min(1.0, self._c_sigma / self._d_sigma * (length / self._length - 1))
        self._sigma = float(np.clip(self._sigma * np.exp(rise), 0.02, 0.5))
