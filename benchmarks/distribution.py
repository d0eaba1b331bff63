"""What running trials on Ray costs, and what it survives; trials here only sleep, so that nothing but the distribution is seen.

    python -m benchmarks.distribution [--json FILE] [--quick] [--kills 50] [--workers 64]

Idle: two workers, trials of uneven length, an agent that thinks. Speed-up: as many workers as asked, on one machine that
pretends to have the cores, against one worker. Driver: the CPU time of the driver's process and a trial, without ask
and tell. Kills: drivers and workers are killed with -9 at random moments of one search, which goes on each time; nothing that was
told may be missing or changed afterwards, and the finished search must be that of a driver that was never killed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.search import journal
from tightrope.search.distribute import Inline, Payload, RayPool
from tightrope.search.study import Study
from tightrope.search.trial import Trial
from tightrope.spaces import Budget, Cost, Extent, Group, Layer, Network, Policy, Score, Space
from tightrope.spaces.unit import lower

BUDGET = Budget.parse("macs<=0.5x")
TRIALS_KILLED = 600


def network() -> Network:
    """Six convolutions in a row and a classifier."""
    names = [f"g{i}" for i in range(6)]
    extents = [Extent(3), *(Extent(0, ((n, 1),)) for n in names), Extent(10)]
    layers = [
        Layer(f"c{i}", "conv", extents[i], extents[i + 1], (3, 3), padding=(1, 1), in_size=(16, 16), out_size=(16, 16))
        for i in range(6)
    ]  # fmt: skip
    return Network((*layers, Layer("head", "linear", extents[6], extents[7])), tuple(Group(n, 64) for n in names))


class Counting:
    """A device whose latency is the MACs."""

    name, simulated, batch, notes = "counting", True, 1, ()
    metrics = frozenset({"latency_ms", "macs", "size_bytes"})

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        return [(8, 8), (32, 32)]

    def estimate(self, network: Network, policy: Policy) -> Cost:
        units = lower(network, policy)
        macs = sum(u.macs for u in units)
        return Cost(macs * 1e-6, sum(u.size_bytes for u in units), macs, simulated=True)

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        return [self.estimate(network, p) for p in policies]


class Sleeper:
    """Sleeps for each policy as long as the payload says, more or less, and writes down when."""

    def __init__(self, payload: Payload) -> None:
        self.seconds, self.spread = (float(x) for x in payload["sleep"])
        self.log = Path(payload["log"].tobytes().decode())

    def evaluate(self, policy: Policy) -> Score:
        start = time.time()
        rng = np.random.default_rng(zlib.crc32(repr(policy.to_json()).encode()) if self.spread else 0)
        time.sleep(self.seconds * float(1 + self.spread * rng.uniform(-1, 1)))
        widths = policy.all_widths(network())
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {start} {time.time()}\n")
        return Score(99 - sum(1 - w / 64 for w in widths.values()), 0.5, 1000)


def payload(seconds: float, spread: float, log: Path) -> dict[str, NDArray[Any]]:
    return {"sleep": np.array([seconds, spread]), "log": np.frombuffer(str(log).encode(), np.uint8)}


def started(executor: Any, trials: int, agent: str = "random", folder: Path | None = None) -> Study:
    device = Counting()
    return Study.start(Space.build(network(), device.pairs), device, BUDGET, executor, folder=folder, agent=agent, trials=trials)


def timed(study: Study) -> dict[str, float]:
    """Count the CPU seconds of the agent's asks and tells."""
    seconds = {"agent": 0.0}
    for name in ("ask", "tell"):
        inner = getattr(study.agent, name)

        def call(*given: Any, inner: Any = inner) -> Any:
            start = time.thread_time()
            try:
                return inner(*given)
            finally:
                seconds["agent"] += time.thread_time() - start

        setattr(study.agent, name, call)
    return seconds


def spans(log: Path) -> NDArray[np.float64]:
    """`n x 3`: process, start and end of each trial, without the dense model's."""
    return np.array([[float(x) for x in line.split()] for line in log.read_text().splitlines()])[1:]


def idle(folder: Path, trials: int, seconds: float) -> tuple[float, float]:
    """Percent of the time in which two workers have nothing to do, and the driver's CPU milliseconds a trial."""
    log = folder / "idle"
    executor = RayPool(Sleeper, payload(seconds, 0.5, log), workers=2)
    study = started(executor, trials, "tpe", folder / "run")
    own = timed(study)
    start = time.process_time()
    with study:
        study.run(executor)
    driver = time.process_time() - start - own["agent"]
    executor.close()
    found = spans(log)
    found = found[np.argsort(found[:, 1])][: -study.header.workers]  # the search's end leaves workers without work
    busy = float((found[:, 2] - found[:, 1]).sum())
    wall = float(found[:, 2].max() - found[:, 1].min())
    return 100 * (1 - busy / (2 * wall)), 1e3 * driver / trials


def throughput(folder: Path, workers: int, each: int, seconds: float) -> tuple[float, float]:
    """Trials a second of sleeping workers, from the first to the last, and the driver's CPU milliseconds a trial."""
    import ray

    from tightrope.search import distribute

    log, trials = folder / f"log-{workers}", workers * each
    distribute._start(workers, None, 2**20)
    executor = RayPool(Sleeper, payload(seconds, 0.0, log), workers=workers, patience_seconds=900)
    study = started(executor, trials, folder=folder / f"run-{workers}")
    own = timed(study)
    policies: list[Policy] = []
    space, rng = study.problem.space, np.random.default_rng(0)
    while len(policies) < trials:  # asked beforehand: here only the distribution counts
        policy = space.uniform(0.125) if not policies else space.sample(rng)
        if study.problem.limits.met(study.problem.cost(policy)):
            policies.append(policy)
    study.agent.ask = lambda number: policies[number]  # type: ignore[method-assign]
    start = time.process_time()
    with study:
        study.run(executor)
    driver = time.process_time() - start - own["agent"]
    executor.close()
    ray.shutdown()
    found = spans(log)
    return len(found) / float(found[:, 2].max() - found[:, 1].min()), 1e3 * driver / trials


DRIVER = """
import sys
from pathlib import Path
from benchmarks.distribution import *
folder, device = Path(sys.argv[1]), Counting()
executor = RayPool(Sleeper, payload(0.02, 0.5, folder / "log"), workers=2, address=sys.argv[2])
if (folder / "trials.jsonl").exists() and b"\\n" in (folder / "trials.jsonl").read_bytes():
    study = Study.resume(folder, Space.build(network(), device.pairs), device)
else:
    study = started(executor, TRIALS_KILLED, "nsga2", folder)
study.run(executor)
study.close()
executor.close()
"""


def kills(folder: Path, wanted: int) -> dict[str, float]:
    """Kill drivers and workers of one search at random moments; trials lost, changed, or scored again although told."""
    import ray

    from tightrope.search import distribute

    distribute._start(2, None, 2**20)
    address, rng = ray.get_runtime_context().gcs_address, np.random.default_rng(0)
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(folder), address]
    done = {"driver": 0, "worker": 0}
    lost, restarts = 0, 0
    kept: set[bytes] = set()
    while True:
        driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        restarts += 1
        while driver.poll() is None and sum(done.values()) < wanted:
            before = len(_lines(folder))
            while driver.poll() is None and len(_lines(folder)) < before + int(rng.integers(1, 12)):
                time.sleep(0.005)
            if driver.poll() is not None:
                break
            time.sleep(0.03 * rng.random())
            kept |= _told(folder)
            if rng.random() < 0.5:
                driver.send_signal(signal.SIGKILL)
                done["driver"] += 1
                break
            running = sorted({int(line.split()[0]) for line in _lines(folder)[-2:]})
            done["worker"] += _kill(running[int(rng.integers(len(running)))])
        driver.wait()
        lost += len(kept - _told(folder))
        if driver.returncode == 0 or restarts > 4 * wanted + 4:
            break
    ray.shutdown()
    alone = RayAlone(payload(0.0, 0.0, folder / "whole"))
    with started(alone, TRIALS_KILLED, "nsga2") as whole:
        whole.run(alone)
    same = [essence(t) for t in whole.trials] == [essence(t) for t in journal.read(folder).trials]
    return {"kills_driver": done["driver"], "kills_worker": done["worker"], "kills_lost": lost, "kills_same_search": float(same)}


def _kill(worker: int) -> bool:
    """Kill a worker; False if it is gone already."""
    try:
        if b"ray::" not in Path(f"/proc/{worker}/cmdline").read_bytes():
            return False
        os.kill(worker, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


class RayAlone(Inline):
    """In this process, but with as many trials under way as two Ray workers have."""

    def __init__(self, payload: Payload) -> None:
        super().__init__(Sleeper, payload)
        self.slots = 4


def essence(trial: Trial) -> tuple[Any, ...]:
    return trial.number, trial.policy, trial.cost, trial.score, trial.feasible, trial.failed


def _told(folder: Path) -> set[bytes]:
    """The finished lines of a journal."""
    path = folder / "trials.jsonl"
    return set(path.read_bytes().split(b"\n")[:-1]) if path.exists() else set()


def _lines(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="8 workers and 10 kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--only", choices=("idle", "throughput", "kills"))
    given = parser.parse_args()
    workers, wanted = (8, 10) if given.quick else (given.workers, given.kills)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    figures: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only in (None, "idle"):
            share, driver = idle(folder, 60, 0.4)
            figures |= {"ray_idle_2": (share, "%"), "ray_driver_2": (driver, "ms a trial")}
        if given.only in (None, "throughput"):
            one, _ = throughput(folder, 1, 6, 2.0)
            many, driver = throughput(folder, workers, 6, 2.0)
            figures |= {f"ray_speedup_{workers}": (many / one, "1"), f"ray_driver_{workers}": (driver, "ms a trial")}
        if given.only in (None, "kills"):
            found = kills(folder / "kills", wanted)
            figures |= {key: (value, "1") for key, value in found.items()}
    for key, (value, unit) in figures.items():
        print(f"{key:24} {value:10.3f} {unit}")
    if given.json:
        rows = [{"name": key, "value": value, "unit": unit} for key, (value, unit) in figures.items()]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
