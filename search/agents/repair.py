"""Getting within the budget: the cheapest policy of a space, and the policy nearest to a wanted one that fits.

Neither assumes that costs add up or that fewer bits and channels always cost less: every step asks the device again, and only
policies that it found to fit are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tightrope.spaces.budget import Limits
from tightrope.spaces.cost import Cost
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space

if TYPE_CHECKING:
    from tightrope.search.agent import Problem

Costs = Callable[[Sequence[Policy]], list[Cost]]
Point = NDArray[np.float64]

_SWEEPS = 6
_STEPS = 16
_PASSES = 4


def cheapest(space: Space, costs: Costs, use: Callable[[Cost], float]) -> Policy:
    """The cheapest policy that coordinate descent finds.

    It starts from every decision at its smallest option, from each bit pair of the space at the least widths, and from the best
    of 64 random policies; then, decision by decision, takes the option of least `use` until a sweep changes nothing.
    """
    pairs = dict.fromkeys(p for offered in space.pairs.values() for p in offered)
    rng = np.random.default_rng(0)
    starts = [space.decode(np.zeros(space.dimension)), space.dense, *(space.uniform(0.0, pair) for pair in pairs)]
    drawn = [space.sample(rng) for _ in range(64)]
    starts.append(drawn[_least(costs(drawn), use)])
    ranked = sorted(zip(map(use, costs(starts)), range(len(starts)), strict=True))
    ends = [_descend(space, costs, use, starts[i]) for _, i in ranked[:3]]
    return ends[_least(costs(ends), use)]


def _descend(space: Space, costs: Costs, use: Callable[[Cost], float], start: Policy) -> Policy:
    point, best = space.encode(start), use(costs([start])[0])
    for _ in range(_SWEEPS):
        before = best
        for i, variable in enumerate(space.variables):
            n = len(variable.options)
            tries = np.repeat(point[None], n, axis=0)
            tries[:, i] = (np.arange(n) + 0.5) / n
            found = costs([space.decode(t) for t in tries])
            at = _least(found, use)
            if use(found[at]) < best:
                point, best = tries[at], use(found[at])
        if best >= before:
            break
    return space.decode(point)


def _least(costs: list[Cost], use: Callable[[Cost], float]) -> int:
    return min(range(len(costs)), key=lambda i: use(costs[i]))


def fit(problem: Problem, wanted: ArrayLike, limits: Limits | None = None) -> Policy:
    """The policy of a point of [0,1]^d if it fits, else one near it that does.

    First the point moves along a straight line towards the cheapest policy, so that every decision gives in by the same share,
    to the farthest of `_STEPS` places (and then of `_STEPS` between that one and the next) that fits. What is left of the
    budget is then given back: one option at a time towards what was wanted, the decisions that gave in most first.

    Args:
        wanted: `d`-dim point.
        limits: what must hold, the problem's if None. Where even the cheapest policy breaks them, it is the answer.
    """
    space, limits = problem.space, limits or problem.limits
    goal: Point = np.asarray(wanted, dtype=np.float64)

    def fits(point: Point) -> bool:
        return limits.met(problem.cost(space.decode(point)))

    if fits(goal):
        return space.decode(goal)
    low = space.encode(problem.cheapest)
    if not fits(low):
        return problem.cheapest
    share, width = 0.0, 1.0
    for _ in range(2):
        places = share + width * np.arange(_STEPS) / _STEPS
        line = [space.decode(low + t * (goal - low)) for t in places]
        found = [t for t, cost in zip(places, problem.costs(line), strict=True) if limits.met(cost)]
        share, width = max(found, default=0.0), width / _STEPS
    point = low + share * (goal - low)
    return space.decode(_give_back(space, point, goal, fits))


def _give_back(space: Space, point: Point, goal: Point, fits: Callable[[Point], bool]) -> Point:
    """Move `point`, which fits, one option towards `goal` in as many coordinates as still fit, in bounded steps."""
    options = np.array([len(v.options) for v in space.variables])
    moved = point + np.clip(goal - point, -1 / options, 1 / options)
    order = np.argsort(-np.abs(goal - point) * options, kind="stable")
    order = order[moved[order] != point[order]]
    for _ in range(_PASSES):
        if not len(order):
            break
        done, over = 0, len(order) + 1  # the first `done` moves fit, the first `over` do not
        while over - done > 1:
            middle = (done + over) // 2
            trial = point.copy()
            trial[order[:middle]] = moved[order[:middle]]
            done, over = (middle, over) if fits(trial) else (done, middle)
        point = point.copy()
        point[order[:done]] = moved[order[:done]]
        order = order[over:]
    return point
