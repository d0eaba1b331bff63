"""What a search writes for TensorBoard's own panels, into its run folder.

Scalars over trials, in groups: `best/` (the policy to take so far), `front/`, `trial/` (each as it came), `agent/` (what
its learning says), `speed/`. At the end: histograms and HParams of the front, and the report as text. Beside the event
files, `layers.jsonl` keeps the latency of each layer under the policies of the front, which the Pareto tab shows.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tightrope.search.report.runs import SHARES, policy_key
from tightrope.spaces.errors import TightropeError
from tightrope.spaces.network import Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import lower

if TYPE_CHECKING:
    from tightrope.search.study import Study
    from tightrope.search.trial import Trial

_log = logging.getLogger(__name__)
MOST_HPARAMS = 20  # runs of the HParams panel
_WINDOW = 20  # trials over which the speed is taken
_COSTS = ("latency_ms", "energy_mj", "size_bytes", "peak_ram_bytes", "macs")


class Board:
    """Writes event files. Give it to `Study.run(on_trial=[board])`, and call `finish` when the front is final."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir
        self._writers: dict[str, Any] = {}
        self._broken = False
        self._shared: set[str] = set()
        self._times: deque[float] = deque([time.monotonic()], maxlen=_WINDOW + 1)
        self._front: list[tuple[float, float]] = []  # price and score, none beaten by another
        self._volume: float | None = None

    def __call__(self, trial: "Trial", study: "Study") -> None:
        """Write the scalars of a trial that has just finished."""
        self._times.append(time.monotonic())
        values: dict[str, float | None] = {f"trial/{metric}": trial.cost.metric(metric) for metric in _COSTS}
        values["trial/cpu_seconds"] = trial.cpu_seconds
        values["trial/within_budget"] = float(trial.feasible)
        if trial.score is not None:
            values["trial/score"] = trial.score.value
        values |= self._of_front(trial, study) | self._of_best(study)
        values |= {f"agent/{name}": value for name, value in study.agent.losses().items()}
        values["speed/trials_per_second"] = (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
        self.scalars(values, step=trial.number, when=trial.time or None)

    def _of_front(self, trial: "Trial", study: "Study") -> dict[str, float | None]:
        """The hypervolume, worked out anew only where the trial moves the front."""
        if trial.score is not None and trial.score.count >= study.header.dense_score.count:
            point = (study.price(trial), trial.score.value)
            if self._volume is None:  # the first trial, perhaps of a search that was resumed
                for t in study.front:
                    self._share(study, t.policy)
                self._front = [(study.price(t), t.score.value) for t in study.front if t.score is not None]
                self._volume = study.hypervolume
            elif not any(cost <= point[0] and score >= point[1] for cost, score in self._front):
                self._front = [p for p in self._front if p[0] < point[0] or p[1] > point[1]] + [point]
                self._volume = study.hypervolume
                self._share(study, trial.policy)
        return {"front/hypervolume": self._volume, "front/points": float(len(self._front))}

    @staticmethod
    def _of_best(study: "Study") -> dict[str, float | None]:
        best = study.best
        if best is None or best.score is None:
            return {}
        costs = {f"best/{metric}": best.cost.metric(metric) for metric in _COSTS}
        return {
            "best/score_under_budget": best.score.value, "best/score_to_dense": best.score.value - study.header.dense_score.value,
            "best/cost_to_dense": study.price(best), "best/budget_use": study.budget_use, **costs,
        }  # fmt: skip

    def scalars(self, values: Mapping[str, float | None], *, step: int, when: float | None = None) -> None:
        """Write the numbers that are there."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for tag, value in values.items():
            if value is not None:
                self._write("", scalar_pb(tag, float(value)), step, when)

    def text(self, tag: str, markdown: str, *, step: int = 0) -> None:
        """Write text for the Text panel; Markdown is shown as such."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write("", text_pb(tag, markdown), step)

    def finish(self, study: "Study", report: str = "") -> None:
        """Write what is known at the end: histograms and HParams of the front, and the report (Markdown)."""
        front = study.front
        for policy in (study.header.dense, *(control.policy for control in study.controls), *(trial.policy for trial in front)):
            self._share(study, policy)
        self._histograms(study.problem.network, front)
        self._hparams(study, _spread(front, MOST_HPARAMS))
        if report:
            self.text("report", report)
        self.flush()

    def _histograms(self, network: Network, front: Sequence["Trial"]) -> None:
        """Bits and channels of all layers; the step counts the front from cheapest to best."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        for step, trial in enumerate(front):
            widths = trial.policy.all_widths(network)
            found = {
                "weight_bits": [trial.policy.choice(x.name).weight_bits for x in network.layers],
                "act_bits": [trial.policy.choice(x.name).act_bits for x in network.layers],
                "channels_kept": [widths[g.name] / g.width for g in network.groups],
            }
            for name, values in found.items():
                if values:
                    self._write("", histogram_pb(f"policy_over_front/{name}", values), step, trial.time or None)

    def _hparams(self, study: "Study", front: Sequence["Trial"]) -> None:
        """One session for each trial of the front, in a folder of its own below the run's."""
        from tensorboard.plugins.hparams import summary_v2 as api

        if not front:
            return
        metric = study.problem.metric
        names = {"score": "score", "score_to_dense": "score to dense", "cost_to_dense": f"{metric} to dense", metric: metric,
                 "size_bytes": "size_bytes", "macs": "macs"}  # fmt: skip
        settings = [summary(study.problem.network, trial.policy) | {"trial": trial.number, "agent": trial.agent} for trial in front]
        config = api.hparams_config_pb(
            hparams=[api.HParam(name) for name in settings[0]],
            metrics=[api.Metric(f"hparams/{tag}", display_name=shown) for tag, shown in names.items()],
        )
        self._write("hparams", config, 0)
        dense = study.header.dense_score.value
        for trial, values in zip(front, settings, strict=True):
            if trial.score is None:
                continue
            where = f"hparams/trial-{trial.number}"
            self._write(where, api.hparams_pb(values, trial_id=f"{self._folder.name}/{trial.number}"), 0)
            found: dict[str, float | None] = {
                "score": trial.score.value, "score_to_dense": trial.score.value - dense, "cost_to_dense": study.price(trial),
                metric: trial.cost.metric(metric), "size_bytes": trial.cost.size_bytes, "macs": trial.cost.macs,
            }  # fmt: skip
            from tensorboard.plugins.scalar.summary_v2 import scalar_pb

            for tag, value in found.items():
                if value is not None:
                    self._write(where, scalar_pb(f"hparams/{tag}", float(value)), 0, trial.time or None)

    def _share(self, study: "Study", policy: Policy) -> None:
        """Keep the latency of each layer under a policy, for the Pareto tab."""
        key = policy_key(policy.to_json())
        if key in self._shared or self._broken:
            return
        self._shared.add(key)
        try:
            found: dict[str, float] = {}
            for unit in study.problem.device.estimate(study.problem.network, policy).units:
                found[unit.layer] = found.get(unit.layer, 0.0) + unit.latency_ms
            if found:
                self._folder.mkdir(parents=True, exist_ok=True)
                with (self._folder / SHARES).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"policy": key, "latency_ms": found}) + "\n")
        except (TightropeError, OSError) as error:
            _log.warning("no latency by layer is kept for policy %s: %s", key, error)

    def _write(self, where: str, summary: Any, step: int, when: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._broken:
            return
        try:
            if where not in self._writers:
                self._writers[where] = EventFileWriter(str(self._folder / where), flush_secs=5)
            self._writers[where].add_event(Event(wall_time=when or time.time(), step=step, summary=summary))
        except OSError as error:  # a full disk; the search goes on without
            self._broken = True
            _log.warning("nothing more is written for TensorBoard: %s", error)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        for writer in self._writers.values() if not self._broken else ():
            writer.flush()

    def close(self) -> None:
        """End the files."""
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()
        self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def summary(network: Network, policy: Policy) -> dict[str, float]:
    """A policy in a few numbers: mean bits (over weights, over MACs), share of channels kept, layers of low rank."""
    units = lower(network, policy)
    widths = policy.all_widths(network)
    weights, macs = sum(u.weights for u in units), sum(u.macs for u in units)
    kept = [widths[g.name] / g.width for g in network.groups]
    return {
        "mean_weight_bits": round(sum(u.weights * u.weight_bits for u in units) / max(weights, 1), 3),
        "mean_act_bits": round(sum(u.macs * u.act_bits for u in units) / max(macs, 1), 3),
        "channels_kept": round(sum(kept) / len(kept), 4) if kept else 1.0,
        "low_rank_layers": float(sum(policy.choice(x.name).rank is not None for x in network.layers)),
        "weights_kept": round(weights / max(1, sum(_weights(network))), 4),
    }


def _weights(network: Network) -> list[int]:
    """Weights of each layer of the dense model."""
    return [u.out_channels * (u.in_channels // u.groups) * prod(u.kernel) for u in lower(network, Policy(network.fingerprint))]


def _spread(front: Sequence["Trial"], most: int) -> list["Trial"]:
    """At most so many of a front, both ends among them, at even distances."""
    if len(front) <= most:
        return list(front)
    return [front[round(i * (len(front) - 1) / (most - 1))] for i in range(most)]
