"""The walk as gymnasium sees it."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from problems import Additive, ClosedForm, Jagged, make_problem

from tightrope.search.env import CompressionEnv


@pytest.mark.parametrize("device", [Additive(), Jagged()], ids=lambda d: d.name)
class TestWalk:
    def test_gymnasium_is_content(self, device: Additive) -> None:
        problem = make_problem(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(CompressionEnv(problem, ClosedForm(problem.network).evaluate), skip_render_check=True)

    def test_the_wall_holds_after_every_step(self, device: Additive) -> None:
        problem = make_problem(device, "latency<=0.15x")
        env, rng = CompressionEnv(problem, fill=False), np.random.default_rng(0)
        for _ in range(5):
            env.reset()
            executed, done = [], False
            while not done:
                _, _, done, _, info = env.step(rng.random(1) ** 0.3)
                executed.append(info["executed"])
                point = problem.space.encode(problem.cheapest)
                point[: len(executed)] = executed
                assert problem.limits.met(problem.cost(problem.space.decode(point)))
            assert info["policy"] == problem.space.decode(executed)

    def test_actions_within_the_budget_are_taken_as_they_are(self, device: Additive) -> None:
        problem = make_problem(device, "latency<=2x")
        env = CompressionEnv(problem, fill=False)
        env.reset()
        wanted = np.random.default_rng(1).random(problem.space.dimension)
        for action in wanted:
            *_, info = env.step([action])
        assert info["policy"] == problem.space.decode(wanted)

    def test_a_walk_seen_afterwards_looks_as_it_did(self, device: Additive) -> None:
        problem = make_problem(device)
        env = CompressionEnv(problem, fill=False)
        state, _ = env.reset()
        rng, seen = np.random.default_rng(2), []
        for _ in range(problem.space.dimension):
            seen.append(state)
            state, *_, info = env.step(rng.random(1))
        np.testing.assert_array_equal(env.observe_walk(info["point"]), np.stack(seen))

    def test_the_reward_comes_at_the_end_and_is_the_loss_of_score(self, device: Additive) -> None:
        problem = make_problem(device)
        evaluate = ClosedForm(problem.network).evaluate
        env = CompressionEnv(problem, evaluate)
        env.reset()
        rewards = [env.step([0.5])[1] for _ in range(problem.space.dimension - 1)]
        _, last, terminated, _, info = env.step([0.5])
        assert terminated and not any(rewards)
        assert last == pytest.approx(evaluate(info["policy"]).value / problem.dense.value - 1)
        assert problem.limits.use(info["cost"]) > 0.9
