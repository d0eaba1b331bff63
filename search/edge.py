"""Holding a latency budget to the clock: how far a device's estimates are off just where the budget lies."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tightrope.estimators.threads import one_blas_thread
from tightrope.search.agent import Problem
from tightrope.search.agents.repair import fit
from tightrope.spaces.budget import Limits
from tightrope.spaces.policy import Policy, unique

if TYPE_CHECKING:
    from tightrope.search.session import Setting

Interval = tuple[float, float, float]
log = logging.getLogger(__name__)
TIMED, ROUNDS = 12, 100
SPREAD = 0.15  # of the policies around the even ones, in [0,1]^d
MOSTLY = 0.7
MOST = 1.15  # a table that is further off is wrong, and no budget is held to it


def edge(problem: Problem, count: int = TIMED) -> list[Policy]:
    """Policies that use the whole budget as the device estimates it: the even ones, and others near them."""
    even = problem.even
    drawn = [fit(problem, even.near(i, problem.rng(i, use=3), SPREAD)) for i in range(2 * count)]
    return unique([*(fit(problem, problem.space.encode(p)) for p in even.policies), *drawn])[:count]


def tightened(problem: Problem, setting: "Setting") -> Limits:
    """The problem's limits, that on latency tightened by what the estimates miss at the edge of the budget.

    Policies there are built and timed in the same rounds as the dense model. What counts is the ratio to dense, the upper end of
    its measured interval over the estimate, since that end is held to the budget once the search is over (`finish.py`); the limit
    is divided by what `MOSTLY` of them stay below, never loosened, and never brought below the cheapest policy. So the policies
    that a search ends with measure within the budget, whatever the table's errors have in common there. Nothing is done on a device
    that is a model.
    """
    if "latency_ms" not in dict(problem.limits.top) or not setting.measured:
        return problem.limits
    setting.progress.phase("time policies at the edge of the budget")
    policies = edge(problem)
    measured = timed(policies, problem.space.dense, setting)
    whole = problem.dense_cost.latency_ms
    missed = [high / (problem.cost(p).latency_ms / whole) for p, (_, _, high) in zip(policies, measured, strict=True)]
    factor, least = float(np.clip(np.quantile(missed, MOSTLY), 1.0, MOST)), problem.cost(problem.cheapest).latency_ms
    log.info("policies at the edge of the budget take %.3f of their estimates; the search is held to as much less", factor)
    return Limits(tuple((m, max(most / factor, least) if m == "latency_ms" else most) for m, most in problem.limits.top))


@one_blas_thread()
def timed(policies: Sequence[Policy], dense: Policy, setting: "Setting") -> list[Interval]:
    """Latency of each policy as a ratio to the dense model, with its 90 % interval, all timed in the same rounds."""
    from tightrope.compressors.assemble import assemble
    from tightrope.estimators.measured.clock import ratios

    named = {"dense": dense, **{str(i): p for i, p in enumerate(policies)}}
    files = {name: setting.source.timed(assemble(setting.prepared, p), setting.device.batch) for name, p in named.items()}
    found = ratios(files, "dense", rounds=ROUNDS, seed=setting.config.seed)
    return [found[str(i)] for i in range(len(policies))]
