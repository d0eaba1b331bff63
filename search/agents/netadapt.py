"""Greedy, layer by layer, after NetAdapt (Yang et al. 2018, "NetAdapt: platform-aware neural network adaptation").

NetAdapt cuts a model down to its budget in steps: each proposal takes a stated share of the cost from one layer, and the best
one is kept. Here every trial has to lie within the budget, so the walk begins there, at the best even policy, and what one
decision is made to free the others are given.
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


class NetAdapt:
    """From the best policy so far, one decision in turn is cut until it frees a share of the budget; better ones are kept.

    Args:
        step: share of the budget that a proposal frees at first.
        decay: factor of `step` after each round over all decisions (the paper's is 0.96 an iteration).
    """

    def __init__(self, problem: Problem, *, step: float = 0.06, decay: float = 0.7) -> None:
        self._problem, self._aim, self._even = problem, Aim(problem), problem.even
        self._step, self._decay = step, decay

    def ask(self, number: int) -> Policy:
        problem, rng, even = self._problem, self._problem.rng(number), self._even.policies
        limits = self._aim.limits(rng)
        if number < len(even):
            return even[number]
        base = even[0] if self._aim.best is None else self._aim.best.policy
        turn, at = divmod(number - len(even), problem.space.dimension)
        order = problem.rng(turn, use=1).permutation(problem.space.dimension)
        point = problem.space.encode(base)
        cut = int(order[at])
        return fit(problem, self._cut(point, cut, self._step * self._decay**turn), limits, keep=[cut])

    def _cut(self, point: Point, at: int, step: float) -> Point:
        """The point with its decision `at` at the dearest option that frees this share of the budget, or that which frees most."""
        problem, n = self._problem, len(self._problem.space.variables[at].options)
        tried = np.repeat(point[None], n, axis=0)
        tried[:, at] = (np.arange(n) + 0.5) / n
        tried = tried[tried[:, at] < point[at] - 0.5 / n]
        if not len(tried):
            return point
        use = problem.limits.use if problem.limits.top else problem.price
        before, *after = map(use, problem.costs(problem.space.decode_many([point, *tried])))
        freed = before - np.array(after)
        enough = np.flatnonzero(freed >= step)
        return np.asarray(tried[enough[-1] if len(enough) else freed.argmax()])

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return {}
