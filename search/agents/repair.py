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
_TRIES = 24


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


def fit(problem: Problem, wanted: ArrayLike, limits: Limits | None = None, *, fill: bool = True) -> Policy:
    """A policy that fits, as near as can be to a point of [0,1]^d; with `fill`, grown until the budget is used.

    A point over budget moves along a straight line towards the cheapest policy, so that every decision gives in by the same
    share, to the farthest of `_STEPS` places (and then of `_STEPS` between that one and the next) that fits; what is left is
    given back one option at a time. `fill` goes on in the same way towards the dense policy: what costs less than it may
    has given away accuracy for nothing.

    Args:
        wanted: `d`-dim point.
        limits: what must hold, the problem's if None. Where even the cheapest policy breaks them, it is the answer.
    """
    space, limits = problem.space, limits or problem.limits
    goal: Point = np.asarray(wanted, dtype=np.float64)

    def fits(points: Sequence[Point]) -> list[bool]:
        return [limits.met(cost) for cost in problem.costs([space.decode(p) for p in points])]

    point = goal
    if not fits([point])[0]:
        low = space.encode(problem.cheapest)
        if not fits([low])[0]:
            return problem.cheapest
        point = _climb(space, _along(low, goal, fits), goal, fits)
    if fill:
        dense = np.ones(space.dimension)
        point = _climb(space, _along(point, dense, fits), dense, fits)
    return space.decode(point)


Fits = Callable[[Sequence[Point]], list[bool]]


def _along(start: Point, goal: Point, fits: Fits) -> Point:
    """The farthest place found on the line from `start`, which fits, to `goal`."""
    share, width = 0.0, 1.0
    for _ in range(2):
        places = share + width * np.arange(1, _STEPS) / _STEPS
        inside = fits([start + t * (goal - start) for t in places])
        share, width = max((t for t, ok in zip(places, inside, strict=True) if ok), default=share), width / _STEPS
    return start + share * (goal - start)


def _climb(space: Space, start: Point, goal: Point, fits: Fits) -> Point:
    """Move `start`, which fits, towards `goal` one option of one decision at a time, those that are farthest first.

    As many moves as fit together are found by bisection; the one that does not fit is left out from then on. At most `_TRIES`
    points are asked for.
    """
    options, point, tries = np.array([len(v.options) for v in space.variables]), start, 0
    left = set(np.flatnonzero(start != goal).tolist())
    while left and tries < _TRIES:
        moved = point + np.clip(goal - point, -1 / options, 1 / options)
        order = sorted(left, key=lambda i: (-abs(goal[i] - point[i]) * options[i], i))
        done, over = 0, len(order) + 1  # the first `done` moves fit, the first `over` do not
        while over - done > 1 and tries < _TRIES:
            middle = (done + over + 1) // 2
            tried = point.copy()
            tried[order[:middle]] = moved[order[:middle]]
            done, over = (middle, over) if fits([tried])[0] else (done, middle)
            tries += 1
        point = point.copy()
        point[order[:done]] = moved[order[:done]]
        left -= set(order[done:over])
        left -= {i for i in order[:done] if point[i] == goal[i]}
    return point
