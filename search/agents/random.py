"""Random search (Bergstra and Bengio 2012), within the budget: the control that every agent must beat."""

from collections.abc import Mapping

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.policy import Policy


class Random:
    """Policies uniform in the space: up to `draws` are drawn and the first that fits is asked; else the last is made to fit."""

    def __init__(self, problem: Problem, *, draws: int = 8) -> None:
        self._problem, self._aim, self._draws = problem, Aim(problem), draws

    def ask(self, number: int) -> Policy:
        problem, rng = self._problem, self._problem.rng(number)
        limits = self._aim.limits(rng)
        points = rng.random((self._draws, problem.space.dimension))
        policies = [problem.space.decode(p) for p in points]
        for policy, cost in zip(policies, problem.costs(policies), strict=True):
            if limits.met(cost):
                return policy
        return fit(problem, points[-1], limits)

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return {}
