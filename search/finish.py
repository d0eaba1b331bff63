"""The end of a run: controls, fine-tuning, export, measurement, the test split, the report."""

import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightrope.search.distribute import Executor
from tightrope.search.edge import ROUNDS, timed
from tightrope.search.evaluate import score_module
from tightrope.search.journal import Control, Final
from tightrope.search.pareto import ties
from tightrope.search.study import Study, allowed
from tightrope.search.trial import Trial
from tightrope.spaces.budget import Budget, Limits
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.errors import ExportError
from tightrope.spaces.policy import Policy, write_atomically

if TYPE_CHECKING:
    from torch import fx

    from tightrope.search.session import Setting

log = logging.getLogger(__name__)
TIMED_FOR_ONE, MOST_TIMED = 8, 64  # trials timed at once, and at most, for each that is fine-tuned
RECIPE_SHARE, INT8 = 0.5, (8, 8)  # the hand recipe: half of the channels everywhere, fine-tune, int8


@dataclass
class Row:
    """One line of the report: the dense model, a control or the best.

    `search` and `test` are scores after fine-tuning, of the exported graph where there is one. `measured` is the latency as a
    ratio to dense with the ends of its 90 % interval, timed in the same interleaved rounds; None on simulated devices.
    """

    name: str
    policy: Policy
    cost: Cost
    found: Score
    search: Score
    test: Score | None = None
    measured: tuple[float, float, float] | None = None
    within_budget: bool = True
    trial: int | None = None
    module: "fx.GraphModule | None" = None


@dataclass
class Report:
    """What a run came to; `to_json` and `markdown` are what stands in `best/`."""

    name: str
    device: str
    simulated: bool
    metric: str
    budget: tuple[str, ...]
    rows: list[Row]
    remarks: list[str]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        return next((row for row in self.rows if row.name == "best"), None)

    def to_json(self) -> dict[str, Any]:
        dense = self.rows[0].cost
        return {
            "version": 1, "name": self.name, "device": self.device, "simulated": self.simulated, "metric": self.metric,
            "budget": [*self.budget], "remarks": self.remarks, **self.about,
            "rows": [
                {
                    "name": r.name, "trial": r.trial, "policy": r.policy.to_json(), "cost": r.cost.to_json(),
                    "latency_ratio_predicted": r.cost.latency_ms / dense.latency_ms,
                    "latency_ratio_measured": r.measured and dict(zip(("ratio", "low", "high"), r.measured, strict=True)),
                    "score_in_search": r.found.to_json(), "score_search": r.search.to_json(),
                    "score_test": None if r.test is None else r.test.to_json(), "within_budget": r.within_budget,
                }
                for r in self.rows
            ],
        }  # fmt: skip

    def cells(self) -> list[list[str]]:
        """The table of the report as text, its header first."""
        dense = self.rows[0].cost
        energy = dense.energy_mj is not None
        latency = f"latency, simulated {self.device}" if self.simulated else "latency, measured"
        head = [
            "",
            f"{self.metric} on test",
            f"{self.metric} on search",
            latency,
            "predicted",
            *(["energy"] if energy else []),
            "size",
            "budget",
        ]
        lines = [head]
        for row in self.rows:
            ratio = row.cost.latency_ms / dense.latency_ms
            shown = (
                f"{ratio:.3f}x" if row.measured is None else f"{row.measured[0]:.3f}x ({row.measured[1]:.3f}-{row.measured[2]:.3f})"
            )
            lines.append([
                row.name, "-" if row.test is None else points(row.test), points(row.search), shown, f"{ratio:.3f}x",
                *([f"{(row.cost.energy_mj or 0) / (dense.energy_mj or 1):.3f}x"] if energy else []),
                f"{row.cost.size_bytes / 1000:.1f} KB", "met" if row.within_budget else "-" if row.name == "dense" else "missed",
            ])  # fmt: skip
        return lines

    def markdown(self) -> str:
        """The report as Markdown."""
        head, *body = self.cells()
        table = [head, ["---"] * len(head), *body]
        lines = [
            f"# {self.name}",
            "",
            f"Device {self.device}{' (simulated)' if self.simulated else ''}; budget {', '.join(self.budget)}.",
            "",
        ]
        lines += ["| " + " | ".join(cells) + " |" for cells in table]
        lines += ["", *(f"- {remark}" for remark in self.remarks)]
        seconds = self.about.get("seconds", {})
        lines += ["", "| phase | wall s | CPU s |", "| --- | --- | --- |"]
        lines += [f"| {phase} | {wall:.1f} | {cpu:.1f} |" for phase, (wall, cpu) in seconds.items()]
        return "\n".join(lines) + "\n"


def points(score: Score) -> str:
    return f"{score.value:.2f} ± {score.stderr:.2f}"


def finish(study: Study, setting: "Setting", workers: Executor, folder: Path) -> Report:
    """Make the report of a search, and the files of `best/`.

    The best few of the front and all controls are recalibrated and fine-tuned alike (with several workers on Ray, which scores
    nothing more) and scored on the search split; of the best few those stop early that fall behind (`search/tuning.py`), and all
    go on behind their last epoch after a kill. The best of them is measured, interleaved with the dense model; if it misses the
    latency budget, the next takes its place. Then the test split is used, once.
    """
    from tightrope.compressors.compress import compress
    from tightrope.search.session import TUNING, tuned

    progress, config = setting.progress, setting.config
    remarks: list[str] = []
    rows = [_dense(study)]
    if config.controls:
        progress.phase("controls")
        rows += _controls(study, setting, workers)
    candidates = _candidates(study, setting, config.finetune.candidates, remarks)
    rows += [Row("best", t.policy, t.cost, t.score, t.score, trial=t.number) for t in candidates if t.score is not None]
    if not candidates:
        remarks.append("no trial met the budget; there is no best policy")
    searched, tested = _scorer(setting, "search"), _scorer(setting, "test")
    unique: dict[Policy, Row] = {}
    for row in rows[1:]:
        unique.setdefault(row.policy, row)
    progress.phase("fine-tune" if config.finetune.epochs and setting.task.has("train") else "recalibrate")
    for row in unique.values():
        row.module = compress(None, row.policy, setting.prepared)
    made = {_label(row): row.module for row in unique.values() if row.module is not None}
    halve = [_label(row) for row in unique.values() if row.name == "best"]  # controls are trained to the end
    workers.release()  # whose cores and memory training needs
    tuned(made, setting.task, config, progress, folder / TUNING, halve=halve, workers=config.workers if config.workers > 1 else 0)
    for row in unique.values():
        assert row.module is not None
        row.search = searched(row.module)
    for row in rows[1:]:
        row.module, row.search = unique[row.policy].module, unique[row.policy].search
    progress.phase("measure")
    _measure(rows, study, setting, remarks)
    best = _choose(rows, study, remarks)
    rows = [row for row in rows if row.name != "best" or row is best]
    progress.phase("test")
    if setting.task.has("test"):
        rows[0].test = score_module(setting.task.model.eval(), setting.task.split("test"), setting.task.measure)
        for row in rows[1:]:
            assert row.module is not None
            row.test = tested(row.module)
    for row in rows:
        if row.name != "best":
            study.add(Control(row.name, row.policy, row.cost, row.found))
    progress.close()
    report = Report(
        study.header.name, study.header.device, study.header.simulated, study.header.metric, study.header.budget, rows, remarks,
        _about(study, setting),
    )  # fmt: skip
    _write(report, best, setting, folder)
    shutil.rmtree(folder / TUNING, ignore_errors=True)
    return report


def _scorer(setting: "Setting", split: str) -> Callable[["fx.GraphModule"], Score]:
    """Scores fine-tuned modules on a split: what they export to, or the modules where there is nothing."""
    made: list[Any] = []

    def score(module: "fx.GraphModule") -> Score:
        try:
            if not made:
                made.append(setting.source.evaluator(setting.task, split))
            found: Score = made[0].score_tuned(module)
            return found
        except ExportError:
            return score_module(module, setting.task.split(split), setting.task.measure)

    return score


def _dense(study: Study) -> Row:
    header = study.header
    return Row("dense", header.dense, header.dense_cost, header.dense_score, header.dense_score, within_budget=False)


def _controls(study: Study, setting: "Setting", workers: Executor) -> list[Row]:
    """Uniform within the budget, the best of as many random trials as the search had, and the hand recipe."""
    problem, rows = study.problem, []
    for agent, trials in (("uniform", 3), ("random", len(study.trials))):
        if agent != study.header.agent:
            rows += _rival(study, setting, workers, agent, trials)
    recipe = setting.space.uniform(RECIPE_SHARE, INT8)
    cost = problem.cost(recipe)
    workers.submit(0, recipe)
    score = workers.next().score
    if score is not None:
        rows.append(Row("recipe", recipe, cost, score, score, within_budget=problem.meets(score, cost)))
    return rows


def _rival(study: Study, setting: "Setting", workers: Executor, agent: str, trials: int) -> list[Row]:
    """The best of another agent under the same budget, in memory only."""
    header, progress = study.header, setting.progress
    other = Study.start(
        setting.space, setting.device, Budget.parse(header.budget), workers, name=agent, agent=agent, trials=trials,
        seed=header.seed + 1_000_003, metric=header.metric, stopping=header.stopping, hold=lambda _: study.problem.limits,
    )  # fmt: skip
    other.run(workers, on_trial=[lambda trial, _: progress.step(trial.number + 1, trials, agent)])
    best = other.best
    return [] if best is None or best.score is None else [Row(agent, best.policy, best.cost, best.score, best.score)]


def _candidates(study: Study, setting: "Setting", count: int, remarks: list[str]) -> list[Trial]:
    """Feasible trials to fine-tune, the best first: those of the front, then others if it is short."""
    problem = study.problem
    feasible = [t for t in study.complete if t.feasible and t.score is not None]
    ranked = sorted(feasible, key=lambda t: (-problem.value(t.score, t.cost), study.price(t)))  # type: ignore[arg-type]
    found: dict[Policy, Trial] = {}
    for trial in ranked:
        found.setdefault(trial.policy, trial)
    return _in_time(list(found.values()), study, setting, count, remarks)


def _in_time(trials: list[Trial], study: Study, setting: "Setting", count: int, remarks: list[str]) -> list[Trial]:
    """The first `count` trials whose files meet the latency budget when measured, filled up with others if they are too few.

    The upper end of the interval is what must meet it, so that they do when they are measured again. They are timed before
    fine-tuning, which does not change it, some at a time and no more than needed.
    """
    most = dict(_allowed(study).top).get("latency_ms")
    if most is None or not setting.measured:
        return trials[:count]
    kept: list[Trial] = []
    slow: list[Trial] = []
    for start in range(0, min(len(trials), MOST_TIMED * count), TIMED_FOR_ONE * count):
        part = trials[start : start + TIMED_FOR_ONE * count]
        measured = timed([t.policy for t in part], study.header.dense, setting)
        for trial, (_, _, high) in zip(part, measured, strict=True):
            (kept if high <= most / study.header.dense_cost.latency_ms else slow).append(trial)
        if len(kept) >= count:
            break
    if slow:
        remarks.append(
            f"{len(slow)} of the {len(slow) + len(kept)} best trials missed the latency budget when measured, before fine-tuning"
        )
    return [*kept, *slow][:count]


def _allowed(study: Study) -> Limits:
    """What may be used in the end; the search may have been held to less latency (`search/edge.py`)."""
    return allowed(Budget.parse(study.header.budget), study.problem.device, study.header.dense_cost)


def _label(row: Row) -> str:
    return row.name if row.trial is None else f"{row.name} {row.trial}"


def _measure(rows: list[Row], study: Study, setting: "Setting", remarks: list[str]) -> None:
    """Time all rows against the dense model, interleaved; nothing on a simulated device."""
    if not setting.measured:
        remarks.append(f"latency and energy are those of the model of {study.header.device}: simulated, not measured")
        return
    from tightrope.compressors.assemble import assemble
    from tightrope.compressors.compress import payload_of
    from tightrope.estimators.measured.clock import ratios

    payloads = {"dense": assemble(setting.prepared, rows[0].policy)}
    for number, row in enumerate(rows[1:], 1):
        assert row.module is not None
        payloads[str(number)] = payload_of(row.module)
    files = {name: setting.source.timed(payload, setting.device.batch) for name, payload in payloads.items()}
    measured = ratios(files, "dense", rounds=ROUNDS, seed=setting.config.seed)
    rows[0].measured = measured["dense"]
    limits = dict(_allowed(study).top)
    most = limits.pop("latency_ms", math.inf) / study.header.dense_cost.latency_ms
    judge = replace(study.problem, limits=Limits(tuple(limits.items())))  # of all that no clock tells
    for number, row in enumerate(rows[1:], 1):
        row.measured = measured[str(number)]
        row.within_budget = judge.meets(row.search, row.cost) and row.measured[0] <= most
    remarks.append("measured: ratio to dense in the same interleaved rounds, one thread, CPU time, 90 % interval")


def _choose(rows: list[Row], study: Study, remarks: list[str]) -> Row | None:
    """The best candidate that meets the budget as measured; of equal ones the cheaper. What is cheaper and ties is remarked."""
    candidates = [row for row in rows if row.name == "best"]
    for row in candidates:
        study.add(Final(row.trial or 0, row.search, row.cost, row.measured))
    fit = [row for row in candidates if row.within_budget]
    remarks += [
        f"trial {row.trial} missed the budget when measured ({row.measured[0]:.3f}x)" + ("; the next took its place" if fit else "")
        for row in candidates
        if not row.within_budget and row.measured is not None
    ]
    if not fit:
        if candidates:
            remarks.append("no candidate met the budget when measured; the best of them is shown all the same")
            return max(candidates, key=lambda row: row.search.value)
        return None
    if study.header.floor is not None:
        return min(fit, key=lambda row: study.problem.price(row.cost))
    top = max(fit, key=lambda row: (row.search.value, -row.cost.latency_ms))
    cheaper = ties(study.complete, next(t for t in study.trials if t.number == top.trial), study.price)
    if cheaper:
        least = cheaper[0]
        remarks.append(
            f"trial {least.number}, at {study.price(least):.3f}x, scored within the standard error of the best before fine-tuning: "
            f"`tightrope export RUN --trial {least.number}` makes it"
        )
    return top


def _about(study: Study, setting: "Setting") -> dict[str, Any]:
    from importlib.metadata import version

    names = ("torch", "onnx", "onnxruntime", "optuna", "ray", "numpy")
    return {
        "agent": study.header.agent, "seed": study.header.seed, "trials": len(study.trials), "hypervolume": study.hypervolume,
        "budget_use": study.budget_use, "seconds": setting.progress.seconds, "finished": time.time(),
        "machine": f"{platform.machine()} {platform.system()}", "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }  # fmt: skip


def _write(report: Report, chosen: Row | None, setting: "Setting", folder: Path) -> None:
    """The files of `best/`, and `front.csv`."""
    from tightrope.compressors.export import export
    from tightrope.search.report.front import write_csv

    best = folder / "best"
    best.mkdir(parents=True, exist_ok=True)
    if chosen is not None and chosen.module is not None:
        chosen.policy.save(best / "policy.json")
        export(chosen.module, best / "model.safetensors", device=setting.device.name)
        if setting.device.name == "ort-cpu":
            export(chosen.module, best / "model.onnx", batch=setting.device.batch)
    write_atomically(best / "report.json", json.dumps(report.to_json(), indent=1) + "\n")
    write_atomically(best / "report.md", report.markdown())
    write_csv(folder, folder / "front.csv")
