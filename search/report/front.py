"""The front of a finished or running search, ready to be written down: rows for tables, and files."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tightrope.search import journal, pareto
from tightrope.search.journal import Control, Final, Record
from tightrope.search.results import Results
from tightrope.search.trial import Trial
from tightrope.spaces.cost import METRICS, Cost
from tightrope.spaces.errors import RunError
from tightrope.spaces.policy import write_atomically

UNITS = {"latency_ms": "ms", "energy_mj": "mJ", "size_bytes": "B", "peak_ram_bytes": "B", "macs": ""}
WORDS = {"latency_ms": "latency", "energy_mj": "energy", "size_bytes": "size", "peak_ram_bytes": "peak RAM", "macs": "MACs"}


@dataclass(frozen=True)
class Front:
    """What a journal says of its front. `metric` is the cost that is traded against the score."""

    record: Record
    metric: str

    @staticmethod
    def load(run: Path, metric: str | None = None) -> "Front":
        """Read the journal of a run folder; the metric is the first that the budget limits, or else the latency."""
        record = journal.read(run)
        header = record.header
        limited = next((name for name, _ in header.limits), "latency_ms") if header.floor is None else "latency_ms"
        metric = metric or limited
        if metric not in METRICS:
            raise RunError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if not header.dense_cost.metric(metric):
            raise RunError(f"device {header.device!r} tells no {metric}, so there is no front over it")
        return Front(record, metric)

    def price(self, cost: Cost) -> float:
        """The traded cost as a share of the dense model's; infinite where the device did not tell it."""
        value, whole = cost.metric(self.metric), self.record.header.dense_cost.metric(self.metric)
        return float("inf") if value is None or not whole else value / whole

    @cached_property
    def complete(self) -> list[Trial]:
        """The trials that were not given up early, which alone stand on fronts."""
        return Results(self.record.header, self.record.trials).complete

    @cached_property
    def trials(self) -> list[Trial]:
        """The trials of the front, from cheapest to best."""
        return pareto.front(self.complete, lambda t: self.price(t.cost))

    @cached_property
    def best(self) -> Trial | None:
        """The trial to take."""
        return pareto.best(self.complete, lambda t: self.price(t.cost), least_cost=self.record.header.floor is not None)

    @cached_property
    def finals(self) -> dict[int, Final]:
        """What became of trials at the end, by their numbers."""
        return {final.number: final for final in self.record.finals}

    @property
    def controls(self) -> list[Control]:
        """The dense model and the other controls; of several with one name, the best score."""
        header = self.record.header
        found = {"dense": Control("dense", header.dense, header.dense_cost, header.dense_score)}
        for control in self.record.controls:
            known = found.get(control.name)
            if known is None or control.name == "dense" or control.score.value > known.score.value:
                found[control.name] = control
        return list(found.values())

    @property
    def limit(self) -> float | None:
        """The budget's limit of the traded cost, as a share of the dense model's."""
        top, whole = dict(self.record.header.limits).get(self.metric), self.record.header.dense_cost.metric(self.metric)
        return None if top is None or not whole else top / whole

    @property
    def score_name(self) -> str:
        """The score in words."""
        metric = self.record.header.metric
        return "top-1 accuracy (%)" if metric == "top1" else metric


def write_csv(run: Path, file: Path) -> None:
    """Write the front, one row a trial, from cheapest to best; costs as in the journal, in the units that their names say."""
    front = Front.load(run)
    out = io.StringIO()
    names = [name for name in METRICS if front.record.header.dense_cost.metric(name) is not None]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["number", "agent", "best", "feasible", "score", "stderr", "scored_on", "score_to_dense", *names, "cost_to_dense",
         "latency_low_ms", "latency_high_ms", "simulated", "final_score", "final_stderr", "measured_ratio", "measured_low",
         "measured_high"]
    )  # fmt: skip
    for trial in front.trials:
        writer.writerow(_row(front, trial, names))
    write_atomically(file, out.getvalue())


def _row(front: Front, trial: Trial, names: Sequence[str]) -> list[object]:
    assert trial.score is not None
    low, high = trial.cost.interval_ms or (None, None)
    final = front.finals.get(trial.number)
    tuned = [None, None] if final is None else [final.score.value, final.score.stderr]
    measured = final.measured if final and final.measured else (None, None, None)
    dense = front.record.header.dense_score.value
    return [
        trial.number, trial.agent, int(front.best == trial), int(trial.feasible), trial.score.value, trial.score.stderr,
        trial.score.count, round(trial.score.value - dense, 6), *(trial.cost.metric(name) for name in names),
        round(front.price(trial.cost), 6), low, high, int(trial.cost.simulated), *tuned, *measured,
    ]  # fmt: skip


def amount(metric: str, value: float | None) -> str:
    """A cost in words, in the unit in which it reads best."""
    if value is None:
        return "–"
    steps = {
        "latency_ms": [("µs", 1e-3), ("ms", 1.0), ("s", 1e3)], "energy_mj": [("µJ", 1e-3), ("mJ", 1.0), ("J", 1e3)],
        "size_bytes": [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)],
        "peak_ram_bytes": [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)],
        "macs": [("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)],
    }[metric]  # fmt: skip
    unit, size = next((step for step in reversed(steps) if abs(value) >= step[1]), steps[0])
    return f"{value / size:.4g} {unit}".rstrip()
