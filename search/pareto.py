"""Fronts, their hypervolume, and the one policy to take from them."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tightrope.search.trial import Trial


def non_dominated(costs: ArrayLike, scores: ArrayLike) -> NDArray[np.bool_]:
    """Which of `n` points no other point beats, in a cost to minimise and a score to maximise.

    Args:
        costs, scores: `n`-dim arrays.
    Returns:
        `n`-dim mask. Of equal points the first is kept, so the kept points have different costs and different scores.
    """
    c, s = np.asarray(costs, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    order = np.lexsort((np.arange(len(c)), -s, c))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(s[order])[:-1]])[: len(c)]
    mask = np.zeros(len(c), dtype=bool)
    mask[order] = s[order] > best_before
    return mask


def hypervolume(costs: ArrayLike, scores: ArrayLike, reference: tuple[float, float]) -> float:
    """The area that `n` points dominate, up to a reference point; exact, in units of cost times score.

    Args:
        costs, scores: `n`-dim arrays; costs are minimised, scores maximised.
        reference: the highest cost and the lowest score that count. Points beyond either add nothing.
    """
    c, s = np.asarray(costs, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    inside = (c < reference[0]) & (s > reference[1])
    c, s = c[inside], s[inside]
    kept = non_dominated(c, s)
    order = np.argsort(c[kept])
    c, s = c[kept][order], s[kept][order]
    return float(np.sum((reference[0] - c) * np.diff(s, prepend=reference[1])))


def front(trials: Iterable[Trial], cost: Callable[[Trial], float]) -> list[Trial]:
    """The non-dominated trials among those that did not fail, from cheapest to dearest."""
    scored = [t for t in trials if t.score is not None]
    mask = non_dominated([cost(t) for t in scored], [t.score.value for t in scored if t.score is not None])
    return sorted((t for t, kept in zip(scored, mask, strict=True) if kept), key=cost)


def best(trials: Sequence[Trial], cost: Callable[[Trial], float], *, least_cost: bool = False) -> Trial | None:
    """The feasible trial to take; None where there is none.

    The highest score within the budget is taken: what is saved below it is worth nothing there, while the cheapest of all
    scores within a standard error would give that error away. With `least_cost`, the aim under an accuracy to be kept, the
    cheapest feasible policy is taken whatever its score. Equal trials go by cost, by score, then by number; `ties` names those
    that the spread does not tell from the one taken.
    """
    able = [(t, t.score) for t in trials if t.feasible and t.score is not None]
    if not able:
        return None
    if least_cost:
        return min(able, key=lambda pair: (cost(pair[0]), -pair[1].value, pair[0].number))[0]
    return min(able, key=lambda pair: (-pair[1].value, cost(pair[0]), pair[0].number))[0]


def ties(trials: Sequence[Trial], taken: Trial, cost: Callable[[Trial], float]) -> list[Trial]:
    """Feasible trials that cost less than the one taken and score within its standard error of it, the cheapest first."""
    if taken.score is None:
        return []
    least = taken.score.value - taken.score.stderr
    near = [t for t in trials if t.feasible and t.score is not None and t.score.value >= least and cost(t) < cost(taken)]
    return sorted(near, key=lambda t: (cost(t), t.number))
