"""What holds for every agent, and what each learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import AGENTS, FAST, Additive, ClosedForm, Jagged, make_problem, play

from tightrope.search.agent import make, names
from tightrope.search.agents.repair import fit
from tightrope.search.agents.uniform import Even, even_shares
from tightrope.search.trial import Trial
from tightrope.spaces import Choice, Policy
from tightrope.spaces.errors import BudgetError, ConfigError

DEVICES = (Additive(), Jagged())


@pytest.fixture(params=AGENTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestContract:
    @pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
    @given(ratio=st.floats(0.06, 1.5), size=st.floats(0.15, 1.5), seed=st.integers(0, 10_000))
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    def test_every_ask_is_a_point_of_the_space_within_every_limit(
        self, name: str, device: Additive, ratio: float, size: float, seed: int
    ) -> None:
        problem = make_problem(device, [f"latency<={ratio:.6f}x", f"size<={size:.6f}x"], seed=seed, trials=14)
        for trial in play(problem, make(name, problem, FAST.get(name)), 14):
            for metric, most in problem.limits.top:
                assert (device.estimate(problem.network, trial.policy).metric(metric) or 0) <= most
            assert problem.space.contains(trial.policy)

    def test_the_same_seed_asks_the_same_in_another_process(self, name: str) -> None:
        code = (
            "import json, sys; from problems import *; from tightrope.search.agent import make;"
            f"p = make_problem(Jagged(), seed=3, trials=30); a = make({name!r}, p, json.loads(sys.argv[1]));"
            "print(json.dumps([t.policy.to_json() for t in play(p, a, 24)]))"
        )
        command = [sys.executable, "-c", code, json.dumps(FAST.get(name, {}))]
        other = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
        problem = make_problem(Jagged(), seed=3, trials=30)
        here = play(problem, make(name, problem, FAST.get(name)), 24)
        assert json.loads(other.stdout) == [t.policy.to_json() for t in here]

    def test_another_seed_asks_otherwise(self, name: str) -> None:
        played = [play(p, make(name, p, FAST.get(name)), 20) for p in (make_problem(seed=0), make_problem(seed=1))]
        assert [t.policy for t in played[0]] != [t.policy for t in played[1]]

    def test_told_what_it_asked_it_goes_on_as_before(self, name: str) -> None:
        problem = make_problem(Jagged(), trials=40)
        agent, again = (make(name, problem, FAST.get(name)) for _ in range(2))
        for trial in play(problem, agent, 20):
            again.tell(trial)
        assert [again.ask(20), again.ask(21)] == [agent.ask(20), agent.ask(21)]

    def test_a_failed_trial_is_taken(self, name: str) -> None:
        problem = make_problem(trials=20)
        agent = make(name, problem, FAST.get(name))
        for k in range(12):
            policy = agent.ask(k)
            agent.tell(Trial(k, name, policy, problem.cost(policy), None, True, "out of memory"))
        assert problem.limits.met(problem.cost(agent.ask(12)))

    def test_an_accuracy_is_kept_at_less_and_less_cost(self, name: str) -> None:
        problem = make_problem(budget="accuracy>=-4", trials=60)
        kept = [t for t in play(problem, make(name, problem, FAST.get(name)), 60) if t.feasible]
        assert kept and all(t.score and t.score.value >= problem.dense.value - 4 for t in kept)
        assert min(problem.price(t.cost) for t in kept) < 0.4
        assert min(problem.price(t.cost) for t in kept) < problem.price(kept[0].cost)

    def test_losses_are_numbers(self, name: str) -> None:
        problem = make_problem(trials=20)
        agent = make(name, problem, FAST.get(name))
        play(problem, agent, 12)
        assert all(np.isfinite(value) for value in agent.losses().values())


class TestRegistry:
    def test_an_unknown_name_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'nsga2'"):
            make("nsga", make_problem())

    def test_an_unknown_setting_is_named(self) -> None:
        with pytest.raises(ConfigError, match="candidate"):
            make("tpe", make_problem(), {"candidate": 3})

    def test_all_names_make_agents(self) -> None:
        assert set(AGENTS) <= set(names())
        assert all(make(name, make_problem()).ask(0) for name in AGENTS)


class TestFit:
    @pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
    @given(seed=st.integers(0, 10_000), ratio=st.floats(0.08, 0.5))
    @settings(max_examples=25, deadline=None)
    def test_fits_and_uses_the_budget(self, device: Additive, seed: int, ratio: float) -> None:
        problem = make_problem(device, f"latency<={ratio}x")
        wanted = np.random.default_rng(seed).random(problem.space.dimension)
        use = problem.limits.use(problem.cost(fit(problem, wanted)))
        assert 0.75 <= use <= 1

    def test_what_fits_already_is_left_alone_unless_filled(self) -> None:
        problem = make_problem(budget="latency<=0.9x")
        wanted = np.full(problem.space.dimension, 0.4)
        assert fit(problem, wanted, fill=False) == problem.space.decode(wanted)

    def test_filling_takes_nothing_back(self) -> None:
        problem = make_problem(budget="latency<=0.4x")
        wanted = np.full(problem.space.dimension, 0.3)
        before, after = (problem.space.encode(fit(problem, wanted, fill=f)) for f in (False, True))
        assert (after >= before).all() and (after > before).any()

    def test_the_cheapest_is_no_dearer_than_any_of_a_thousand(self) -> None:
        for device in DEVICES:
            problem = make_problem(device)
            rng = np.random.default_rng(0)
            drawn = problem.costs([problem.space.sample(rng) for _ in range(1000)])
            assert problem.price(problem.cost(problem.cheapest)) <= min(map(problem.price, drawn))

    def test_the_cheapest_of_an_additive_device_is_the_least_of_everything(self) -> None:
        problem = make_problem(Additive())
        widths = problem.cheapest.all_widths(problem.network)
        assert widths == {g: options[0] for g, options in problem.space.widths.items()}

    def test_a_budget_that_nothing_meets_names_the_cheapest(self) -> None:
        problem = make_problem(Jagged(), "latency<=0.01x")
        with pytest.raises(BudgetError, match=r"nothing in the space meets .*latency_ms=0\.3.*'channels': {'a': 8"):
            problem.check()


class TestEven:
    def test_is_the_largest_even_share_of_each_precision(self) -> None:
        problem = make_problem(Additive(), "latency<=0.3x")
        for policy in Even(problem).policies:
            pair = max((policy.choice(x.name).weight_bits, policy.choice(x.name).act_bits) for x in problem.network.layers[1:-1])
            fitting = [
                p for share in even_shares(problem.space)
                if problem.limits.met(problem.cost(p := problem.space.uniform(share, pair)))
            ]  # fmt: skip
            assert policy == fitting[-1]


class TestDDPG:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_learns_more_than_its_warm_up_knew(self, seed: int) -> None:
        problem = make_problem(Jagged(), "latency<=0.15x", seed=seed, trials=80)
        agent = make("ddpg", problem, {"cheaper": 0.0})
        values = [t.score.value for t in play(problem, agent, 80) if t.score]
        assert np.mean(values[-15:]) > np.mean(values[:16]) + 10
        assert np.max(values[16:]) >= np.max(values[:16])


class TestTPE:
    def test_beats_random_where_the_budget_is_tight(self) -> None:
        found = {}
        for name in ("tpe", "random"):
            problems = [make_problem(Jagged(), "latency<=0.1x", seed=seed, trials=50) for seed in range(3)]
            found[name] = [max(t.score.value for t in play(p, make(name, p), 50) if t.score) for p in problems]
        assert min(found["tpe"]) > max(found["random"])


def test_the_problem_that_these_tests_need() -> None:
    problem = make_problem(Jagged(), "latency<=0.2x,size<=50KB")
    even = [problem.cost(problem.space.uniform(0.5, pair)).latency_ms for pair in ((4, 8), (8, 8), (32, 32))]
    assert even == sorted(even) and problem.limits.top[1] == ("size_bytes", 50_000)
    lone = Policy.make(problem.network, choices={"dw": Choice(8, 8)})
    assert problem.cost(lone).latency_ms > problem.dense_cost.latency_ms, "fewer bits may cost more"
    assert 98.9 < ClosedForm(problem.network).evaluate(problem.space.dense).value <= 99
