"""The walk as gymnasium sees it."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from problems import Additive, ClosedForm, Jagged, make_problem, play

from tightrope.search.env import STATES, CompressionEnv, reward
from tightrope.spaces import Cost, Score
from tightrope.spaces.errors import ConfigError


@pytest.mark.parametrize("device", [Additive(), Jagged()], ids=lambda d: d.name)
class TestWalk:
    def test_gymnasium_is_content(self, device: Additive) -> None:
        problem = make_problem(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for states in STATES:
                check_env(CompressionEnv(problem, ClosedForm(problem.network).evaluate, states=states), skip_render_check=True)

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
        for states in STATES:
            env = CompressionEnv(problem, fill=False, states=states)
            state, _ = env.reset()
            rng, seen = np.random.default_rng(2), []
            for _ in range(problem.space.dimension):
                seen.append(state)
                state, *_, info = env.step(rng.random(1))
            np.testing.assert_array_equal(env.observe_walk(info["point"]), np.stack(seen))
            assert len(env.features) == env.observation_space.shape[0] == len(state)

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


class TestPublished:
    """AMC's and HAQ's states and rewards, against their papers' formulas by hand."""

    def test_amc_sees_what_is_reduced_and_what_is_left(self) -> None:
        problem = make_problem(budget="macs<=2x")
        env = CompressionEnv(problem, fill=False, states="amc")
        state, _ = env.reset()
        assert len(env.features) == 11
        column = {name: i for i, name in enumerate(env.features)}
        assert state[column["reduced"]] == state[column["last"]] == 0 and state[column["rest"]] == 1
        state, *_ = env.step([0.0])  # the stem keeps 8 of 32 channels, which a1 reads and a2 writes: (8 - 32) of each one's MACs
        stem, a1, a2, c1 = (16 * 16 * 9 * n for n in (3 * 32, 32 * 48, 48 * 32, 32 * 64 / 4))
        total = problem.dense_cost.macs
        assert state[column["reduced"]] == pytest.approx(0.75 * (stem + a1 + a2 + c1) / total, rel=1e-3)
        assert state[column["last"]] == pytest.approx(0.5 / len(problem.space.widths["a"]))

    def test_rewards(self) -> None:
        problem = make_problem()
        score, cost = Score(0.8 * problem.dense.value, 1.0, 1000), Cost(1.0, 4000, 10_000)
        assert reward(problem, score, cost) == reward(problem, score, cost, "err") == pytest.approx(-0.2)
        assert reward(problem, score, cost, "flops") == pytest.approx(-0.2 * np.log(10_000))
        assert reward(problem, score, cost, "param") == pytest.approx(-0.2 * np.log(1000))
        assert reward(problem, score, cost, "haq") == pytest.approx(-0.02 * problem.dense.value)

    def test_unknown_ones_are_answered_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'flops'"):
            CompressionEnv(make_problem(), reward="flop")


class TestStableBaselines:
    """TD3 of stable-baselines3 on the environment, and as the plug-in of the examples."""

    def test_td3_trains_on_the_environment(self) -> None:
        sb3 = pytest.importorskip("stable_baselines3")
        problem = make_problem(trials=10)
        env = CompressionEnv(problem, ClosedForm(problem.network).evaluate)
        learner = sb3.TD3("MlpPolicy", env, learning_starts=problem.space.dimension, batch_size=8, seed=0, device="cpu")
        before = [p.clone() for p in learner.actor.parameters()]
        learner.learn(2 * problem.space.dimension)
        assert any((a != b).any() for a, b in zip(before, learner.actor.parameters(), strict=True))

    @pytest.mark.parametrize("algorithm", ["td3", "sac"])
    def test_the_plug_in_asks_and_learns_within_the_budget(self, algorithm: str) -> None:
        pytest.importorskip("stable_baselines3")
        from examples import sb3_agent

        problem = make_problem(Jagged(), trials=12)
        agent = getattr(sb3_agent, algorithm)(problem, policy_kwargs={"net_arch": [16]})
        for trial in play(problem, agent, 10):
            assert problem.limits.met(trial.cost) and problem.space.contains(trial.policy)
