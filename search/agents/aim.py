"""What one trial may cost."""

import numpy as np

from tightrope.search.agent import Problem
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits


class Aim:
    """The limits of each trial: the budget's, and under an accuracy to be kept a latency below the least that kept it so far.

    That latency is drawn between 0.6 and 1 times the best so far (between the cheapest and the dense policy's before there is
    one), so that the search presses downwards without knowing how far it will get.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.best: Trial | None = None

    def tell(self, trial: Trial) -> None:
        """Remember the trial if it is the best so far."""
        if trial.score is None or not trial.feasible:
            return
        value = self._problem.value(trial.score, trial.cost)
        if self.best is None or self.best.score is None or value > self._problem.value(self.best.score, self.best.cost):
            self.best = trial

    def limits(self, rng: np.random.Generator) -> Limits:
        problem = self._problem
        if problem.floor is None:
            return problem.limits
        least = problem.price(problem.cost(problem.cheapest))
        if self.best is None:
            share = rng.uniform(least, max(1.0, least))
        else:
            share = max(least, problem.price(self.best.cost) * rng.uniform(0.6, 1.0))
        most = share * (problem.dense_cost.metric(problem.metric) or 0.0)
        return Limits((*problem.limits.top, (problem.metric, most)))
