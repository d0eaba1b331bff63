"""What an agent is given, what it must do, and where it is found by name."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tightrope.estimators.device import Device
from tightrope.search.agents.repair import cheapest
from tightrope.search.trial import Trial
from tightrope.spaces.batch import Batch
from tightrope.spaces.budget import Limits
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.errors import BudgetError, ConfigError
from tightrope.spaces.fields import nearest
from tightrope.spaces.network import Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space

if TYPE_CHECKING:
    from tightrope.search.agents.uniform import Even

_REMEMBERED = 8192  # costs kept, about 4 KB each


class Agent(Protocol):
    """Proposes policies.

    `ask(k)` is called for k = 0, 1, ... in order, and what it returns depends only on the problem (its seed among it), on
    `k`, on the trials told so far and, with several workers, on the asks not yet told. So an agent is resumed by telling it
    what the journal holds. Every policy asked is a point of the space within the limits.

    An agent of several parts may have a method `part(number)` too, asked right behind `ask`: the name that the trial bears
    in the journal.
    """

    def ask(self, number: int) -> Policy:
        """The policy of this trial."""
        ...

    def tell(self, trial: Trial) -> None:
        """What came of a trial; called once for each, in the order of their numbers. `trial.score` is None if it failed."""
        ...

    def losses(self) -> Mapping[str, float]:
        """What the agent's own learning says of itself, for plots; empty where it does not learn."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """What an agent is given: a space, what its points cost on a device, and what is wanted of them.

    Args:
        dense: score of the model before compression.
        floor: points below dense that a score must not fall under (negative or 0); None maximises the score within `limits`,
            otherwise the aim is the least latency among the policies that keep the floor.
        trials: how many are planned.
    """

    space: Space
    device: Device
    limits: Limits
    dense: Score
    floor: float | None = None
    seed: int = 0
    trials: int = 100
    _known: dict[bytes, Cost] = field(default_factory=dict, repr=False)

    @property
    def network(self) -> Network:
        return self.space.network

    @property
    def metric(self) -> str:
        """The cost that is traded against the score: the first that is limited, or the latency."""
        return self.limits.top[0][0] if self.limits.top and self.floor is None else "latency_ms"

    def costs(self, policies: Sequence[Policy]) -> list[Cost]:
        """What the policies cost; each is estimated once and remembered for a while."""
        batch = Batch.of(self.network, policies)
        keys, new = batch.keys(), dict[bytes, int]()
        for i, key in enumerate(keys):
            if key not in self._known:
                new.setdefault(key, i)
        fresh = self.device.estimate_many(self.network, batch.take([*new.values()])) if new else []
        found = dict(zip(new, fresh, strict=True))
        costs = [found[key] if key in found else self._known[key] for key in keys]
        self._known.update(found)
        if len(self._known) > _REMEMBERED:
            for key in list(self._known)[: len(self._known) - _REMEMBERED // 2]:
                del self._known[key]
        return costs

    def cost(self, policy: Policy) -> Cost:
        return self.costs([policy])[0]

    @cached_property
    def dense_cost(self) -> Cost:
        return self.cost(self.space.dense)

    def price(self, cost: Cost) -> float:
        """The traded cost as a share of the dense model's."""
        value, whole = cost.metric(self.metric), self.dense_cost.metric(self.metric)
        if value is None or not whole:
            raise BudgetError(f"device {self.device.name!r} cannot tell {self.metric}, which the search needs")
        return value / whole

    def limited(self, share: float) -> Limits:
        """The limits, and besides the traded cost to be at most this share of the dense model's."""
        whole = self.dense_cost.metric(self.metric)
        return Limits((*self.limits.top, (self.metric, share * (whole or 0.0))))

    @cached_property
    def cheapest(self) -> Policy:
        """The policy that uses the least of the budget, or costs least where nothing is limited."""
        return cheapest(self.space, self.costs, self.limits.use if self.limits.top else self.price)

    @cached_property
    def even(self) -> "Even":
        """The even policies, worked out once for all agents."""
        from tightrope.search.agents.uniform import Even

        return Even(self)

    def check(self) -> None:
        """Raise `BudgetError` if no policy that can be found meets the limits."""
        policy = self.cheapest
        cost = self.cost(policy)
        if not self.limits.met(cost):
            wanted = ", ".join(f"{metric}<={most:.6g}" for metric, most in self.limits.top)
            got = ", ".join(f"{metric}={cost.metric(metric):.6g} ({self._share(cost, metric)})" for metric, _ in self.limits.top)
            raise BudgetError(
                f"nothing in the space meets the budget {wanted} on {self.device.name!r}: the cheapest policy found costs {got}; "
                f"it is {policy.to_json()}"
            )

    def _share(self, cost: Cost, metric: str) -> str:
        return f"{(cost.metric(metric) or 0.0) / (self.dense_cost.metric(metric) or 1.0):.3g}x of dense"

    def meets(self, score: Score | None, cost: Cost) -> bool:
        """Whether a trial meets the budget: every limit and, where one is set, the floor."""
        kept = self.floor is None or (score is not None and score.value >= self.dense.value + self.floor)
        return kept and self.limits.met(cost)

    def value(self, score: Score, cost: Cost) -> float:
        """One number to maximise.

        Without a floor it is the score. With one it is the points that the score falls short of the floor, negative; or, where
        the floor is kept, the share of the dense cost that is saved, in percent.
        """
        if self.floor is None:
            return score.value
        short = score.value - (self.dense.value + self.floor)
        return short if short < 0 else 100 * max(0.0, 1 - self.price(cost))

    def rng(self, number: int, use: int = 0) -> np.random.Generator:
        """The generator of one trial; `use` tells apart what it is drawn for."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, number, use]))


_AGENTS = {
    "amc": "tightrope.search.agents.ddpg:amc",
    "auto": "tightrope.search.agents.portfolio:Auto",
    "cmaes": "tightrope.search.agents.cmaes:CMAES",
    "ddpg": "tightrope.search.agents.ddpg:DDPG",
    "gp": "tightrope.search.agents.bayes:GP",
    "haq": "tightrope.search.agents.ddpg:haq",
    "ilp": "tightrope.search.agents.ilp:ILP",
    "netadapt": "tightrope.search.agents.netadapt:NetAdapt",
    "nsga2": "tightrope.search.agents.nsga2:NSGA2",
    "random": "tightrope.search.agents.random:Random",
    "tpe": "tightrope.search.agents.bayes:TPE",
    "uniform": "tightrope.search.agents.uniform:Uniform",
}


def names() -> list[str]:
    """All agents that can be made, those of plug-ins (entry points of group `tightrope.agents`) included."""
    return sorted({*_AGENTS, *(entry.name for entry in entry_points(group="tightrope.agents"))})


def make(name: str, problem: Problem, settings: Mapping[str, Any] | None = None) -> Agent:
    """The agent of this name; `settings` go to its constructor by keyword.

    Two settings are every agent's: `start`, another agent that asks for the first trials, and `start_trials`, how many of them
    (a quarter of those planned).
    """
    settings = dict(settings or {}) if problem.space.variables else {}
    start, first = settings.pop("start", None), settings.pop("start_trials", problem.trials // 4)
    if start is not None:
        from tightrope.search.agents.portfolio import Started

        if start == name or not isinstance(first, int) or first < 0:
            raise ConfigError(f"start must be another agent and start_trials a number, got start={start!r}, start_trials={first!r}")
        return Started(make(name, problem, settings), make(start, problem), name, start, first)
    plugged = {entry.name: entry.value for entry in entry_points(group="tightrope.agents")}
    where = _AGENTS.get(name) or plugged.get(name)
    if where is None:
        raise ConfigError(f"there is no agent {name!r}{nearest(name, names())}; there are {', '.join(names())}")
    if not problem.space.variables:
        where = _AGENTS["uniform"]  # there is one policy, and nothing to learn
    module, _, attribute = where.partition(":")
    maker = getattr(importlib.import_module(module), attribute)
    try:
        agent: Agent = maker(problem, **settings)
    except TypeError as error:
        if settings:
            raise ConfigError(f"agent {name!r} does not take these settings {settings}: {error}") from None
        raise
    return agent
