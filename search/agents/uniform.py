"""The uniform control: every group keeps the same share of its channels, every layer has the same precision."""

from collections.abc import Mapping

import numpy as np

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.policy import Policy, unique
from tightrope.spaces.space import Space


class Uniform:
    """First, for each precision of the space, the largest even share that fits; then small changes around the best of them.

    Args:
        spread: standard deviation of the changes, in [0,1]^d.
    """

    def __init__(self, problem: Problem, *, spread: float = 0.08) -> None:
        self._problem, self._aim, self._spread = problem, Aim(problem), spread
        self._even: list[Policy] | None = None

    def ask(self, number: int) -> Policy:
        problem, rng = self._problem, self._problem.rng(number)
        if self._even is None:
            self._even = even_policies(problem)
        if number < len(self._even):
            return self._even[number]
        centre = problem.space.encode(self._even[0] if self._aim.best is None else self._aim.best.policy)
        point = np.clip(centre + rng.normal(0, self._spread, centre.shape), 0, 1)
        return fit(problem, point, self._aim.limits(rng))

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return {}


def even_policies(problem: Problem) -> list[Policy]:
    """For each bit pair, the policy of the largest even share within the limits; the least share made to fit if none is."""
    space, found = problem.space, []
    for pair in sorted({p for offered in space.pairs.values() for p in offered}, reverse=True):
        policies = [space.uniform(share, pair) for share in even_shares(space)]
        fitting = [p for p, cost in zip(policies, problem.costs(policies), strict=True) if problem.limits.met(cost)]
        if fitting:
            found.append(fitting[-1])
    return unique(found) or [fit(problem, space.encode(space.uniform(0.0, (8, 8))))]


def even_shares(space: Space) -> list[float]:
    """Every share at which `Space.uniform` changes, ascending: all widths of all groups as shares of the dense ones."""
    return sorted({w / options[-1] for options in space.widths.values() for w in options} | {1.0})
