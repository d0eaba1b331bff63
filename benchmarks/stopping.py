"""What giving up hopeless trials saves a search, and what it costs it.

    python -m benchmarks.stopping [--json FILE] [--quick] [--error 0.05] [--agent auto] [--seeds 3] [--trials 100]
        [--net NET]

Each search runs twice, with `stopping` off and at the error given, from the same seed: the demo net under a quarter of its latency
and the harder task's residual net under 0.3x, both on `ort-cpu`, in this process. Given are the examples scored and the CPU time
of scoring (compressing and writing the graph included) as a share of the search that gives nothing up; how many of those given
up would have been no worse than what they were held against, had they been scored whole; and, paired by seed, the score of the
best on the search split and on one that the search does not see, and the hypervolume. Intervals are 95 % by Student's t.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import tasks
from tightrope.search import config as configs
from tightrope.search import demo_task
from tightrope.search.distribute import Inline
from tightrope.search.evaluate import OrtEvaluator, evaluator_for
from tightrope.search.session import Setting, set_up
from tightrope.search.stopping import Rival, Scored
from tightrope.search.study import Study
from tightrope.search.task import Task
from tightrope.spaces import Budget, Policy, Score

BUDGETS = {"demo": "latency<=0.25x", "residual": "latency<=0.3x"}


def task_of(net: str) -> Task:
    """A net with its splits; `test` is what the search does not see."""
    if net == "demo":
        data, model = demo_task.splits(), demo_task.build(0, lambda *_: None)
        return Task(model, data["search"][0][0][:1], data["calibration"], data["search"], data["test"])
    data, model = tasks.splits(), tasks.trained(net)
    return Task(model, data["calibration"][0][0][:1], data["calibration"], data["search"], data["second"])


@dataclass
class Watched:
    """An evaluator that scores what is given up whole too, beside the search, to see whether it was hopeless."""

    inner: Any
    examples: int = 0
    seconds: float = 0.0
    given_up: int = 0
    wrongly: int = 0

    def evaluate(self, policy: Policy) -> Score:
        return self.compare(policy, None)[0]

    def compare(self, policy: Policy, rival: Rival | None) -> Scored:
        start = time.process_time()
        score, right = self.inner.compare(policy, rival)
        self.seconds += time.process_time() - start
        self.examples += score.count
        if rival is not None and right is None:
            whole = self.inner.compare(policy, None)[1]
            self.given_up += 1
            self.wrongly += ones(whole) >= ones(rival.right)
        return score, right


def ones(right: bytes) -> int:
    return int(np.unpackbits(np.frombuffer(right, np.uint8)).sum())


@dataclass(frozen=True)
class Result:
    """One search; scores in percent."""

    examples: int
    seconds: float
    given_up: int
    wrongly: int
    search: float
    unseen: float
    hypervolume: float


def run(
    setting: Setting, net: str, evaluator: OrtEvaluator, unseen: OrtEvaluator, agent: str, seed: int, trials: int, error: float
) -> Result:
    """One search in this process."""
    watched = Watched(evaluator)
    executor = Inline(lambda payload: watched)
    with Study.start(
        setting.space, setting.device, Budget.parse(BUDGETS[net]), executor, agent=agent, trials=trials, seed=seed, stopping=error
    ) as study:
        study.run(executor)
    best = study.best
    assert best is not None and best.score is not None
    return Result(
        watched.examples, watched.seconds, watched.given_up, watched.wrongly, best.score.value, unseen.evaluate(best.policy).value,
        study.hypervolume,
    )  # fmt: skip


def spread(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the demo net, two seeds, 40 trials")
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--agent", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--net", choices=[*BUDGETS], action="append")
    given = parser.parse_args()
    nets, seeds, trials = (["demo"], 2, 40) if given.quick else (given.net or [*BUDGETS], given.seeds, given.trials)
    figures: dict[str, tuple[float, str]] = {}
    for net in nets:
        task = task_of(net)
        setting = set_up(task, configs.make({"device": "ort-cpu", "budget": BUDGETS[net]}))
        evaluator, unseen = evaluator_for(setting.source, task), OrtEvaluator(setting.source, task, "test")
        assert isinstance(evaluator, OrtEvaluator)
        pairs = [
            tuple(run(setting, net, evaluator, unseen, given.agent, seed, trials, error) for error in (0.0, given.error))
            for seed in range(seeds)
        ]
        whole, short = (list(found) for found in zip(*pairs, strict=True))
        name = f"stopping_{net}"
        figures |= {
            f"{name}_examples": (sum(r.examples for r in short) / sum(r.examples for r in whole), "1"),
            f"{name}_cpu": (sum(r.seconds for r in short) / sum(r.seconds for r in whole), "1"),
            f"{name}_given_up": (sum(r.given_up for r in short) / (trials * seeds), "1"),
            f"{name}_wrongly": (sum(r.wrongly for r in short), f"of {sum(r.given_up for r in short)}"),
        }
        for key in ("search", "unseen", "hypervolume"):
            mean, half = spread([getattr(b, key) - getattr(a, key) for a, b in pairs])
            unit = "1" if key == "hypervolume" else "points"
            figures |= {f"{name}_{key}": (mean, unit), f"{name}_{key}_half": (half, unit)}
    for key, (value, unit) in figures.items():
        print(f"{key:32} {value:9.4f} {unit}")
    if given.json:
        rows = [{"name": key, "value": value, "unit": unit} for key, (value, unit) in figures.items()]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
