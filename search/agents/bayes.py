"""Bayesian agents by Optuna, in memory, over the option numbers of all decisions.

Both begin with an `Opening`, and are told the policies that were executed. Each ask has a sampler
with a seed of its own, so that what it proposes depends on the trials told and not on the asks before.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.opening import Opening
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.errors import ConfigError
from tightrope.spaces.policy import Policy

if TYPE_CHECKING:
    import optuna


class _Sampled(ABC):
    """An agent whose points an Optuna sampler draws.

    Args:
        startup: trials before the model is used.
        spread: standard deviation of the opening's points, in [0,1]^d.
        cheaper: share of the trials that aim below the budget.
    """

    def __init__(self, problem: Problem, startup: int, spread: float, cheaper: float) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._problem, self._aim = optuna, problem, Aim(problem, cheaper=cheaper)
        self._even, self._startup, self._opening = problem.even, startup, Opening(problem, startup, spread)
        self._study = optuna.create_study(direction="maximize")
        self._options: dict[str, optuna.distributions.BaseDistribution] = {
            v.name: optuna.distributions.IntDistribution(0, len(v.options) - 1) for v in problem.space.variables
        }

    @abstractmethod
    def _sampler(self, seed: int) -> "optuna.samplers.BaseSampler":
        """The sampler of one ask."""

    def ask(self, number: int) -> Policy:
        problem, rng = self._problem, self._problem.rng(number)
        limits = self._aim.limits(rng)
        if number < max(self._startup, len(self._even.policies)) or not self._options:
            return self._opening.ask(number, rng, limits)
        self._study.sampler = self._sampler(int(rng.integers(2**31)))
        trial = self._study.ask(self._options)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # what counts is told as executed, in `tell`
        point = [(trial.params[v.name] + 0.5) / len(v.options) for v in problem.space.variables]
        return fit(problem, point, limits)

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        self._opening.tell(trial)
        if trial.score is None:
            return
        variables, point = self._problem.space.variables, self._problem.space.encode(trial.policy)
        params = {v.name: int(x * len(v.options)) for v, x in zip(variables, point, strict=True)}
        value = self._problem.value(trial.score, trial.cost)
        self._study.add_trial(self._optuna.create_trial(params=params, distributions=self._options, value=value))

    def losses(self) -> Mapping[str, float]:
        return {}


class TPE(_Sampled):
    """Tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization").

    Decisions are modelled together (`multivariate`, Optuna's default for one objective): with budget-filling policies that
    found better ones than decision by decision, in half the time.

    Args:
        candidates: points drawn from the model of good trials, of which the most promising is asked.
    """

    def __init__(
        self, problem: Problem, *, startup: int = 30, candidates: int = 24, spread: float = 0.15, cheaper: float = 0.1
    ) -> None:
        super().__init__(problem, startup, spread, cheaper)
        self._candidates = candidates

    def _sampler(self, seed: int) -> "optuna.samplers.BaseSampler":
        samplers: Any = self._optuna.samplers
        sampler: optuna.samplers.BaseSampler = samplers.TPESampler(
            n_startup_trials=0, n_ei_candidates=self._candidates, multivariate=True, seed=seed
        )
        return sampler


class GP(_Sampled):
    """A Gaussian process and its expected improvement (Jones et al. 1998), for small spaces: an ask takes seconds.

    Args:
        most: decisions that a space may have.
    """

    def __init__(self, problem: Problem, *, startup: int = 12, spread: float = 0.15, cheaper: float = 0.1, most: int = 16) -> None:
        if problem.space.dimension > most:
            raise ConfigError(
                f"agent gp is for spaces of at most {most} decisions and this one has {problem.space.dimension}; take auto, ilp or "
                "tpe, or fewer decisions (space.ranks, space.channels, space.bits)"
            )
        super().__init__(problem, startup, spread, cheaper)

    def _sampler(self, seed: int) -> "optuna.samplers.BaseSampler":
        samplers: Any = self._optuna.samplers
        sampler: optuna.samplers.BaseSampler = samplers.GPSampler(n_startup_trials=0, deterministic_objective=False, seed=seed)
        return sampler
