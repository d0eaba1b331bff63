"""Holding a latency budget to the clock."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from problems import make_problem

from tightrope.search import edge
from tightrope.search.agent import Problem
from tightrope.search.progress import Quiet
from tightrope.spaces import Policy


def clock(problem: Problem, factor: float) -> Any:
    """What stands in for the clock: intervals of all but dense end at `factor` of their estimates, give or take 1 %."""
    rng = np.random.default_rng(0)

    def timed(policies: list[Policy], dense: Policy, setting: Any) -> list[tuple[float, float, float]]:
        whole = problem.cost(dense).latency_ms
        ends = [factor * problem.cost(p).latency_ms / whole * rng.uniform(0.99, 1.01) for p in policies]
        return [(0.95 * end, 0.9 * end, end) for end in ends]

    return timed


def setting(measured: bool = True) -> Any:
    return SimpleNamespace(measured=measured, progress=Quiet())


@pytest.mark.parametrize(("factor", "held"), [(1.05, 1.05), (0.9, 1.0), (2.0, edge.MOST)])
def test_the_limit_is_tightened_by_what_the_table_misses(monkeypatch: pytest.MonkeyPatch, factor: float, held: float) -> None:
    problem = make_problem()
    monkeypatch.setattr(edge, "timed", clock(problem, factor))
    before, after = dict(problem.limits.top), dict(edge.tightened(problem, setting()).top)
    assert after.keys() == before.keys()
    assert before["latency_ms"] / after["latency_ms"] == pytest.approx(held, rel=0.01)


def test_a_limit_that_only_the_cheapest_policies_meet_stays_one_that_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    free = make_problem()
    share = 1.02 * free.cost(free.cheapest).latency_ms / free.dense_cost.latency_ms
    problem = make_problem(budget=f"latency<={share:.9f}x")
    monkeypatch.setattr(edge, "timed", clock(problem, 1.1))
    held = replace(problem, limits=edge.tightened(problem, setting()))
    assert held.limits.top[0][1] == pytest.approx(problem.limits.top[0][1] / 1.02)
    held.check()


def test_a_model_of_a_device_is_taken_at_its_word() -> None:
    problem = make_problem()
    assert edge.tightened(problem, setting(measured=False)) == problem.limits


def test_policies_at_the_edge_fit_and_use_the_budget() -> None:
    problem = make_problem()
    found = edge.edge(problem)
    assert len(found) == len(set(found)) > 1
    uses = [problem.limits.use(problem.cost(p)) for p in found]
    assert max(uses) <= 1.0 and float(np.median(uses)) > 0.9
