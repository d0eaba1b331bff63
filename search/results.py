"""What the trials of a search come to: the front, the best, how much of the budget is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tightrope.search import pareto
from tightrope.search.journal import Header
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Limits
from tightrope.spaces.cost import METRICS
from tightrope.spaces.network import Network

if TYPE_CHECKING:
    import pandas as pd


class Results:
    """Trials under a header; of a running study or read from a journal (`Results(record.header, record.trials)`)."""

    def __init__(self, header: Header, trials: Sequence[Trial]) -> None:
        self.header = header
        self._trials = trials

    @property
    def trials(self) -> Sequence[Trial]:
        return self._trials

    @property
    def metric(self) -> str:
        """The cost that is traded against the score: the first that is limited, or the latency."""
        return self.header.limits[0][0] if self.header.limits and self.header.floor is None else "latency_ms"

    def price(self, trial: Trial) -> float:
        """The traded cost of a trial as a share of the dense model's."""
        return (trial.cost.metric(self.metric) or 0.0) / (self.header.dense_cost.metric(self.metric) or 1.0)

    @property
    def complete(self) -> list[Trial]:
        """The trials that were not given up early."""
        return [t for t in self.trials if t.score is None or t.score.count >= self.header.dense_score.count]

    @property
    def front(self) -> list[Trial]:
        """The trials that no other beats in both traded cost and score, from cheapest to dearest."""
        return pareto.front(self.complete, self.price)

    @property
    def best(self) -> Trial | None:
        """The trial to take (see `pareto.best`); None where none is feasible."""
        return pareto.best(self.complete, self.price, least_cost=self.header.floor is not None)

    @property
    def budget_use(self) -> float | None:
        """Cost over budget of the best trial, the largest over all limits; None without either."""
        best = self.best
        return None if best is None or not self.header.limits else Limits(self.header.limits).use(best.cost)

    @property
    def hypervolume(self) -> float:
        """Area that the trials dominate, from 0 to about 1.

        The reference point is the limit of the traded metric (the dense cost where it has none) and the score half of dense
        below dense; both axes are divided by their length, so that the dense score at no cost makes 1.
        """
        dense = self.header.dense_score.value
        length = 0.5 * abs(dense) or 1.0
        top = dict(self.header.limits).get(self.metric)
        most = 1.0 if top is None else top / (self.header.dense_cost.metric(self.metric) or top)
        scored = [(self.price(t) / most, (t.score.value - dense) / length) for t in self.complete if t.score is not None]
        return pareto.hypervolume([c for c, _ in scored], [s for _, s in scored], (1.0, -1.0))

    def frame(self, network: Network) -> pd.DataFrame:
        """One row a trial: number, feasible, score, its standard error, every cost, `channels:GROUP`, `rank:LAYER`, ..."""
        import pandas as pd

        return pd.DataFrame([_row(trial, network) for trial in self.trials])


def _row(trial: Trial, network: Network) -> dict[str, Any]:
    score = trial.score
    row: dict[str, Any] = {
        "number": trial.number, "feasible": trial.feasible, "score": None if score is None else score.value,
        "stderr": None if score is None else score.stderr, **{m: trial.cost.metric(m) for m in METRICS},
        "failed": trial.failed, "cpu_seconds": trial.cpu_seconds,
    }  # fmt: skip
    row |= {f"channels:{group}": width for group, width in trial.policy.all_widths(network).items()}
    for layer in network.layers:
        choice = trial.policy.choice(layer.name)
        row |= {f"weight_bits:{layer.name}": choice.weight_bits, f"act_bits:{layer.name}": choice.act_bits}
        row[f"rank:{layer.name}"] = choice.rank
    return row
