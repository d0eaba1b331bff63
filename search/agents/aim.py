"""What one trial may cost, and the best trial so far."""

import numpy as np

from tightrope.search.agent import Problem
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits


class Aim:
    """The limits of each trial.

    Under a budget they are the budget's; `cheaper` is the share of trials that aim lower, at a cost drawn between the cheapest
    policy's and the most that is allowed, so that the front has more than one end.

    Under an accuracy to be kept, the aim is a latency drawn between 0.6 and 1 times the least that kept it so far (between the
    cheapest and the dense policy's before there is one): the search presses downwards without knowing how far it will get.
    """

    def __init__(self, problem: Problem, *, cheaper: float = 0.0) -> None:
        self._problem, self._cheaper = problem, cheaper
        self.best: Trial | None = None

    def tell(self, trial: Trial) -> None:
        """Remember the trial if it is the best so far."""
        if trial.score is None or not trial.feasible:
            return
        value = self._problem.value(trial.score, trial.cost)
        if self.best is None or self.best.score is None or value > self._problem.value(self.best.score, self.best.cost):
            self.best = trial

    def limits(self, rng: np.random.Generator) -> Limits:
        """The limits of one trial."""
        problem, least = self._problem, self._problem.price(self._problem.cost(self._problem.cheapest))
        if problem.floor is None:
            if rng.random() >= self._cheaper:
                return problem.limits
            most = problem.dense_cost.metric(problem.metric) or 1.0
            share = rng.uniform(least, dict(problem.limits.top).get(problem.metric, most) / most)
        elif self.best is None:
            share = rng.uniform(least, max(1.0, least))
        else:
            share = max(least, problem.price(self.best.cost) * rng.uniform(0.6, 1.0))
        return problem.limited(share)
