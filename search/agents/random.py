"""Random search (Bergstra and Bengio 2012, "Random search for hyper-parameter optimization"): the control to beat."""

from collections.abc import Mapping

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.policy import Policy


class Random:
    """Policies drawn uniformly in the space, then made to fit the budget and to use it.

    Args:
        cheaper: share of the trials that aim below the budget. None, so that as a control it puts every trial where the best policy
            under the budget is looked for.
    """

    def __init__(self, problem: Problem, *, cheaper: float = 0.0) -> None:
        self._problem, self._aim = problem, Aim(problem, cheaper=cheaper)

    def ask(self, number: int) -> Policy:
        rng = self._problem.rng(number)
        return fit(self._problem, rng.random(self._problem.space.dimension), self._aim.limits(rng))

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return {}
