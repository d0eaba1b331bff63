"""How good the agents' searches are, each against its controls.

    python -m benchmarks.search_quality [--json FILE] [--quick] [--only NET-DEVICE ...] [--seeds N] [--trials N] [--out DIR]

Cells: the harder task's residual net and transformer, each under 0.3x of its latency on `ort-cpu` and 0.4x of 8/8 on `bitfusion`
(simulated); agents random, uniform, ilp, tpe, ddpg and auto, with 5 seeds and 200 trials; in the cell residual-bitfusion the other
agents too, tpe and ddpg behind `ilp`'s policies among them, and in residual-ort-cpu `amc` for 300 episodes. Trials are scored on
the search split. What is reported is the score, on a second split made for this purpose, of the policy that a search chose: the
highest score within the budget after 100 and after 200 trials; and the hypervolume of its front, scored on the second split too.
Differences are paired by seed; intervals are 95 % by Student's t over seeds. A difference whose interval holds 0 is called a tie.
An agent whose decisions alone cannot meet a budget (`haq` decides about bits only) has no searches, and is named.

`--quick` is the space that can be enumerated: a small net on 8x8 digits, channels and weight bits on `bitserial`, 16,384 policies,
each scored once on two disjoint splits and kept as a table; the regret of each agent is against the best policy of the first split,
and both are scored on the second.

Every search is a run folder in DIR and every score is kept there, for all agents: run it again to go on. All agents search with
one seed before the next seed begins, so that what stands when it is stopped is paired: `--report` prints it and searches nothing.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats

import tightrope as tr
from tightrope.search import pareto
from tightrope.search.agent import Agent
from tightrope.search.distribute import Inline
from tightrope.search.evaluate import OrtEvaluator
from tightrope.search.study import Study
from tightrope.search.trial import Trial
from tightrope.spaces import Budget, Policy, Score, Space
from tightrope.spaces.errors import BudgetError, ConfigError

AGENTS = ("random", "uniform", "ilp", "tpe", "ddpg", "auto")
OTHERS = ("nsga2", "cmaes", "netadapt", "haq", "tpe+ilp", "ddpg+ilp")
CONTROLS = ("random", "uniform")
AT = (100, 200)
AMC_EPISODES = 300
BUDGETS = {"ort-cpu": "latency<=0.3x", "bitfusion": "latency<=0.4x"}
ALL_AGENTS_IN, AMC_IN = "residual-bitfusion", "residual-ort-cpu"
CELLS = tuple((net, device) for net in ("residual", "transformer") for device in BUDGETS)
log = logging.getLogger("search_quality")


class Scorer(Protocol):
    """Scores policies; `cpu_seconds` of one is what scoring it took when it was new."""

    def evaluate(self, policy: Policy) -> Score: ...
    def cpu_seconds(self, policy: Policy) -> float: ...


class Remembered:
    """A scorer whose scores are kept in a file."""

    def __init__(self, evaluate: Callable[[Policy], Score], path: Path) -> None:
        self._evaluate, self._path, self._known = evaluate, path, dict[str, tuple[Score, float]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            self._known[row["policy"]] = (Score.from_json(row["score"]), row["cpu_seconds"])

    def evaluate(self, policy: Policy) -> Score:
        key = json.dumps(policy.to_json(), sort_keys=True)
        if key not in self._known:
            start = time.process_time()
            score = self._evaluate(policy)
            self._known[key] = (score, time.process_time() - start)
            with self._path.open("a", encoding="utf-8") as file:
                row = {"policy": key, "score": score.to_json(), "cpu_seconds": self._known[key][1]}
                file.write(json.dumps(row) + "\n")
        return self._known[key][0]

    def cpu_seconds(self, policy: Policy) -> float:
        return self._known[json.dumps(policy.to_json(), sort_keys=True)][1]


class Timed:
    """An agent, and the CPU seconds of each of its trials: ask and tell."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self.seconds = agent, dict[int, float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def ask(self, number: int) -> Policy:
        start = time.process_time()
        policy = self._agent.ask(number)
        self.seconds[number] = self.seconds.get(number, 0.0) + time.process_time() - start
        return policy

    def tell(self, trial: Trial) -> None:
        start = time.process_time()
        self._agent.tell(trial)
        self.seconds[trial.number] = self.seconds.get(trial.number, 0.0) + time.process_time() - start


@dataclass(frozen=True)
class Row:
    """One trial: its part of the portfolio, score on the search split, cost over budget, traded cost, CPU seconds."""

    part: str
    policy: str
    search: float
    use: float
    price: float
    trial_seconds: float
    agent_seconds: float


class Cell:
    """One space under one budget, with its two scorers, and the searches in it."""

    def __init__(
        self, name: str, space: Space, device: Any, budget: str, first: Scorer, second: Scorer, folder: Path
    ) -> None:  # fmt: skip
        self.name, self.space, self.device, self.budget, self.first, self.second = name, space, device, budget, first, second
        self._folder = folder / name

    def search(self, agent: str, seed: int, trials: int, *, kept: bool = False) -> list[Row] | None:
        """The trials of a search, from its folder or (unless they must be `kept`) run now; None where there are none.

        An agent that cannot search this space has none.
        """
        path = self._folder / f"{agent}-{seed}-{trials}.json"
        if kept and not path.exists():
            return None
        if not path.exists():
            try:
                rows = self._run(agent, seed, trials, path.with_suffix(""))
            except (BudgetError, ConfigError) as error:
                log.warning("%s: %s", self.name, str(error)[:200])
                return None
            path.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
            log.info("%s: %s, seed %d: best %.2f of %d trials", self.name, agent, seed, max(r.search for r in rows), trials)
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def _run(self, agent: str, seed: int, trials: int, folder: Path) -> list[Row]:
        name, _, start = agent.partition("+")
        executor = Inline(lambda payload: self.first)
        journal = folder / "trials.jsonl"
        if journal.exists() and b"\n" in journal.read_bytes():  # else it was stopped before its first line
            study = Study.resume(folder, self.space, self.device)
        else:
            study = Study.start(
                self.space, self.device, Budget.parse(self.budget), executor, folder=folder, agent=name,
                settings={"start": start} if start else {}, trials=trials, seed=seed,
            )  # fmt: skip
        with study:
            timed = Timed(study.agent)
            study.agent = timed
            study.run(executor)
            limits = study.problem.limits
            return [
                Row(
                    t.agent, json.dumps(t.policy.to_json()), t.score.value if t.score else 0.0, limits.use(t.cost),
                    study.problem.price(t.cost), self.first.cpu_seconds(t.policy), timed.seconds.get(t.number, 0.0),
                )
                for t in study.trials
            ]  # fmt: skip

    def policy(self, row: Row) -> Policy:
        return Policy.from_json(json.loads(row.policy))

    def chosen(self, rows: Sequence[Row], at: int) -> Row:
        """The trial of the highest score on the search split, the cheapest where some tie."""
        return max(rows[:at], key=lambda r: (r.search, -r.price))

    def quality(self, rows: Sequence[Row], at: int) -> tuple[float, float]:
        """On the second split, after so many trials: score of the chosen policy, and hypervolume of the front.

        The hypervolume's reference is the dearest trial allowed and half of the dense score; 1 is the dense score at no cost.
        """
        rows = rows[:at]
        mask = pareto.non_dominated([r.price for r in rows], [r.search for r in rows])
        front = [r for r, kept in zip(rows, mask, strict=True) if kept]
        dense, most = self.second.evaluate(self.space.dense).value, max(r.price / r.use for r in rows)
        scores = [(self.second.evaluate(self.policy(r)).value - dense) / (0.5 * dense) for r in front]
        volume = pareto.hypervolume([r.price / most for r in front], scores, (1.0, -1.0))
        return self.second.evaluate(self.policy(self.chosen(rows, at))).value, volume


# --- the spaces -----------------------------------------------------------------------------------------------------


def harder(net: str, device: str, folder: Path) -> Cell:
    """A cell of the harder task; `second` is the split that reports."""
    from benchmarks.tasks import splits, trained
    from tightrope.search.config import make
    from tightrope.search.session import set_up

    data = splits()
    task = tr.Task(trained(net), data["calibration"][0][0][:1], data["calibration"], data["search"], test=data["second"])
    setting = set_up(task, make({"device": device, "budget": BUDGETS[device]}))
    name = f"{net}-{device}"
    first, second = (
        Remembered(OrtEvaluator(setting.source, task, split).evaluate, folder / name / f"{split}.jsonl")
        for split in ("search", "test")
    )
    return Cell(name, setting.space, setting.device, BUDGETS[device], first, second, folder)


class Table:
    """Scores of every policy of a space on two splits, computed once: one run of the graph scores both."""

    def __init__(self, space: Space, evaluator: OrtEvaluator, halves: Sequence[slice], path: Path) -> None:
        self.space, self._evaluator, self._halves, self._path = space, evaluator, halves, path
        self._sizes = [len(v.options) for v in space.variables]
        self.scores = self._load() if path.exists() else np.full((2, int(np.prod(self._sizes))), np.nan)

    def _load(self) -> Any:
        return np.load(self._path, allow_pickle=False)

    def policies(self) -> Iterator[tuple[int, Policy]]:
        for i in range(self.scores.shape[1]):
            index = np.array(np.unravel_index(i, self._sizes))
            yield i, self.space.decode((index + 0.5) / self._sizes)

    def fill(self) -> None:
        """Score what is not scored yet; kept every 500 policies."""
        for i, policy in self.policies():
            if np.isnan(self.scores[0, i]):
                self.scores[:, i] = [s.value for s in self.both(policy)]
                if i % 500 == 499 or i == self.scores.shape[1] - 1:
                    np.save(self._path, self.scores)
                    log.info("table: %d of %d policies", i + 1, self.scores.shape[1])

    def both(self, policy: Policy) -> list[Score]:
        outputs = self._evaluator.outputs(self._evaluator.source.model(policy, self._evaluator.batch))
        right = 100.0 * self._evaluator.examples.right(outputs, 0)
        return [Score(float(r.mean()), float(r.std(ddof=1) / len(r) ** 0.5), len(r)) for r in (right[h] for h in self._halves)]

    def scorer(self, half: int) -> "Column":
        return Column(self, half)


class Column:
    """One column of a table, as a scorer."""

    def __init__(self, table: Table, half: int) -> None:
        self._table, self._half = table, half
        self._count = len(range(*table._halves[half].indices(len(table._evaluator.examples))))

    def evaluate(self, policy: Policy) -> Score:
        index = (self._table.space.encode(policy) * self._table._sizes).astype(int)
        value = float(self._table.scores[self._half, np.ravel_multi_index(index, self._table._sizes)])
        return Score(value, float(np.sqrt(max(value * (100 - value), 1.0) / self._count)), self._count)

    def cpu_seconds(self, policy: Policy) -> float:
        return 0.0


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return torch.from_numpy(x[order].astype(np.float32).reshape(-1, 1, 8, 8) / 16), torch.from_numpy(y[order].astype(np.int64))


def enumerated(folder: Path) -> tuple[Cell, Table]:
    """The space that can be enumerated: four groups of four widths, three layers of four weight widths."""
    from torch import nn

    from tightrope.compressors.sensitivity import losses
    from tightrope.search.config import make as config
    from tightrope.search.demo_task import Schedule, fit, initialised
    from tightrope.search.session import set_up

    def build() -> nn.Module:
        convolutions: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 16, 2), (16, 24, 1), (24, 24, 1)):
            convolutions += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24 * 16, 10))

    x, y = digits()
    net = initialised(build, 0)
    fit(net, x[:700], y[:700], Schedule(epochs=12, shift=1.0), seed=0)
    calibration = [(x[a : a + 100], y[a : a + 100]) for a in range(0, 400, 100)]
    task = tr.Task(net, x[:1], calibration=calibration, search=[(x[700:], y[700:])])
    setting = set_up(task, config({"device": "bitserial"}))
    names = [layer.name for layer in setting.space.network.layers]
    pairs = {name: ((2, 8), (3, 8), (4, 8), (8, 8)) if name in names[1:-1] else ((8, 8),) for name in names}
    widths = {g: tuple(n * o[-1] // 4 for n in (1, 2, 3, 4)) for g, o in setting.space.widths.items()}
    space = replace(setting.space, widths=widths, pairs=pairs, ranks=dict.fromkeys(names, (1.0,)), losses={})
    space = replace(space, losses=losses(setting.prepared, space))
    (folder / "enumerated").mkdir(parents=True, exist_ok=True)
    table = Table(space, OrtEvaluator(setting.source, task), (slice(0, 548), slice(548, 1097)), folder / "enumerated" / "table.npy")
    first, second = table.scorer(0), table.scorer(1)
    return Cell("enumerated", space, setting.device, "latency<=0.12x", first, second, folder), table


# --- figures --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval by Student's t; without one for a single value."""
    v = np.array(values)
    half = float(stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else float("nan")
    return float(v.mean()), half


def versus(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The paired difference in words; of one seed nothing can be said."""
    mean, half = interval(np.subtract(ours, theirs).tolist())
    return f"{mean:+.2f} ± {half:.2f}" + (" tie" if abs(mean) <= half else "")


class Figures:
    """What is printed and written."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float, unit: str) -> None:
        self.rows.append({"name": name, "value": round(value, 5), "unit": unit})


def compare(cell: Cell, agents: Sequence[str], seeds: int, trials: int, figures: Figures, *, kept: bool) -> None:
    """The table of one cell; where searches must be `kept`, of the seeds that all agents which have any have in common."""
    runs = {(a, seed): cell.search(a, seed, trials, kept=kept) for seed in range(seeds) for a in agents}
    every = [seed for seed in range(seeds) if runs[agents[0], seed] is not None]
    able = [a for a in agents if every and runs[a, every[0]] is not None]
    every = [seed for seed in every if all(runs[a, seed] is not None for a in able)]
    found = {a: [rows for seed in every if (rows := runs[a, seed]) is not None] for a in able}
    if not every:
        print(f"\n{cell.name}: no seed of all agents yet")
        return
    dense = cell.second.evaluate(cell.space.dense)
    if len(able) < len(agents):
        print(f"\n{cell.name}: no searches by {', '.join(a for a in agents if a not in able)}")
    print(f"\n{cell.name}, {cell.budget}; dense {dense.value:.2f} ± {dense.stderr:.2f} on the second split; {len(every)} seeds")
    points = sorted({min(at, trials) for at in AT})
    values = {(a, at): [cell.quality(rows, at) for rows in runs] for a, runs in found.items() for at in points}
    for at in points:
        heads = f"{'score':>14} {'hypervolume':>15} {'use':>6} {'met':>5} {'agent s':>8}"
        print(f"\n{'after ' + str(at):12} {heads}  less random, less uniform")
        for agent, runs in found.items():
            scores, volumes = zip(*values[agent, at], strict=True)
            use = [cell.chosen(rows, at).use for rows in runs]
            inside = float(np.mean([r.use <= 1 for rows in runs for r in rows[:at]]))
            spent = float(np.mean([r.agent_seconds for rows in runs for r in rows[:at]]))
            (mean, half), (volume, wide) = interval(scores), interval(volumes)
            less = [versus(scores, [s for s, _ in values[c, at]]) for c in CONTROLS if c in found and c != agent]
            quality = f"{mean:7.2f} ± {half:4.2f} {volume:8.3f} ± {wide:.3f}"
            print(f"{agent:12} {quality} {min(use):6.3f} {inside:5.0%} {spent:8.3f}  {', '.join(less)}")
            key = f"{cell.name}_{agent}_{at}"
            for name, value, unit in (
                ("score", mean, "%"), ("score_half", half, "points"), ("hypervolume", volume, "1"), ("hypervolume_half", wide, "1"),
                ("budget_use", min(use), "1"), ("budget_met", inside, "1"), ("agent_cpu", spent, "s"),
            ):  # fmt: skip
                figures.add(f"{key}_{name}", value, unit)
        _judge(values, found, at)
    if "auto" in found:
        parts = [r.part for rows in found["auto"] for r in rows]
        won = [cell.chosen(rows, trials).part for rows in found["auto"]]
        print("auto's trials:", {p: parts.count(p) for p in sorted(set(parts))}, " its best came from:", sorted(won))


def _judge(values: dict[tuple[str, int], list[tuple[float, float]]], found: dict[str, Any], at: int) -> None:
    """Whether `auto` is anywhere worse than the best single agent by more than the interval."""
    if "auto" in found:
        means = {a: float(np.mean([s for s, _ in values[a, at]])) for a in found if a != "auto"}
        best = max(means, key=lambda a: means[a])
        ours, theirs = ([s for s, _ in values[agent, at]] for agent in ("auto", best))
        print(f"auto less the best single agent, {best}: {versus(ours, theirs)}")


def to_quality(cell: Cell, seeds: int, trials: int, figures: Figures, *, kept: bool) -> None:
    """CPU seconds of `auto` until it has what `amc` has after its episodes."""
    ratios = []
    for seed in range(seeds):
        amc, auto = cell.search("amc", seed, AMC_EPISODES, kept=kept), cell.search("auto", seed, trials, kept=kept)
        if kept and (amc is None or auto is None):
            continue
        if amc is None or auto is None:
            print(f"{cell.name}: amc decides about channels alone and cannot meet {cell.budget}")
            return
        goal, spent = max(r.search for r in amc), sum(r.trial_seconds + r.agent_seconds for r in amc)
        seconds = np.cumsum([r.trial_seconds + r.agent_seconds for r in auto])
        reached = [s for s, r in zip(seconds, auto, strict=True) if r.search >= goal]
        ratios.append(reached[0] / spent if reached else float("inf"))
    if not ratios:
        return
    print(f"CPU time of auto to what amc has after {AMC_EPISODES} episodes: {np.round(ratios, 3).tolist()} of amc's")
    figures.add(f"{cell.name}_auto_cpu_to_amc", float(np.max(ratios)), "1")


def regrets(folder: Path, agents: Sequence[str], seeds: int, figures: Figures) -> None:
    """The enumerated space: each agent against the optimum."""
    cell, table = enumerated(folder)
    table.fill()
    policies = [p for _, p in table.policies()]
    cost = cell.device.estimate_many(cell.space.network, [cell.space.dense])[0]
    limits = Budget.parse(cell.budget).resolve(cost, cell.device.metrics, cell.device.name)
    able = np.array([limits.met(c) for c in cell.device.estimate_many(cell.space.network, policies)])
    first, second = np.where(able, table.scores, -np.inf)
    best = int(first.argmax())
    print(
        f"\nenumerated: {len(policies)} policies, {able.sum()} within {cell.budget}; optimum of the first split {first[best]:.2f}, "
        f"{second[best]:.2f} on the second; median within the budget {np.median(first[able]):.2f}"
    )
    print(f"{'after 100':12} {'regret, first split':>20} {'regret, second split':>22}")
    for agent in agents:
        runs = [rows for seed in range(seeds) if (rows := cell.search(agent, seed, 100)) is not None]
        if not runs:
            continue
        chosen = [cell.policy(cell.chosen(rows, 100)) for rows in runs]
        near = [first[best] - cell.first.evaluate(p).value for p in chosen]
        far = [second[best] - cell.second.evaluate(p).value for p in chosen]
        print(f"{agent:12} {interval(near)[0]:12.2f} ± {interval(near)[1]:5.2f} {interval(far)[0]:14.2f} ± {interval(far)[1]:5.2f}")
        figures.add(f"regret_first_{agent}", interval(near)[0], "points")
        figures.add(f"regret_second_{agent}", interval(far)[0], "points")
        figures.add(f"regret_second_{agent}_half", interval(far)[1], "points")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help='write [{"name", "value", "unit"}] here')
    parser.add_argument("--quick", action="store_true", help="only the space that can be enumerated")
    parser.add_argument("--only", nargs="+", metavar="NET-DEVICE", help="only these cells, such as residual-bitfusion")
    parser.add_argument("--agents", nargs="+", help="only these agents")
    parser.add_argument("--report", action="store_true", help="search nothing, print what was searched")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cache/search_quality"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)

    figures = Figures()
    if arguments.quick or not arguments.only:
        regrets(arguments.out, arguments.agents or (*AGENTS, *OTHERS), arguments.seeds, figures)
    for net, device in () if arguments.quick else CELLS:
        if arguments.only and f"{net}-{device}" not in arguments.only:
            continue
        cell = harder(net, device, arguments.out)
        agents = arguments.agents or (*AGENTS, *(OTHERS if cell.name == ALL_AGENTS_IN else ()))
        compare(cell, agents, arguments.seeds, arguments.trials, figures, kept=arguments.report)
        if cell.name == AMC_IN and not arguments.agents:
            to_quality(cell, arguments.seeds, arguments.trials, figures, kept=arguments.report)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures.rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
