"""NSGA-II (Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm"), one child at a time.

A generation need not be complete before the next begins: every ask breeds one child from the best of all trials told so far,
so that workers never wait for each other (the steady-state form).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.opening import Opening
from tightrope.search.agents.repair import fit
from tightrope.search.pareto import non_dominated
from tightrope.search.trial import Trial
from tightrope.spaces.policy import Policy


class NSGA2:
    """Least traded cost and highest score at once; children of two parents that won their tournaments, mutated.

    Args:
        population: how many of the trials told may be parents.
        spread: standard deviation of the opening's points, in [0,1]^d.
        cheaper: share of the children that aim below the budget.
    """

    def __init__(self, problem: Problem, *, population: int = 20, spread: float = 0.15, cheaper: float = 0.3) -> None:
        self._problem, self._aim, self._even = problem, Aim(problem, cheaper=cheaper), problem.even
        self._population, self._opening = population, Opening(problem, population, spread)
        self._parents: list[tuple[Policy, float, float]] = []  # policy, traded cost, value; best first

    def ask(self, number: int) -> Policy:
        problem, rng = self._problem, self._problem.rng(number)
        limits = self._aim.limits(rng)
        if number < max(self._population, len(self._even.policies)) or len(self._parents) < 2:
            return self._opening.ask(number, rng, limits)
        mother, father = (problem.space.encode(self._parents[self._tournament(rng)][0]) for _ in range(2))
        child = np.where(rng.random(mother.shape) < 0.5, mother, father)
        return fit(problem, self._mutate(child, rng), limits)

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        self._opening.tell(trial)
        if trial.score is None or any(trial.policy == policy for policy, _, _ in self._parents):
            return
        self._parents.append((trial.policy, self._problem.price(trial.cost), self._problem.value(trial.score, trial.cost)))
        order = ranking([c for _, c, _ in self._parents], [v for _, _, v in self._parents])
        self._parents = [self._parents[i] for i in order[: self._population]]

    def losses(self) -> Mapping[str, float]:
        return {}

    def _tournament(self, rng: np.random.Generator) -> int:
        """The better of two parents drawn at random; parents stand in order."""
        return int(rng.integers(len(self._parents), size=2).min())

    def _mutate(self, point: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """Move about two coordinates by one or two options, or anywhere."""
        options = np.array([len(v.options) for v in self._problem.space.variables])
        hit = rng.random(point.shape) < 2 / max(2, len(point))
        step = rng.choice([-2, -1, 1, 2], size=point.shape) / options
        anywhere = rng.random(point.shape) < 0.25
        moved = np.where(anywhere, rng.random(point.shape), point + step)
        return np.clip(np.where(hit, moved, point), 0, 1)


def ranking(costs: list[float], scores: list[float]) -> list[int]:
    """Indices of points from best to worst: by front, and within a front the loneliest first (crowding distance)."""
    c, s, left, order = np.array(costs), np.array(scores), np.arange(len(costs)), []
    while len(left):
        front = left[non_dominated(c[left], s[left])]
        order += front[np.argsort(-crowding(c[front], s[front]), kind="stable")].tolist()
        left = np.setdiff1d(left, front)
    return order


def crowding(costs: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the perimeter of the box between a point's neighbours on its front, each axis scaled to 1; infinite at the ends."""
    order = np.argsort(costs)
    between = np.zeros(max(0, len(costs) - 2))
    for values in (costs[order], scores[order]):
        between += np.abs(values[2:] - values[:-2]) / (float(np.ptp(values)) or 1.0)
    found = np.full(len(costs), np.inf)
    found[order[1:-1]] = between
    return found
