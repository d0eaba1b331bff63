"""Studies in one process: repeats, failures, resuming, and drivers that are killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from problems import AGENTS, DEVICE, FAST, SPACE, Additive, Watched, essence, make_problem, mark, payload
from threadpoolctl import threadpool_info, threadpool_limits

from tightrope.search import journal
from tightrope.search.distribute import Inline
from tightrope.search.journal import Control, Final
from tightrope.search.results import Results
from tightrope.search.study import Study
from tightrope.search.trial import Trial
from tightrope.spaces import Budget, Policy, Score
from tightrope.spaces.errors import BudgetError, DataError, RunError


def begin(
    executor: Inline, folder: Path | None = None, *, agent: str = "random", budget: str = "latency<=0.2x", trials: int = 20
) -> Study:
    return Study.start(
        SPACE, DEVICE, Budget.parse(budget), executor, folder=folder, agent=agent, trials=trials, settings=FAST.get(agent)
    )


@pytest.mark.parametrize("agent", AGENTS)
def test_resumed_is_as_if_it_had_never_stopped(agent: str, tmp_path: Path) -> None:
    executor = Inline(Watched)
    with begin(executor, tmp_path / "whole", agent=agent, trials=20) as whole:
        whole.run(executor)
    with begin(executor, tmp_path / "parts", agent=agent, trials=20) as parts:
        parts.run(executor, 13)
    with Study.resume(tmp_path / "parts", SPACE, DEVICE) as parts:
        parts.run(executor)
    assert essence(parts.trials) == essence(whole.trials)
    assert essence(journal.read(tmp_path / "parts").trials) == essence(whole.trials)


def test_a_repeated_policy_is_scored_once_but_told_each_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    executor = Inline(Watched, payload(log=log))
    with begin(executor, tmp_path, agent="uniform", trials=40) as study:
        study.agent._spread = 0.01  # type: ignore[attr-defined]  # so small that policies repeat
        study.run(executor)
    scored = [line.split()[1] for line in log.read_text().splitlines()]
    assert len(scored) == len(set(scored)) < 40
    assert [t.number for t in study.trials] == list(range(40)) == [t.number for t in journal.read(tmp_path).trials]


def test_trials_have_one_thread_of_blas() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    class Counted(Watched):
        def evaluate(self, policy: Policy) -> Score:
            seen.append(threads())
            return super().evaluate(policy)

    seen: list[set[int]] = []
    executor = Inline(Counted)
    with threadpool_limits(limits=2, user_api="blas"), begin(executor, trials=3) as study:
        seen.clear()  # of the dense model
        study.run(executor)
        assert seen and all(found == {1} for found in seen) and threads() == {2}


def test_a_failing_policy_is_a_failed_trial_and_the_search_goes_on(tmp_path: Path) -> None:
    dense = mark(SPACE.dense) % 7
    executor = Inline(Watched, payload(raises=(dense + 1) % 7))
    with begin(executor, tmp_path, trials=40) as study:
        study.run(executor)
    failed = [t for t in study.trials if t.failed]
    assert 1 <= len(failed) < 40
    assert all(t.score is None and t.failed == "MemoryError: of this policy there is too much" for t in failed)
    assert study.best is not None and study.best.score is not None
    assert essence(journal.read(tmp_path).trials) == essence(study.trials)


def test_a_dense_model_that_cannot_be_scored_ends_it_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be scored before compression: MemoryError"):
        begin(Inline(Watched, payload(raises=mark(SPACE.dense) % 7)), tmp_path)
    assert begin(Inline(Watched), tmp_path).header.seed == 0


class NaN(Watched):
    def evaluate(self, policy: object) -> Score:
        return Score(float("nan"), 0.0, 1)


def test_a_score_that_is_no_number_is_said() -> None:
    with pytest.raises(DataError, match="the score is nan"):
        begin(Inline(NaN))


def test_a_budget_that_nothing_meets_is_said_before_anything_is_scored(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(BudgetError, match="nothing in the space meets the budget"):
        begin(Inline(Watched, payload(log=log)), budget="latency<=0.001x")
    assert not log.exists()


def test_a_cost_that_the_device_cannot_tell_is_said() -> None:
    with pytest.raises(BudgetError, match="cannot tell the cost in 'energy<=1mJ'"):
        begin(Inline(Watched), budget="energy<=1mJ")


def test_the_number_of_workers_stays(tmp_path: Path) -> None:
    executor = Inline(Watched)
    begin(executor, tmp_path).close()
    executor.slots = 2
    with Study.resume(tmp_path, SPACE, DEVICE) as study, pytest.raises(RunError, match="began with 1 trials under way"):
        study.run(executor)


def test_results_of_the_journal_are_those_of_the_study(tmp_path: Path) -> None:
    executor, seen = Inline(Watched), []
    with begin(executor, tmp_path, agent="nsga2", trials=30) as study:
        study.run(executor, on_trial=[lambda trial, s: seen.append((trial.number, len(s.trials)))])
        best = study.best
        assert best is not None and best.score is not None
        study.add(Control("recipe", best.policy, best.cost, best.score))
        study.add(Final(best.number, best.score, best.cost))
    record = journal.read(tmp_path)
    results = Results(record.header, record.trials)
    assert [t.number for t in results.front] == [t.number for t in study.front]
    assert results.best == best and results.hypervolume == study.hypervolume > 0.15
    assert study.budget_use is not None and 0.5 < study.budget_use <= 1
    assert record.controls == tuple(study.controls) and record.finals == tuple(study.finals)
    assert seen == [(k, k + 1) for k in range(30)]
    frame = study.to_pandas()
    assert frame.shape[0] == 30 and frame["latency_ms"].max() <= dict(record.header.limits)["latency_ms"]
    assert frame.loc[best.number, "channels:a"] == best.policy.all_widths(SPACE.network)["a"]


def test_an_agent_that_asks_too_much_is_brought_back() -> None:
    executor = Inline(Watched)
    study = begin(executor, trials=3)

    class Greedy:
        def ask(self, number: int) -> object:
            return SPACE.dense

        def tell(self, trial: Trial) -> None:
            assert study.problem.limits.met(trial.cost)

    study.agent = Greedy()  # type: ignore[assignment]
    study.run(executor)
    assert all(t.feasible for t in study.trials) and len({t.policy for t in study.trials}) == 1


DRIVER = """
import sys
from pathlib import Path
from problems import *
from test_study import begin
from tightrope.search.distribute import Inline
from tightrope.search.study import Study
folder, trials = Path(sys.argv[1]), int(sys.argv[2])
executor = Inline(Watched, payload(sleep=0.012, log=folder / "log"))
holds = (folder / "trials.jsonl").exists() and b"\\n" in (folder / "trials.jsonl").read_bytes()
study = Study.resume(folder, SPACE, DEVICE) if holds else begin(executor, folder, agent="nsga2", trials=trials)
study.run(executor)
study.close()
"""


def test_killed_at_ten_moments_it_keeps_what_was_told_and_scores_nothing_twice(tmp_path: Path) -> None:
    trials, rng = 80, np.random.default_rng(7)
    with begin(Inline(Watched), agent="nsga2", trials=trials) as whole:
        whole.run(Inline(Watched))
    log, kills = tmp_path / "log", 0
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(trials)]
    while True:
        kept = journal.read(tmp_path).trials if kills else ()
        before = log.read_text().splitlines() if log.exists() else []
        with subprocess.Popen(command, cwd=Path(__file__).parent) as driver:
            if kills < 10:
                _wait_for(log, len(before) + int(rng.integers(1, 8)), driver)
                time.sleep(rng.random() * 0.02)
                driver.send_signal(signal.SIGKILL)
                kills += 1
        record = journal.read(tmp_path)
        assert essence(record.trials)[: len(kept)] == essence(kept)
        new = {int(line.split()[1]) for line in log.read_text().splitlines()[len(before) :]}
        assert not new & {mark(t.policy) for t in kept}
        if driver.returncode == 0:
            break
    assert kills == 10
    assert essence(record.trials) == essence(whole.trials)


def _wait_for(log: Path, lines: int, driver: "subprocess.Popen[bytes]") -> None:
    while driver.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)


def test_costs_are_estimated_once_and_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, asked = make_problem(Additive()), []
    estimate = Additive.estimate
    monkeypatch.setattr(Additive, "estimate", lambda self, n, p: asked.append(p) or estimate(self, n, p))
    monkeypatch.setattr("tightrope.search.agent._REMEMBERED", 10)
    rng = np.random.default_rng(0)
    policies = [problem.space.sample(rng) for _ in range(8)]
    first = problem.costs([*policies, *policies])
    assert problem.costs(policies) == first[:8] and len(asked) == 8
    problem.costs([problem.space.sample(rng) for _ in range(20)])
    assert len(problem._known) == 5 and problem.costs(policies) == first[:8]  # the younger half of what may be kept
