"""What agents that learn begin with, so that their first trials tell good policies apart and not only bad ones."""

import numpy as np

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.ilp import ILP
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits
from tightrope.spaces.policy import Policy


class Opening:
    """The even policies; guesses by what calibration says of losses (`ilp`'s first programmes); then points near the best.

    Where the space knows no losses, there are no guesses, and points near the even policies, which take turns.

    Args:
        trials: how many the opening has; half of those behind the even policies are guesses.
        spread: standard deviation of points, in [0,1]^d.
        rounds: of `ILP`, for its guesses.
    """

    def __init__(self, problem: Problem, trials: int, spread: float, rounds: int = 1) -> None:
        self._problem, self._even, self._trials, self._spread = problem, problem.even, trials, spread
        self._guesses = ILP(problem, guesses=trials, rounds=rounds) if problem.space.losses else None
        self._aim = Aim(problem)

    def ask(self, number: int, rng: np.random.Generator, limits: Limits) -> Policy:
        """The policy of one of the first trials."""
        even = self._even.policies
        if number < len(even):
            return even[number]
        if self._guesses is None or self._aim.best is None:
            return fit(self._problem, self._even.near(number, rng, self._spread), limits)
        if number < (len(even) + self._trials) // 2:
            return self._guesses.ask(number)
        centre = self._problem.space.encode(self._aim.best.policy)
        return fit(self._problem, np.clip(centre + rng.normal(0, self._spread, centre.shape), 0, 1), limits)

    def tell(self, trial: Trial) -> None:
        """Remember the best trial."""
        self._aim.tell(trial)
        if self._guesses is not None and trial.number < self._trials:
            self._guesses.tell(trial)
