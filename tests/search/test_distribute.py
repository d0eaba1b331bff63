"""Trials on real Ray actors."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from problems import DEVICE, SPACE, Watched, essence, mark, payload

from tightrope.search import distribute, journal
from tightrope.search.distribute import Inline, RayPool, pool
from tightrope.search.study import Study
from tightrope.spaces import Budget
from tightrope.spaces.errors import RunError

BUDGET = Budget.parse("latency<=0.2x")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One Ray of two cores for all tests here; its address."""
    distribute._start(2, None, 0)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def search(executor: distribute.Executor, folder: Path | None = None, *, agent: str = "nsga2", trials: int = 30) -> Study:
    with Study.start(SPACE, DEVICE, BUDGET, executor, folder=folder, agent=agent, trials=trials) as study:
        study.run(executor)
    executor.close()
    return study


def test_one_worker_makes_the_trials_of_no_worker(cluster: str) -> None:
    assert essence(search(pool(Watched, workers=1)).trials) == essence(search(Inline(Watched)).trials)


SECOND = """
import json, sys
from problems import *
from test_distribute import search
from tightrope.search.distribute import pool
study = search(pool(Watched, payload(sleep=0.002), workers=2, address=sys.argv[1]))
print(json.dumps([[t.number, mark(t.policy), t.score.value] for t in study.trials]))
"""


def test_two_workers_make_the_same_trials_in_another_process_whoever_is_first(cluster: str) -> None:
    command = [sys.executable, "-c", SECOND, cluster]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as other:
        study = search(pool(Uneven, workers=2))
        out, _ = other.communicate()
    assert json.loads(out) == [[t.number, mark(t.policy), t.score.value] for t in study.trials if t.score]


class Uneven(Watched):
    """Takes turns to be slow, so that the second of two trials often ends first."""

    def evaluate(self, policy: object) -> object:  # type: ignore[override]
        time.sleep(0.02 * (mark(policy) % 3))  # type: ignore[arg-type]
        return super().evaluate(policy)  # type: ignore[arg-type]


def test_a_search_on_two_workers_resumes_as_if_it_had_never_stopped(cluster: str, tmp_path: Path) -> None:
    whole = search(pool(Watched, workers=2), agent="tpe", trials=40)
    executor = pool(Uneven, workers=2)
    with Study.start(SPACE, DEVICE, BUDGET, executor, folder=tmp_path, agent="tpe", trials=40) as study:

        def stop(trial: object, study: Study) -> None:
            if len(study.trials) >= 34:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            study.run(executor, on_trial=[stop])
    executor.close()
    assert 34 <= len(journal.read(tmp_path).trials) < 40
    executor = pool(Watched, workers=2)
    with Study.resume(tmp_path, SPACE, DEVICE) as study:
        study.run(executor)
    executor.close()
    assert essence(study.trials) == essence(whole.trials)


def test_killed_workers_are_replaced_and_nothing_is_lost(cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    executor = pool(Watched, payload(sleep=0.03, log=log), workers=2)
    killed: list[int] = []

    def workers() -> list[int]:
        found = [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []
        return list(dict.fromkeys(found))

    def kill() -> None:
        for count in (1, 2):  # both, so that the search can only go on with others
            while len(workers()) < count:
                time.sleep(0.005)
            killed.append(workers()[count - 1])
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    study = search(executor, tmp_path)
    killer.join()
    assert set(workers()) > set(killed) and len(killed) == 2
    assert essence(study.trials) == essence(search(pool(Watched, workers=2)).trials)
    assert not any(t.failed for t in journal.read(tmp_path).trials)


def test_a_policy_that_kills_every_worker_fails_and_the_search_goes_on(cluster: str) -> None:
    deadly = (mark(SPACE.dense) + 1) % 7
    executor = RayPool(Watched, payload(dies=deadly), workers=2, retries=1)
    trials = search(executor, agent="random", trials=12).trials
    failed = [t for t in trials if t.failed]
    assert {t.number for t in failed} == {t.number for t in trials if mark(t.policy) % 7 == deadly} != set()
    assert all("its worker died 2 times" in str(t.failed) for t in failed)
    assert sum(t.score is not None for t in trials) == 12 - len(failed)


class OneMachine(Watched):
    """Notes its process, and takes all that are noted with it when it meets the first policy."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.folder = Path(bytes(arrays["folder"]).decode())
        self.folder.joinpath(str(os.getpid())).touch()

    def evaluate(self, policy: object) -> object:  # type: ignore[override]
        others = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and int(p.name) != os.getpid()]
        first = self.folder / "first"
        if not first.exists():
            first.touch()
            for process in [*others, os.getpid()]:
                os.kill(process, signal.SIGKILL)
        return super().evaluate(policy)  # type: ignore[arg-type]


def test_workers_that_die_together_cost_a_policy_one_try(cluster: str, tmp_path: Path) -> None:
    folder = {"folder": np.frombuffer(str(tmp_path).encode(), np.uint8)}
    executor = RayPool(OneMachine, payload() | folder, workers=2, retries=1)
    executor.submit(0, SPACE.dense)
    outcome = executor.next()
    executor.close()
    assert (outcome.number, outcome.failed) == (0, None)


def test_the_shared_arrays_are_one_copy_that_nobody_can_write(cluster: str) -> None:
    base = np.random.default_rng(0).random(500_000)
    before = base.sum()
    executor = pool(Watched, payload(base=0) | {"base": base}, workers=2)
    study = search(executor, trials=6)
    assert not any(t.failed for t in study.trials)
    assert base.sum() == before


def test_what_the_factory_raises_is_raised_here(cluster: str) -> None:
    with pytest.raises(ZeroDivisionError, match="no evaluator today"):
        pool(broken, workers=1)


def broken(arrays: object) -> Watched:
    raise ZeroDivisionError("no evaluator today")


def test_more_workers_than_cores_is_an_error_that_says_so(cluster: str) -> None:
    with pytest.raises(RunError, match="4 workers were not ready within 5 s, 2 were; Ray sees 2 CPUs"):
        RayPool(Watched, workers=4, patience_seconds=5)


def test_a_cluster_that_is_not_there_is_said() -> None:
    code = "from tightrope.search.distribute import pool; pool(print, workers=1, address='127.0.0.1:1')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "RAY_GCS_RPC_TIMEOUT_S": "1"}
    )
    assert "Ray cannot be reached at '127.0.0.1:1'" in done.stderr


def test_where_ray_cannot_start_it_is_said_and_another_cluster_is_left_alone(tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 30)  # no socket can have so long a name
    code = "from tightrope.search.distribute import pool; pool(print, workers=1)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_TMPDIR": str(deep)},
    )  # fmt: skip
    assert "RunError: Ray cannot be started" in done.stderr and "107 bytes" in done.stderr and "workers=0" in done.stderr
