"""What holds for every agent, and what each learns."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import AGENTS, FAST, Additive, ClosedForm, Jagged, make_problem, play

from tightrope.search.agent import make, names
from tightrope.search.agents.ilp import _solve
from tightrope.search.agents.repair import fit
from tightrope.search.agents.uniform import Even, even_shares
from tightrope.search.trial import Trial
from tightrope.spaces import Choice, Policy, Space
from tightrope.spaces.errors import BudgetError, ConfigError
from tightrope.spaces.space import Variable

DEVICES = (Additive(), Jagged())


@pytest.fixture(params=AGENTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kinds(name: str) -> str:
    """The space for an agent: GP's asks take seconds in a larger one."""
    return "channels" if name == "gp" else "all"


class TestContract:
    @pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
    @given(ratio=st.floats(0.06, 1.5), size=st.floats(0.15, 1.5), seed=st.integers(0, 10_000))
    @settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
    def test_every_ask_is_a_point_of_the_space_within_every_limit(
        self, name: str, device: Additive, ratio: float, size: float, seed: int
    ) -> None:
        problem = make_problem(device, [f"latency<={ratio:.6f}x", f"size<={size:.6f}x"], seed=seed, trials=12, kinds=kinds(name))
        try:
            problem.check()
            agent = make(name, problem, FAST.get(name))
        except BudgetError:  # the decisions of these alone may not reach so low
            assert name in ("amc", "gp", "haq")
            return
        for trial in play(problem, agent, 12):
            for metric, most in problem.limits.top:
                assert (device.estimate(problem.network, trial.policy).metric(metric) or 0) <= most
            assert problem.space.contains(trial.policy)

    def test_another_seed_asks_otherwise(self, name: str) -> None:
        problems = [make_problem(Jagged(), "latency<=0.5x", seed=seed, kinds=kinds(name)) for seed in (0, 1)]
        played = [play(p, make(name, p, FAST.get(name)), 18) for p in problems]
        assert [t.policy for t in played[0]] != [t.policy for t in played[1]]

    @pytest.mark.parametrize("workers", [1, 3])
    def test_told_what_it_asked_it_goes_on_as_before(self, name: str, workers: int) -> None:
        problem = make_problem(Jagged(), "latency<=0.5x", trials=24, kinds=kinds(name))
        agent, again = (make(name, problem, FAST.get(name)) for _ in range(2))
        played = play(problem, agent, 16, workers=workers)
        told = 0
        for number in range(12, 16):  # as a study does that stopped after 12 trials and some more
            for trial in played[told : number - workers + 1]:
                again.tell(trial)
            told = number - workers + 1
            assert again.ask(number) == played[number].policy

    def test_a_failed_trial_is_taken(self, name: str) -> None:
        problem = make_problem(budget="latency<=0.5x", trials=20, kinds=kinds(name))
        agent = make(name, problem, FAST.get(name))
        for k in range(12):
            policy = agent.ask(k)
            agent.tell(Trial(k, name, policy, problem.cost(policy), None, True, "out of memory"))
        assert problem.limits.met(problem.cost(agent.ask(12)))

    def test_an_accuracy_is_kept_at_less_and_less_cost(self, name: str) -> None:
        floor, trials, least = (-20, 20, 0.6) if name == "gp" else (-4, 50, 0.95 if name in ("amc", "haq") else 0.5)
        problem = make_problem(budget=f"accuracy>={floor}", trials=trials, kinds=kinds(name))
        kept = [t for t in play(problem, make(name, problem, FAST.get(name)), trials) if t.feasible]
        assert kept and all(t.score and t.score.value >= problem.dense.value + floor for t in kept)
        assert min(problem.price(t.cost) for t in kept) < min(least, problem.price(kept[0].cost))

    @pytest.mark.parametrize("kinds", ["one", "point"])
    @pytest.mark.parametrize("budget", ["latency<=1.5x", "accuracy>=-50"])
    def test_the_smallest_spaces_have_answers_too(self, name: str, kinds: str, budget: str) -> None:
        problem = make_problem(Additive(), budget, trials=12, kinds=kinds)
        try:
            agent = make(name, problem, FAST.get(name))
        except ConfigError as error:
            assert "no choice" in str(error) and name in ("amc", "haq")
            return
        assert len({t.policy for t in play(problem, agent, 12)}) <= problem.space.size

    def test_losses_are_numbers(self, name: str) -> None:
        problem = make_problem(budget="latency<=0.5x", trials=20, kinds=kinds(name))
        agent = make(name, problem, FAST.get(name))
        play(problem, agent, 12)
        assert all(np.isfinite(value) for value in agent.losses().values())


def first_trials() -> dict[str, list[object]]:
    """What every agent asks at first, with the same seed, as JSON."""
    found: dict[str, list[object]] = {}
    for name in AGENTS:
        problem = make_problem(Jagged(), "latency<=0.5x", seed=3, trials=18, kinds=kinds(name))
        found[name] = [t.policy.to_json() for t in play(problem, make(name, problem, FAST.get(name)), 15)]
    return found


def test_the_same_seed_asks_the_same_in_another_process() -> None:
    code = "import json; from test_agents import first_trials; print(json.dumps(first_trials()))"
    other = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)
    assert json.loads(other.stdout) == json.loads(json.dumps(first_trials()))


class TestPortfolio:
    def test_says_which_part_found_what(self) -> None:
        problem = make_problem(trials=40)
        names = [t.agent for t in play(problem, make("auto", problem, {"members": ["uniform", "random", "netadapt"]}), 40)]
        assert set(names[:20]) == {"auto:uniform"} and set(names) == {"auto:uniform", "auto:random", "auto:netadapt"}

    def test_trials_go_where_the_front_grows(self) -> None:
        problem = make_problem(Jagged(), "latency<=0.1x", trials=80)
        agent = make("auto", problem, {"members": ["random", "uniform", "ilp"], "first": 0.1})
        played = play(problem, agent, 80)
        best = max(played, key=lambda t: t.score.value if t.score else 0.0)
        counts = {name: sum(t.agent == f"auto:{name}" for t in played[8:]) for name in ("random", "uniform", "ilp")}
        assert best.agent == "auto:ilp" and counts["ilp"] == max(counts.values())

    def test_members_must_be_known_and_different(self) -> None:
        for members, words in ((["auto"], "other than auto"), (["tpe", "tpe"], "different"), (["tp"], "did you mean 'tpe'")):
            with pytest.raises(ConfigError, match=words):
                make("auto", make_problem(), {"members": members})
        with pytest.raises(ConfigError, match="not among its members"):
            make("auto", make_problem(), {"settings": {"ddpg": {}}})

    @pytest.mark.parametrize("name", ["tpe", "ddpg", "nsga2"])
    def test_any_agent_starts_from_another(self, name: str) -> None:
        problem = make_problem(Jagged(), "latency<=0.1x", trials=40)
        alone, started = make("ilp", problem), make(name, problem, {**FAST.get(name, {}), "start": "ilp", "start_trials": 20})
        first, played = play(problem, alone, 20), play(problem, started, 26)
        assert [t.policy for t in played[:20]] == [t.policy for t in first]
        assert [t.agent for t in played] == 20 * [f"{name}:ilp"] + 6 * [name]

    def test_a_start_must_be_another_agent(self) -> None:
        with pytest.raises(ConfigError, match="must be another agent"):
            make("ilp", make_problem(), {"start": "ilp"})


class TestPresets:
    def test_amc_decides_about_channels_only(self) -> None:
        problem = make_problem(budget="macs<=0.5x", trials=20)
        for trial in play(problem, make("amc", problem, FAST["amc"]), 8):
            assert not trial.policy.choices and trial.policy.widths

    def test_haq_decides_about_bits_only(self) -> None:
        problem = make_problem(budget="latency<=0.5x", trials=20)
        for trial in play(problem, make("haq", problem, FAST["haq"]), 8):
            assert not trial.policy.widths and all(choice.rank is None for _, choice in trial.policy.choices)

    def test_a_budget_out_of_their_reach_is_said(self) -> None:
        with pytest.raises(BudgetError, match="agent haq decides about weight_bits and act_bits only: nothing in the space meets"):
            make("haq", make_problem(budget="macs<=0.5x"))

    def test_a_large_space_is_not_for_gp(self) -> None:
        with pytest.raises(ConfigError, match="at most 16 decisions"):
            make("gp", make_problem())


def known_losses(space: Space) -> dict[str, tuple[float, ...]]:
    """What `ClosedForm` takes for each option alone, in a unit of its own for every kind of decision."""
    whole = ClosedForm(space.network).evaluate(space.dense).value
    units = {"channels": 1.0, "rank": 3.0, "weight_bits": 0.4, "act_bits": 0.7}

    def lost(variable: Variable, at: int) -> float:
        point = np.ones(space.dimension)
        point[space.variables.index(variable)] = (at + 0.5) / len(variable.options)
        fallen = whole - ClosedForm(space.network).evaluate(space.decode(point)).value
        return float(units[variable.kind] * max(0.0, fallen / 100))

    return {v.name: tuple(lost(v, i) for i in range(len(v.options))) for v in space.variables}


class TestILP:
    def test_finds_the_optimum_where_losses_and_costs_add_up(self) -> None:
        """Against every policy of a space of 1,920, scored one by one."""
        problem = make_problem(Additive(), "latency<=0.4x", trials=60, kinds="channels")
        space, judged = problem.space, ClosedForm(problem.network)
        grids = np.meshgrid(*((np.arange(len(v.options)) + 0.5) / len(v.options) for v in space.variables), indexing="ij")
        policies = [space.decode(p) for p in np.stack([g.ravel() for g in grids], 1)]
        able = [p for p, c in zip(policies, problem.costs(policies), strict=True) if problem.limits.met(c)]
        optimum = max(judged.evaluate(p).value for p in able)
        found = max(t.score.value for t in play(problem, make("ilp", problem), 60) if t.score)
        assert len(policies) == space.size and optimum - 0.1 <= found <= optimum

    @pytest.mark.parametrize("seed", [0, 1])
    def test_beats_random_and_uniform_by_far(self, seed: int) -> None:
        problem = make_problem(Jagged(), "latency<=0.1x", seed=seed, trials=60)
        best = {n: max(t.score.value for t in play(problem, make(n, problem), 60) if t.score) for n in ("ilp", "random", "uniform")}
        assert best["ilp"] > max(best["random"], best["uniform"]) + 2

    def test_losses_that_are_known_save_trials(self) -> None:
        """With what the closed form takes for each option, up to a factor of each kind that is not told."""
        best: dict[bool, list[float]] = {False: [], True: []}
        for seed in range(4):
            problem = make_problem(Jagged(), "latency<=0.1x", seed=seed, trials=10)
            told = replace(problem, space=replace(problem.space, losses=known_losses(problem.space)))
            for p in (problem, told):
                best[p is told].append(max(t.score.value for t in play(p, make("ilp", p), 10) if t.score))
        assert np.mean(best[True]) > np.mean(best[False]) + 5, best

    def test_a_programme_by_hand(self) -> None:
        """Three decisions of two options; gains 3, 4, 5 at costs 2, 3, 4 within 5: the first two."""
        gains, rises = np.array([0, 3.0, 0, 4.0, 0, 5.0]), np.array([[0, 2.0, 0, 3.0, 0, 4.0]]).T
        sizes, start = np.array([2, 2, 2]), np.zeros(3, dtype=np.int64)
        solved = [_solve(sizes, start, gains, rises, np.array([room]), reach) for room, reach in ((5, 1.0), (5, 0.34), (-1, 1.0))]
        assert [None if s is None else s.tolist() for s in solved] == [[1, 1, 0], [0, 0, 1], None]


class TestRegistry:
    def test_an_unknown_name_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'nsga2'"):
            make("nsga", make_problem())

    def test_an_unknown_setting_is_named(self) -> None:
        with pytest.raises(ConfigError, match="candidate"):
            make("tpe", make_problem(), {"candidate": 3})

    def test_all_names_make_agents(self) -> None:
        assert set(AGENTS) <= set(names())
        assert all(make(name, make_problem(budget="latency<=0.5x"), FAST.get(name)).ask(0) for name in AGENTS)


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

    def test_rarely_asks_for_a_policy_again(self) -> None:
        problem = make_problem(Jagged(), "latency<=0.15x", trials=80)
        policies = [t.policy for t in play(problem, make("ddpg", problem, {"hidden": 16, "updates": 0.1}), 80)]
        assert len({*policies[16:]} - {*policies[:16]}) >= 45


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
