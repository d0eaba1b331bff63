"""Fronts and hypervolume against slow references."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import judge, make_problem

from tightrope.search.pareto import best, front, hypervolume, non_dominated, ties
from tightrope.search.trial import Trial
from tightrope.spaces import Score

POINTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=25)


@given(points=POINTS)
def test_non_dominated_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    costs, scores = [c for c, _ in points], [s for _, s in points]
    kept = {p for p, keep in zip(points, non_dominated(costs, scores), strict=True) if keep}
    assert kept == {(c, s) for c, s in points if not any(a <= c and b >= s and (a, b) != (c, s) for a, b in points)}
    assert int(non_dominated(costs, scores).sum()) == len(kept)


@given(points=POINTS)
def test_hypervolume_counts_the_unit_squares_that_are_dominated(points: list[tuple[int, int]]) -> None:
    squares = sum(any(c <= x and s >= y + 1 for c, s in points) for x in range(10) for y in range(2, 12))
    assert hypervolume([c for c, _ in points], [s for _, s in points], (10, 2)) == squares


def test_hypervolume_by_hand() -> None:
    assert hypervolume([0.2, 0.5, 0.5], [60, 80, 70], (1.0, 50.0)) == pytest.approx(0.8 * 10 + 0.5 * 20)


def made(values: list[tuple[float, float]], stderr: float = 0.5) -> list[Trial]:
    problem = make_problem()
    trial = judge(problem, 0, problem.cheapest)
    return [
        Trial(i, "test", trial.policy, trial.cost, Score(score, stderr, 100), True, time=cost)
        for i, (cost, score) in enumerate(values)
    ]


def price(trial: Trial) -> float:
    return trial.time


def test_the_highest_score_is_taken_and_equal_ones_go_to_the_cheaper() -> None:
    found = best(made([(0.9, 95.0), (0.5, 95.0), (0.2, 94.4)]), price)
    assert found is not None and found.number == 1


def test_cheaper_trials_within_the_standard_error_are_named() -> None:
    trials = made([(0.9, 95.0), (0.5, 94.6), (0.2, 94.4), (0.4, 94.7)])
    assert [t.number for t in ties(trials, trials[0], price)] == [3, 1]
    assert [t.number for t in ties(trials, trials[3], price)] == [2]
    assert ties(trials, trials[2], price) == []


def test_with_an_accuracy_to_keep_the_cheapest_is_taken() -> None:
    found = best(made([(0.9, 95.0), (0.5, 90.0), (0.5, 91.0)]), price, least_cost=True)
    assert found is not None and found.number == 2


def test_trials_that_failed_or_break_the_budget_are_never_taken() -> None:
    good, *_ = trials = made([(0.9, 90.0), (0.5, 95.0), (0.1, 96.0)])
    over = Trial(1, "test", good.policy, good.cost, trials[1].score, False)
    failed = Trial(2, "test", good.policy, good.cost, None, True, "it broke")
    assert best([good, over, failed], price) == good
    assert best([over, failed], price) is None
    assert front([failed], price) == []


def test_the_front_runs_from_cheapest_to_dearest() -> None:
    found = front(made([(0.9, 95.0), (0.5, 94.0), (0.6, 93.0), (0.2, 80.0)]), price)
    assert [t.number for t in found] == [3, 1, 0]
    assert np.all(np.diff([t.score.value for t in found if t.score]) > 0)
