"""The uniform control: every group keeps the same share of its channels, every layer has the same precision."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits
from tightrope.spaces.policy import Policy, unique
from tightrope.spaces.space import Space


class Uniform:
    """First, for each precision of the space, the largest even share that fits; then small changes to the best of these.

    Args:
        spread: standard deviation of the changes, in [0,1]^d.
    """

    def __init__(self, problem: Problem, *, spread: float = 0.08) -> None:
        self._problem, self._even, self._spread = problem, Even(problem), spread
        self._aim, self._best = Aim(problem), Aim(problem)

    def ask(self, number: int) -> Policy:
        problem, rng, even = self._problem, self._problem.rng(number), self._even.policies
        if number < len(even):
            return even[number]
        centre = problem.space.encode(even[0] if self._best.best is None else self._best.best.policy)
        point = np.clip(centre + rng.normal(0, self._spread, centre.shape), 0, 1)
        return fit(problem, point, self._aim.limits(rng))

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        if trial.number < len(self._even.policies):
            self._best.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return {}


class Even:
    """The even policies of a problem, a good place to begin any search; worked out at the first use."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._policies: list[Policy] | None = None

    @property
    def policies(self) -> list[Policy]:
        """For each bit pair, the policy of the largest even share within the limits; the least one made to fit if none is.

        Pairs that another one beats in bits and share are left out.

        Under an accuracy to be kept, those of 0.75, 0.5 and 0.25 times the dense cost.
        """
        if self._policies is None:
            problem = self._problem
            aims = [problem.limits] if problem.floor is None else [problem.limited(share) for share in (0.75, 0.5, 0.25)]
            found = [p for limits in aims for p in self._within(limits)]
            self._policies = unique(found) or [fit(problem, problem.space.encode(problem.space.uniform(0.0, (8, 8))))]
        return self._policies

    def _within(self, limits: Limits) -> list[Policy]:
        """Those that no other one beats in weight bits, activation bits and share at once, dearest precision first.

        Where more than an eighth of the trials would go to them, some are left out evenly.
        """
        space, problem = self._problem.space, self._problem
        shares, found = even_shares(space), list[tuple[int, int, float]]()
        for pair in sorted({p for offered in space.pairs.values() for p in offered}, reverse=True):
            costs = problem.costs([space.uniform(share, pair) for share in shares])
            largest = max((share for share, cost in zip(shares, costs, strict=True) if limits.met(cost)), default=None)
            if largest is not None and not any(w >= pair[0] and a >= pair[1] and s >= largest for w, a, s in found):
                found.append((*pair, largest))
        most = max(4, problem.trials // 8)
        kept = sorted({*np.linspace(0, len(found) - 1, min(most, len(found))).astype(int).tolist()})
        return [space.uniform(share, (w, a)) for w, a, share in (found[i] for i in kept)]

    def near(self, number: int, rng: np.random.Generator, spread: float) -> NDArray[np.float64]:
        """A point near one of the even policies, which take turns; `spread` is its standard deviation in [0,1]^d."""
        centre = self._problem.space.encode(self.policies[number % len(self.policies)])
        return np.clip(centre + rng.normal(0, spread, centre.shape), 0, 1)


def even_shares(space: Space) -> list[float]:
    """Every share at which `Space.uniform` changes, ascending: all widths of all groups as shares of the dense ones."""
    return sorted({w / options[-1] for options in space.widths.values() for w in options} | {1.0})
