"""Ending a trial before all examples are scored: a paired sequential test against the best trial so far.

A policy is hopeless when, on the whole split, it would have fewer examples right than its rival, by more than a margin. Let
`d = 1, 0, -1` for an example that the policy alone, both or neither, or the rival alone has right, and let the `n` examples
come in random order. If the policy were not hopeless, the `d` would sum to at least `need = -margin * n`; so after `t` of them
with sum `S`, the next has a mean of at least `m = (need - S) / (n - t)`, and the capital of a gambler who bets on less,
`K <- K * (1 - stake * (d - m))`, is expected never to grow. By Ville's inequality it exceeds `1 / error` at any time with
a probability of at most `error`, whatever the outcomes are: so often is a policy given up that is not hopeless (Waudby-Smith
and Ramdas 2020, Confidence sequences for sampling without replacement, section 3.1). Several stakes are played side by side and
their capitals averaged, which is again such a game.

Besides, a policy is given up when it cannot come level even if it had right all that its rival has wrong.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.cost import Score

_STAKES = np.array([0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
Scored = tuple[Score, bytes | None]
"""A score and, where every example was scored under `top1`, which ones were right: one bit each, in the evaluator's order."""


@dataclass(frozen=True, slots=True)
class Rival:
    """What a policy is held against.

    Args:
        right: which examples the rival has right, packed as in `Scored`.
        margin: points that the policy may fall behind without being hopeless.
        error: probability of giving up a policy that is not hopeless.
    """

    right: bytes
    margin: float
    error: float


class Pairing:
    """The test of one policy, example by example."""

    def __init__(self, rival: Rival, count: int) -> None:
        bits = np.unpackbits(np.frombuffer(rival.right, np.uint8), count=count).astype(bool)
        self._rival, self._limit = bits, -np.log(rival.error)
        self._need = -rival.margin / 100 * count
        self._chances = np.append(np.cumsum(~bits[::-1])[::-1], 0)  # examples from each on that the rival has wrong
        self._capital = np.zeros(len(_STAKES))  # logarithms
        self._right = np.zeros(0, bool)
        self._sum = 0

    def hopeless(self, right: NDArray[np.bool_]) -> bool:
        """Take the next examples' outcomes; whether the policy is to be given up."""
        start, total = len(self._right), len(self._rival)
        self._right = np.concatenate([self._right, right])
        seen = len(self._right)
        d = right.astype(np.int64) - self._rival[start:seen]
        before = self._sum + np.cumsum(d) - d
        self._sum += int(d.sum())
        least = (self._need - before) / (total - np.arange(start, seen))
        stakes = _STAKES[:, None] / np.maximum(1.0, 1.0 - least)
        capital = self._capital[:, None] + np.cumsum(np.log1p(-stakes * (d - least)), axis=1)
        self._capital = capital[:, -1]
        top = capital.max(axis=0)
        mean = top + np.log(np.exp(capital - top).mean(axis=0))
        return bool(mean.max() >= self._limit or self._sum + self._chances[seen] < self._need)

    def score(self) -> Score:
        """The score from what was seen: the rival's on all examples and the mean difference on those, so that it stays below.

        The standard error is that of a plain sample of as many examples. As with every test that ends when it is sure, the
        difference leans to the side on which it ended.
        """
        seen = len(self._right)
        value = 100 * (self._rival.mean() + self._sum / seen)
        return Score(float(max(0.0, value)), float(100 * self._right.std() / np.sqrt(seen)), seen)
