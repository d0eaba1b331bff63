"""TD3 and SAC of stable-baselines3 as agents: how any learner that wants to drive the environment itself becomes a plug-in.

    pip install stable-baselines3

In the package that holds this file:

    [project.entry-points."tightrope.agents"]
    td3 = "examples.sb3_agent:td3"
    sac = "examples.sb3_agent:sac"

and then `agent: td3` in the YAML. A study asks and tells; stable-baselines3 calls `env.step`. So the learner is fed by hand: an ask
is a walk by its actor and noise, a tell puts the walk as executed into its replay buffer, the outcome at every step, and trains.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from tightrope.search.agent import Problem
from tightrope.search.env import CompressionEnv, reward
from tightrope.search.trial import Trial
from tightrope.spaces.policy import Policy


class SB3:
    """An off-policy algorithm of stable-baselines3; further settings go to its constructor."""

    def __init__(
        self, algorithm: type[OffPolicyAlgorithm], problem: Problem, *, warmup: int | None = None, noise: float = 0.3,
        **settings: Any,
    ) -> None:  # fmt: skip
        self._problem, self._env, self._noise = problem, CompressionEnv(problem), noise
        self._warmup = max(4, problem.trials // 5) if warmup is None else warmup
        self._learner = algorithm("MlpPolicy", self._env, seed=problem.seed, gamma=0.0, device="cpu", **settings)
        self._learner.set_logger(configure(None, []))

    def ask(self, number: int) -> Policy:
        rng, (state, _), done, info = self._problem.rng(number), self._env.reset(), False, dict[str, Any]()
        noise = self._noise * max(0.05, 1 - number / self._problem.trials)
        while not done:
            action = rng.random(1) if number < self._warmup else self._learner.predict(state, deterministic=True)[0]
            state, _, done, _, info = self._env.step(action + (number >= self._warmup) * rng.normal(0, noise, 1))
        policy: Policy = info["policy"]
        return policy

    def tell(self, trial: Trial) -> None:
        if trial.score is None:
            return
        point = self._problem.space.encode(trial.policy)
        states, worth = self._env.observe_walk(point), reward(self._problem, trial.score, trial.cost)
        for i, action in enumerate(point):
            following = states[min(i + 1, len(point) - 1)]
            buffer: Any = self._learner.replay_buffer
            scaled = self._learner.policy.scale_action(np.array([[action]], np.float32))
            buffer.add(states[i], following, scaled, np.array([worth]), np.array([i + 1 == len(point)]), [{}])
        if trial.number >= self._warmup // 2:
            self._learner.train(gradient_steps=len(point), batch_size=64)

    def losses(self) -> Mapping[str, float]:
        return {}


def td3(problem: Problem, **settings: Any) -> SB3:
    return SB3(TD3, problem, **settings)


def sac(problem: Problem, **settings: Any) -> SB3:
    return SB3(SAC, problem, **settings)
