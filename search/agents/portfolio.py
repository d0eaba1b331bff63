"""Several agents on one search: every one is told every trial, whoever asked for it, and its answers name who did."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tightrope.search.agent import Agent, Problem, make
from tightrope.search.agents.aim import Aim
from tightrope.search.trial import Trial
from tightrope.spaces.errors import ConfigError
from tightrope.spaces.policy import Policy

_CREDIT = (0.5, 0.15)  # successes that the first member, and any other, counts with beforehand


class Started:
    """An agent behind another one, which asks for the first trials: what `start` makes of any agent.

    Args:
        first: how many trials are the starter's.
    """

    def __init__(self, agent: Agent, starter: Agent, name: str, start: str, first: int) -> None:
        self._agents, self._labels, self._first = (agent, starter), (f"{name}", f"{name}:{start}"), first

    def ask(self, number: int) -> Policy:
        return self._agents[number < self._first].ask(number)

    def part(self, number: int) -> str:
        return self._labels[number < self._first]

    def tell(self, trial: Trial) -> None:
        for agent in self._agents:
            agent.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return self._agents[0].losses()


class Auto:
    """A portfolio: each trial goes to the member whose trials have made the front grow lately.

    The first trials are the first member's. Then a member is drawn in proportion to its rate of success: trials that were the best
    so far, and at a quarter of that weight trials that made the front grow elsewhere, over trials asked, both fading by `keep` with
    every trial that follows; the first member has some credit. A share of the trials, `curious`, is spread evenly.

    Args:
        members: names of agents; the first also begins.
        settings: settings of members, by their names.
        first: share of the planned trials that are the first member's.
    """

    def __init__(
        self, problem: Problem, *, members: Sequence[str] = ("ilp", "nsga2", "tpe"), settings: Mapping[str, Any] | None = None,
        first: float = 0.5, curious: float = 0.1, keep: float = 0.97,
    ) -> None:  # fmt: skip
        if not members or "auto" in members or len(set(members)) < len(members):
            raise ConfigError(f"members of auto must be different agents other than auto itself, got {list(members)}")
        for name in settings or {}:
            if name not in members:
                raise ConfigError(f"auto has settings for {name!r}, which is not among its members {list(members)}")
        self._problem, self._names, self._aim = problem, list(members), Aim(problem)
        self._members = [make(name, problem, (settings or {}).get(name)) for name in members]
        self._first, self._curious, self._keep = round(first * problem.trials), curious, keep
        self._won, self._asked = np.zeros(len(members)), np.zeros(len(members))
        self._credit = np.where(np.arange(len(members)) == 0, *_CREDIT)
        self._open: dict[int, int] = {}
        self._front: list[tuple[float, float]] = []  # traded cost and score of what is not dominated

    def ask(self, number: int) -> Policy:
        chosen = 0
        if number >= self._first:
            rate = (self._won + self._credit) / (self._asked + 2)
            chance = (1 - self._curious) * rate / rate.sum() + self._curious / len(rate)
            chosen = int(self._problem.rng(number, use=3).choice(len(chance), p=chance))
        self._open[number] = chosen
        return self._members[chosen].ask(number)

    def part(self, number: int) -> str:
        """Who found the policy of a trial that is asked and not yet told: `auto:` and the member's name."""
        return f"auto:{self._names[self._open[number]]}"

    def tell(self, trial: Trial) -> None:
        for member in self._members:
            member.tell(trial)
        self._open.pop(trial.number, None)
        grew, before = self._grows(trial), self._aim.best
        self._aim.tell(trial)
        name = trial.agent.partition(":")[2]
        if name in self._names:
            at = self._names.index(name)
            self._won, self._asked = self._keep * self._won, self._keep * self._asked
            self._won[at] += 1.0 if self._aim.best is not before else 0.25 * grew
            self._asked[at] += 1

    def _grows(self, trial: Trial) -> bool:
        """Whether no trial told was as good at no more cost; if so, the front has it from now on."""
        if trial.score is None:
            return False
        cost, value = self._problem.price(trial.cost), trial.score.value
        if any(c <= cost and v >= value for c, v in self._front):
            return False
        self._front = [(c, v) for c, v in self._front if c < cost or v > value] + [(cost, value)]
        return True

    def losses(self) -> Mapping[str, float]:
        return {f"{n}/{k}": v for n, m in zip(self._names, self._members, strict=True) for k, v in m.losses().items()}
