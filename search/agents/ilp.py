"""Sensitivities and an integer programme, after HAWQ-V3 (Yao et al. 2021, section 3.4), over channels, ranks and bits at once.

Theirs takes the sensitivity of a layer from the Hessian and adds them up. Here what an option loses is told by calibration, where
the space knows it (`Space.losses`): the first programmes weigh the kinds of loss by guesses, so that their trials tell what each
is worth. Without it the first trials move a few decisions each around the best even policy. Then a regression (`response`) learns
from every trial, what decisions do to each other too.

A programme picks one option a decision, for the most score at a cost that the device has told for each option by itself, around
the best trial told. Neither costs nor losses really add up, so both are estimated again at the solution; where it is no better
than where it began, the next one may change fewer decisions.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.agents.response import Response
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits
from tightrope.spaces.cost import Cost
from tightrope.spaces.policy import Policy

Float = NDArray[np.float64]
Index = NDArray[np.int64]

_TIGHTER = (1.0, 0.97, 0.9)
_NEARER = (1.0, 0.5, 0.25)
_AGAIN = 4
_WHOLLY, _MOST_OPEN = 1e-6, 5
_WHOLE = 2.0**17  # costs enter a programme as whole numbers up to this; with fractions HiGHS repairs its solutions, and prints that
_REACH = (1.0, 0.3, 0.6)  # of `reach`, in turn: far by the mean, near and farther by draws


class ILP:
    """The programme's solutions; between them what the regression is not sure of, drawn from its posterior.

    Args:
        guesses: trials that weigh the kinds of loss, where the space knows it; None for a tenth of those planned, at least 6.
        sensitivities: trials that measure instead, None for as many as there are decisions, at most a quarter of those planned.
        moved: decisions that each of them moves, None for as many as let every decision be moved twice.
        rounds: programmes that a guess takes, each around the solution of the one before: what bits cost depends on widths, so that
            costs told around a narrow net say little of a wide one.
        certain: one programme in so many takes the regression at its mean.
        reach: most decisions that a programme changes, as a share of all.
        cheaper: share of the trials that aim below the budget.
    """

    def __init__(
        self, problem: Problem, *, guesses: int | None = None, sensitivities: int | None = None, moved: int | None = None,
        rounds: int = 1, certain: int = 3, reach: float = 0.5, cheaper: float = 0.1,
    ) -> None:  # fmt: skip
        self._problem, self._aim, self._even = problem, Aim(problem, cheaper=cheaper), problem.even
        d, known = problem.space.dimension, bool(problem.space.losses)
        self._guesses = (max(6, problem.trials // 10) if guesses is None else guesses) if known else 0
        wanted = min(d, max(2, problem.trials // 4)) if sensitivities is None else sensitivities
        self._sensitivities = 0 if known else wanted
        self._moved = min(d, -(-2 * d // max(1, wanted))) if moved is None else moved
        self._rounds, self._certain, self._reach = rounds, certain, reach
        self._response = Response(problem.space)
        self._sizes = self._response.sizes
        self._told: dict[Policy, float] = {}
        self._points: dict[Policy, Index] = {}
        self._fitted = 0
        self._singles: dict[Policy, tuple[Index, list[Cost]]] = {}

    def ask(self, number: int) -> Policy:
        rng, even = self._problem.rng(number), self._even.policies
        limits = self._aim.limits(rng)
        if number < len(even):
            return even[number]
        guessing = number < len(even) + self._guesses
        if not guessing and (number < len(even) + self._sensitivities or len(self._told) < 4):
            return self._measure(number - len(even), rng, limits)
        if not guessing:
            self._learn()
        for attempt in range(_AGAIN):
            sure = attempt == 0 and number % self._certain == 0
            weights = self._response.guess(rng) if guessing else self._response.weights(None if sure else rng)
            reach = 1.0 if guessing else self._reach * _REACH[number % len(_REACH)]
            policy = self._best()
            for _ in range(self._rounds if guessing else 1):
                policy = self._programme(policy, weights, limits, reach)
            if policy not in self._told:
                return policy
        return self._measure(number, rng, limits)

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        if trial.score is None:
            return
        self._told[trial.policy] = self._problem.value(trial.score, trial.cost)
        self._points[trial.policy] = self._options(trial.policy)

    def losses(self) -> Mapping[str, float]:
        return {"noise": self._response.noise} if self._fitted else {}

    def _options(self, policy: Policy) -> Index:
        return np.asarray(self._problem.space.encode(policy) * self._sizes, dtype=np.int64)

    def _best(self) -> Policy:
        best = self._aim.best
        return self._even.policies[0] if best is None else best.policy

    def _measure(self, turn: int, rng: np.random.Generator, limits: Limits) -> Policy:
        """The best policy so far with a few decisions at other options; all decisions take their turn."""
        d, start = len(self._sizes), turn * self._moved
        order = self._problem.rng(start // d, use=2).permutation(d)
        chosen = order[(start + np.arange(self._moved)) % d]
        options, sizes = self._options(self._best()), self._sizes[chosen]
        options[chosen] = (options[chosen] + 1 + (rng.random(len(chosen)) * (sizes - 1)).astype(int)) % sizes
        return fit(self._problem, (options + 0.5) / self._sizes, limits, keep=chosen.tolist())

    def _learn(self) -> None:
        if self._fitted != len(self._told):
            self._fitted = len(self._told)
            values = np.array(list(self._told.values()))
            top = values.max()
            scale = max(float(np.median(top - values)), 1e-9)
            self._response.fit(list(self._points.values()), (-np.log1p((top - values) / scale)).tolist())

    def _programme(self, centre: Policy, weights: Float, limits: Limits, reach: float) -> Policy:
        """The best policy by these weights in reach of `centre`, within the limits as the device costs it."""
        problem, space, response, start = self._problem, self._problem.space, self._response, self._options(centre)
        singles, costs = self._around(centre, start)
        gains = response.predict(singles, weights) - response.predict(start[None], weights)
        spent = _figures([problem.cost(centre)], limits)[0]
        rises, most = _figures(costs, limits) - spent, np.array([value for _, value in limits.top])
        best, worth = centre, -np.inf
        for nearer in _NEARER:
            for share in _TIGHTER:
                chosen = _solve(self._sizes, start, gains, rises, share * most - spent, nearer * reach)
                policy = centre if chosen is None else space.decode((chosen + 0.5) / self._sizes)
                if limits.met(problem.cost(policy)):
                    break
            policy = fit(problem, space.encode(policy), limits)
            value, stays = response.predict(np.stack([self._options(policy), start]), weights)
            if value > worth:
                best, worth = policy, value
            if value > stays:
                break
        return best

    def _around(self, centre: Policy, start: Index) -> tuple[Index, list[Cost]]:
        """Every policy that differs from `centre` in one decision at most, decision by decision, and what it costs."""
        if centre not in self._singles:
            rows = np.repeat(start[None], self._sizes.sum(), axis=0)
            rows[np.arange(len(rows)), np.repeat(np.arange(len(start)), self._sizes)] = np.concatenate(
                [*map(np.arange, self._sizes)]
            )
            costs = self._problem.costs(self._problem.space.decode_many((rows + 0.5) / self._sizes))
            self._singles = {centre: (rows, costs)}
        return self._singles[centre]


def _figures(costs: Sequence[Cost], limits: Limits) -> Float:
    """`n x m` array of the limited metrics of costs."""
    return np.array([[cost.metric(metric) or 0.0 for metric, _ in limits.top] for cost in costs])


def _solve(sizes: Index, start: Index, gains: Float, rises: Float, room: Float, reach: float) -> Index | None:
    """One option a decision for the most gain; None where nothing fits.

    HiGHS solves the relaxation, in which no more decisions are split between options than there are limits (Sinha and Zoltners
    1979); those are then put in every way that their options allow. It takes a tenth of the time of branching.

    Args:
        sizes, start: `d`-dim, how many options each decision has and where it stands.
        gains, rises: `o`-dim and `o x m`, of all options of all decisions in order: gain, and rise of each cost.
        room: `m`-dim, how much each cost may rise in all.
        reach: share of the decisions that may change.
    """
    d, count = len(sizes), int(sizes.sum())
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    owner = np.repeat(np.arange(d), sizes)
    stays = np.zeros(count)
    stays[first + start] = 1
    one = csr_array((np.ones(count), (owner, np.arange(count))))
    scale = np.maximum(np.abs(rises).max(0, initial=0.0), 1e-300) / _WHOLE
    rows = vstack([one, csr_array(np.ceil(rises.T / scale[:, None])), csr_array(stays[None])]).tocsr()
    low = np.concatenate([np.ones(d), np.full(len(room), -np.inf), [d - max(1, round(reach * d))]])
    high = np.concatenate([np.ones(d), np.floor(room / scale), [np.inf]])
    found = milp(-gains, bounds=Bounds(0, 1), constraints=LinearConstraint(rows, low, high), options={"presolve": False})
    if found.x is None:
        return None
    shares = np.split(found.x, first[1:])
    whole = np.array([np.argmax(x) for x in shares])
    split = [i for i, x in enumerate(shares) if x.max() < 1 - _WHOLLY][:_MOST_OPEN]
    ways = [sorted({*np.flatnonzero(shares[i] > _WHOLLY).tolist(), int(start[i])}) for i in split]
    tried = np.repeat(whole[None], math.prod(map(len, ways)), axis=0)
    tried[:, split] = np.array(list(product(*ways)), dtype=np.int64).reshape(len(tried), -1)
    places = first + tried
    fits = (rises[places].sum(1) <= room).all(1) & ((tried == start).sum(1) >= d - max(1, round(reach * d)))
    return np.asarray(tried[np.argmax(np.where(fits, gains[places].sum(1), -np.inf))])
