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
_ROUNDS, _PREFIXES = 4, 6
_FULL = 0.998


def cheapest(space: Space, costs: Costs, use: Callable[[Cost], float]) -> Policy:
    """The cheapest policy that coordinate descent finds.

    It starts from every decision at its smallest option, from each bit pair of the space at the least widths, and from the best
    of 64 random policies; then, decision by decision, takes the option of least `use` until a sweep changes nothing.
    """
    pairs = dict.fromkeys(p for offered in space.pairs.values() for p in offered)
    rng = np.random.default_rng(0)
    starts = [space.decode(np.zeros(space.dimension)), space.dense, *(space.uniform(0.0, pair) for pair in pairs)]
    drawn = space.decode_many([rng.random(space.dimension) for _ in range(64)])
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
            found = costs(space.decode_many(tries))
            at = _least(found, use)
            if use(found[at]) < best:
                point, best = tries[at], use(found[at])
        if best >= before:
            break
    return space.decode(point)


def _least(costs: list[Cost], use: Callable[[Cost], float]) -> int:
    return min(range(len(costs)), key=lambda i: use(costs[i]))


def fit(
    problem: Problem, wanted: ArrayLike, limits: Limits | None = None, *, fill: bool = True, keep: Sequence[int] = ()
) -> Policy:
    """A policy that fits, as near as can be to a point of [0,1]^d; with `fill`, grown until the budget is used.

    A point over budget moves along a straight line towards the cheapest policy, so that every decision gives in by the same
    share, to the farthest of `_STEPS` places (and then of `_STEPS` between that one and the next) that fits; what is left is
    given back one option at a time. `fill` goes on in the same way towards the dense policy: what costs less than it may
    has given away accuracy for nothing.

    Args:
        wanted: `d`-dim point.
        limits: what must hold, the problem's if None. Where even the cheapest policy breaks them, it is the answer.
        keep: decisions that `fill` leaves alone.
    """
    space, limits = problem.space, limits or problem.limits
    goal: Point = np.asarray(wanted, dtype=np.float64)

    def fits(points: ArrayLike) -> list[bool]:
        return [limits.met(cost) for cost in problem.costs(space.decode_many(points))]

    point = goal
    if not fits([point])[0]:
        low = space.encode(problem.cheapest)
        if not fits([low])[0]:
            return problem.cheapest
        point = _climb(space, _along(low, goal, fits), goal, fits)
    if fill and limits.use(problem.cost(space.decode(point))) < _FULL:
        dense = np.ones(space.dimension)
        dense[[*keep]] = point[[*keep]]
        point = _climb(space, _along(point, dense, fits), dense, fits)
    return space.decode(point)


Fits = Callable[[ArrayLike], list[bool]]


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

    As many moves as fit together are found in two looks, of `_PREFIXES` points each: devices answer many policies at once
    sooner than one after another. The moves behind them, which do not fit, are left out from then on.
    """
    options, point = np.array([len(v.options) for v in space.variables]), start
    left = set(np.flatnonzero(start != goal).tolist())
    for _ in range(_ROUNDS):
        if not left:
            break
        moved = point + np.clip(goal - point, -1 / options, 1 / options)
        order = sorted(left, key=lambda i: (-abs(goal[i] - point[i]) * options[i], i))
        done, over = 0, len(order) + 1  # the first `done` moves fit, the first `over` do not
        for _ in range(2):
            counts = sorted({*np.linspace(done + 1, over - 1, _PREFIXES).astype(int).tolist()} - {done, over})
            tried = np.repeat(point[None], len(counts), axis=0)
            for row, count in zip(tried, counts, strict=True):
                row[order[:count]] = moved[order[:count]]
            inside = [count for count, ok in zip(counts, fits(tried), strict=True) if ok]
            done = max(inside, default=done)
            over = min((count for count in counts if count > done), default=over)
        point = point.copy()
        point[order[:done]] = moved[order[:done]]
        left -= set(order[done:over])
        left -= {i for i in order[:done] if point[i] == goal[i]}
    return point
