"""Deep deterministic policy gradient (Lillicrap et al. 2016) over the walk of `CompressionEnv`, after AMC and HAQ.

He et al. 2018, "AMC" (section 4, implementation details) and Wang et al. 2019, "HAQ" (section 3.6) give the networks, the
truncated normal noise, the warm-up of random walks, and the reward of the end copied to every step, less a moving average.
Two things differ: what is stored is the action as executed, after the budget's wall and the last repair (their code stores the
one wanted, so that the critic sees many actions with one outcome); and rewards are divided by their moving spread.

The joint agent differs further, to learn from 200 trials: it opens with policies that calibration suggests; no wall holds its walks
back, the finished policy gives in evenly instead, so that late layers do not pay for early ones; rewards are ranked; and the actor
is drawn to the best walk so far, as Fujimoto and Gu 2021, "A minimalist approach to offline reinforcement learning", have it for
actions of a data set. Its walks follow that best one but for a few steps, drawn at random, where in turn the actor decides or noise
does: where the budget is tight, noise at every step spoils any good policy, as a mutation of every gene would.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.opening import Opening
from tightrope.search.env import CompressionEnv, reward
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits
from tightrope.spaces.errors import BudgetError, ConfigError
from tightrope.spaces.policy import Policy

_ROUNDS = 4  # of the programmes that a guess takes
_TRIES = 4  # walks drawn until one ends with a policy that is new


@dataclass(frozen=True, slots=True)
class Settings:
    """How the agent learns.

    Args:
        states, reward, wall: those of `CompressionEnv`.
        warmup: trials before the actor is asked, None for a fifth of those planned.
        guided: whether the warm-up is an `Opening`; else it is of random walks.
        noise: standard deviation of the exploration after the warm-up.
        decay: factor by which it falls each trial.
        elite: walks, the best so far, one of which each walk follows and the actor imitates; with 0 the actor decides every step.
        moved: chance of each step to leave the walk that is followed; one step always does.
        imitation: weight of the imitation against the critic's advice.
        discount: weight of the next step's value. The reward stands at every step, so that with 0 each step learns the
            outcome of its walk and with 1, as AMC has it, the sum over the steps that follow.
        hidden: units of each of two layers; the papers have 300, which cost twice as much time and need smaller steps.
        actor_lr, critic_lr: AMC has 1e-4 and 1e-3 for 800 walks; at some hundred walks both must move faster.
        updates: gradient steps for each step of a walk.
        most: gradient steps a trial at most, None for as many as `updates` says.
        memory: walks kept for replay.
        momentum: of the moving average and spread of the rewards, as the papers have it; None ranks the rewards of all walks kept
            instead, so that a few very bad ones do not drown the rest.
    """

    hidden: int = 128
    actor_lr: float = 3e-3
    critic_lr: float = 3e-3
    tau: float = 0.01
    batch: int = 256
    states: str = "joint"
    reward: str = "score"
    wall: bool = False
    warmup: int | None = None
    guided: bool = True
    noise: float = 0.15
    decay: float = 1.0
    elite: int = 1
    moved: float = 0.05
    imitation: float = 1.0
    discount: float = 0.0
    updates: float = 1.0
    most: int | None = 16
    memory: int = 400
    momentum: float | None = None
    cheaper: float = 0.1
    spread: float = 0.15


class DDPG:
    """One actor for channels, rank and bits of every layer. Settings by keyword, as in `Settings`."""

    def __init__(self, problem: Problem, **settings: Any) -> None:
        self._settings = s = Settings(**settings)
        self._problem, self._env = problem, CompressionEnv(problem, states=s.states, reward=s.reward, wall=s.wall)
        self._aim, self._even = Aim(problem, cheaper=s.cheaper), problem.even
        self._warmup = s.warmup if s.warmup is not None else max(8, problem.trials // 5)
        self._opening = Opening(problem, self._warmup, s.spread, rounds=_ROUNDS)
        states, generator = len(self._env.features), torch.Generator().manual_seed(problem.seed)
        self._actor = _network(states, s.hidden, generator, nn.Sigmoid())
        self._critic = _network(states + 1, s.hidden, generator)
        self._slow_actor, self._slow_critic = copy.deepcopy(self._actor), copy.deepcopy(self._critic)
        self._actor_step = torch.optim.Adam(self._actor.parameters(), s.actor_lr, fused=True)
        self._critic_step = torch.optim.Adam(self._critic.parameters(), s.critic_lr, fused=True)
        self._walks: list[tuple[NDArray[np.float32], NDArray[np.float32], float]] = []  # d x f states, d actions, reward
        self._elite: list[tuple[NDArray[np.float32], NDArray[np.float32], float]] = []  # the best of them
        self._told: set[Policy] = set()
        self._mean, self._square = 0.0, 0.0
        self._losses: dict[str, float] = {}

    def ask(self, number: int) -> Policy:
        rng, s = self._problem.rng(number), self._settings
        limits = self._aim.limits(rng)
        d, sigma = self._problem.space.dimension, self._sigma(number)
        if number < self._warmup:
            return self._opening.ask(number, rng, limits) if s.guided else self._walk(limits, rng.random(d), np.zeros(d), rng)
        if not self._elite:
            return self._walk(limits, np.full(d, np.nan), np.full(d, sigma), rng)
        for attempt in range(_TRIES):
            followed = self._elite[rng.integers(len(self._elite))][1]
            moved = rng.random(d) < s.moved * 2**attempt
            moved[rng.integers(d)] = True
            guide = np.where(moved & (number % 2 == 0), np.nan, followed)
            policy = self._walk(limits, guide, np.where(moved, sigma, 0.0), rng)
            if policy not in self._told:
                break
        return policy

    def _walk(self, limits: Limits, guide: NDArray[Any], sigma: NDArray[Any], rng: np.random.Generator) -> Policy:
        """The policy that a walk ends with.

        Args:
            guide: `d`-dim, the action of each step; NaN where the actor decides.
            sigma: `d`-dim, noise of each step.
        """
        state, _ = self._env.reset(options={"limits": limits})
        for given, noise in zip(guide, sigma, strict=True):
            mean = self._act(state) if np.isnan(given) else float(given)
            state, _, done, _, info = self._env.step([_noisy(mean, noise, rng) if noise else mean])
        assert done
        policy: Policy = info["policy"]
        return policy

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        self._opening.tell(trial)
        if trial.score is None:
            return
        worth, keep = reward(self._problem, trial.score, trial.cost, self._settings.reward), self._settings.momentum
        point = self._problem.space.encode(trial.policy)
        self._told.add(trial.policy)
        self._walks = [*self._walks, (self._env.observe_walk(point), point.astype(np.float32), worth)][-self._settings.memory :]
        self._elite = sorted([*self._elite, self._walks[-1]], key=lambda walk: -walk[2])[: self._settings.elite]
        if keep is not None:
            self._mean = worth if len(self._walks) == 1 else keep * self._mean + (1 - keep) * worth
            self._square = (1 - keep) * (worth - self._mean) ** 2 + keep * self._square
        self._losses = {"reward": worth, "baseline": self._mean, "noise": self._sigma(trial.number)}
        if len(self._walks) * len(point) >= self._settings.batch:
            with _one_thread():
                updates, most = int(self._settings.updates * len(point)), self._settings.most
                self._learn(self._problem.rng(trial.number, use=1), updates if most is None else min(updates, most))

    def losses(self) -> Mapping[str, float]:
        return self._losses

    def _sigma(self, number: int) -> float:
        """The noise of a trial."""
        return float(self._settings.noise * self._settings.decay ** max(0, number - self._warmup))

    def _act(self, state: NDArray[np.float32]) -> float:
        """The actor's action."""
        with torch.no_grad(), _one_thread():
            return float(self._actor(torch.tensor(state)[None]))  # a copy: sums depend on how memory is aligned

    def _learn(self, rng: np.random.Generator, updates: int) -> None:
        s = self._settings
        states = torch.from_numpy(np.stack([w[0] for w in self._walks]))  # walks x d x f
        actions = torch.from_numpy(np.stack([w[1] for w in self._walks]))
        worths, steps = np.array([w[2] for w in self._walks]), actions.shape[1]
        if s.momentum is None:
            scaled = (2 * rankdata(worths) - 1) / len(worths) - 1
        else:
            scaled = ((worths - self._mean) / max(self._square**0.5, 1e-6)).clip(-3, 3)
        rewards = torch.from_numpy(scaled.astype(np.float32))
        best = [torch.from_numpy(np.concatenate([w[i] for w in self._elite])) for i in (0, 1)] if self._elite else None
        for _ in range(updates):
            walk, step = (torch.from_numpy(rng.integers(n, size=s.batch)) for n in (len(self._walks), steps))
            state, action, target = states[walk, step], actions[walk, step, None], rewards[walk, None]
            if s.discount:
                with torch.no_grad():
                    following = states[walk, (step + 1).clamp(max=steps - 1)]
                    value = self._slow_critic(torch.cat([following, self._slow_actor(following)], 1))
                    target = target + s.discount * (step < steps - 1)[:, None] * value
            critic_loss = nn.functional.mse_loss(self._critic(torch.cat([state, action], 1)), target)
            self._critic_step.zero_grad(set_to_none=True)
            critic_loss.backward()  # type: ignore[no-untyped-call]
            self._critic_step.step()
            self._critic.requires_grad_(False)  # it only advises
            advice = self._critic(torch.cat([state, self._actor(state)], 1))
            actor_loss = -advice.mean()
            if best is not None:  # Fujimoto and Gu 2021, equation 5
                chosen = torch.from_numpy(rng.integers(len(self._elite), size=s.batch))
                often = torch.bincount(chosen * steps + step, minlength=len(best[0])) / s.batch  # each step is looked at once
                away = self._actor(best[0])[:, 0] - best[1]
                actor_loss = actor_loss / advice.detach().abs().mean() + s.imitation * (often * away.square()).sum()
            self._actor_step.zero_grad(set_to_none=True)
            actor_loss.backward()
            self._actor_step.step()
            self._critic.requires_grad_(True)
            if s.discount:
                _follow(self._slow_actor, self._actor, s.tau)
                _follow(self._slow_critic, self._critic, s.tau)
        if updates:
            self._losses |= {"critic": float(critic_loss.detach()), "actor": float(actor_loss.detach())}


_PAPERS: dict[str, Any] = {
    "discount": 1.0, "hidden": 300, "batch": 64, "actor_lr": 1e-4, "critic_lr": 1e-3, "momentum": 0.95, "noise": 0.5,
    "cheaper": 0.0, "wall": True, "elite": 0, "most": None,
}  # fmt: skip


def amc(problem: Problem, **settings: Any) -> DDPG:
    """AMC: channels only, its states, its warm-up of random walks, its noise and rates; `reward` may be err, flops or param."""
    published = {
        "states": "amc", "reward": "err", "guided": False, "warmup": min(100, problem.trials // 4), "decay": 0.95,
        **_PAPERS,
    }  # fmt: skip
    return DDPG(_only(problem, "amc", "channels"), **{**published, **settings})


def haq(problem: Problem, **settings: Any) -> DDPG:
    """HAQ: weight bits, then activation bits of each layer, its states, reward, warm-up and noise."""
    published = {
        "states": "haq", "reward": "haq", "guided": False, "warmup": min(20, problem.trials // 4), "decay": 0.99,
        **_PAPERS,
    }  # fmt: skip
    return DDPG(_only(problem, "haq", "weight_bits", "act_bits"), **{**published, **settings})


def _only(problem: Problem, name: str, *kinds: str) -> Problem:
    """The problem with only these decisions, everything else as in the dense policy.

    Raises:
        BudgetError: they alone cannot meet the budget.
        ConfigError: the space has none of them.
    """
    space = problem.space
    widths = space.widths if "channels" in kinds else {g: options[-1:] for g, options in space.widths.items()}
    pairs = space.pairs if "act_bits" in kinds else {x: found[-1:] for x, found in space.pairs.items()}
    part = replace(problem, space=replace(space, widths=widths, pairs=pairs, ranks=dict.fromkeys(space.ranks, (1.0,))))
    if not part.space.variables:
        raise ConfigError(f"agent {name} decides about {' and '.join(kinds)}, and the space offers no choice of them")
    try:
        part.check()
    except BudgetError as error:
        raise BudgetError(f"agent {name} decides about {' and '.join(kinds)} only: {error}") from None
    return part


def _noisy(mean: float, sigma: float, rng: np.random.Generator) -> float:
    """An action with normal noise, drawn again while it falls outside of [0, 1]."""
    draws = rng.normal(mean, sigma, 64)
    inside = draws[(draws >= 0) & (draws <= 1)]
    return float(inside[0]) if len(inside) else mean


def _network(inputs: int, hidden: int, generator: torch.Generator, end: nn.Module | None = None) -> nn.Module:
    """Two hidden layers; the last one begins near 0, so that the first actions are near the middle (Lillicrap et al., 7)."""
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
    for layer in layers:
        bound = 3e-3 if layer is layers[-1] else layer.in_features**-0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], end or nn.Identity())


def _follow(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    with torch.no_grad():
        pairs: list[tuple[Tensor, Tensor]] = list(zip(slow.parameters(), fast.parameters(), strict=True))
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], tau)


@contextmanager
def _one_thread() -> Iterator[None]:
    """These networks are too small to share out, and sums in one order make the same trials everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
