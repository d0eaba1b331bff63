"""What a trial costs, by parts, over one plain dense forward pass of the same 1000 images.

    python -m benchmarks.trial_cost [--json FILE] [--quick] [--net residual] [--agent ddpg] [--trials 100]

A trial is all that a search does for one policy: the agent's ask and tell, costs, compressing, writing the graph, the session,
scoring all images, the journal. Early stopping is off, repeated policies are left out, nothing is fine-tuned. The forward pass
is that of the fp32 model by the fastest of torch, torch channels-last and ONNX Runtime, each at its best batch size. It runs
after every trial, so that both see the same machine; CPU time, one thread; ratio of the means, of the medians, and of each part.
Behind them stand, for every net, the figures of `benchmarks/trial_checks.py`: what is cheap is not wrong, nor large.
"""

import argparse
import copy
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import tasks
from benchmarks.trial_checks import checks
from tightrope.compressors.assemble import assemble
from tightrope.estimators.device import Device
from tightrope.search import config as configs
from tightrope.search import demo_task
from tightrope.search.distribute import Inline
from tightrope.search.evaluate import OrtEvaluator, evaluator_for, runner, scored
from tightrope.search.journal import Journal
from tightrope.search.session import set_up
from tightrope.search.stopping import Rival, Scored
from tightrope.search.study import Study
from tightrope.search.task import Task
from tightrope.spaces import Budget, Cost, Network, Policy, Score
from tightrope.spaces.policy import Choice

IMAGES = 1000
BATCHES = (5, 10, 25, 50, 100, 250)
PARTS = ("ask", "tell", "cost", "compress", "write", "session", "score", "journal", "other")
AGENT = ("ask", "tell")


@dataclass(frozen=True)
class Kind:
    """A way to search: what is chosen, on which device, under which budget, by which agent."""

    agent: str
    device: str
    budget: str
    space: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "amc": Kind("ddpg", "ort-cpu", "macs<=0.5x", {"bits": False, "ranks": False}),
    "haq": Kind("ddpg", "bitfusion", "size<=0.5x", {"channels": False, "ranks": False}),
    "ddpg": Kind("ddpg", "ort-cpu", "latency<=0.4x"),
    "random": Kind("random", "ort-cpu", "latency<=0.4x"),
}
"""Half of the latency of 8/8 on BitFusion is out of reach of bit-widths alone on these nets, so `haq` halves the bytes."""


class Separable(nn.Module):
    """A 3x3 stem and five depthwise-separable blocks of 16-32-64-64-128-128 channels, for 28 x 28 digits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for c_in, c_out, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False), nn.BatchNorm2d(c_in), nn.ReLU()]
            layers += [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return made


def digits28() -> tuple[nn.Module, Mapping[str, Any]]:
    model = demo_task.initialised(Separable, 0)
    trained = demo_task.remember("separable-28", model, lambda: demo_task.arrays("train"), demo_task.Schedule(epochs=4), seed=0)
    return trained, demo_task.splits()


NETS: Mapping[str, Callable[[], tuple[nn.Module, Mapping[str, Any]]]] = {
    "residual": lambda: tasks.load("residual"),
    "depthwise": lambda: tasks.load("depthwise"),
    "digits28": digits28,
}


class Parts:
    """CPU seconds by part; a part inside of another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[list[float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        self._open.append([0.0])
        try:
            yield
        finally:
            whole, [inner] = time.process_time() - start, self._open.pop()
            self.seconds[name] += whole - inner
            if self._open:
                self._open[-1][0] += whole


class TimedDevice:
    """A device whose costing counts as a part."""

    def __init__(self, device: Device, parts: Parts) -> None:
        self._device, self._parts = device, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        with self._parts.part("cost"):
            return self._device.estimate_many(network, policies)


class TimedEvaluator:
    """`OrtEvaluator.compare`, its steps one after another and timed."""

    def __init__(self, evaluator: OrtEvaluator, parts: Parts) -> None:
        self._evaluator, self._parts = evaluator, parts

    def evaluate(self, policy: Policy) -> Score:
        return self.compare(policy, None)[0]

    def compare(self, policy: Policy, rival: Rival | None) -> Scored:
        evaluator, part = self._evaluator, self._parts.part
        with part("compress"):
            payload = assemble(evaluator.source.prepared, policy)
        with part("write"):
            model = evaluator.source.written(payload, evaluator.batch)
        with part("session"):
            run = runner(model)
        with part("score"):
            return scored(evaluator.examples, run, evaluator.batch, rival)


def wrapped(owner: Any, method: str, parts: Parts, name: str) -> None:
    """Count a method's calls as a part."""
    inner = getattr(owner, method)

    def call(*args: Any) -> Any:
        with parts.part(name):
            return inner(*args)

    setattr(owner, method, call)


class Forward:
    """One dense fp32 forward pass of the images, by whichever way is fastest here."""

    def __init__(self, model: nn.Module, evaluator: OrtEvaluator, network: Network, images: torch.Tensor) -> None:
        plain: Any = model.eval()
        other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        dense = Policy.make(network, network.widths, {layer.name: Choice() for layer in network.layers})
        graphs = {batch: runner(evaluator.source.model(dense, batch)) for batch in BATCHES}

        def ways(some: torch.Tensor) -> dict[str, Callable[[], None]]:
            last, rows = some.contiguous(memory_format=torch.channels_last), some.numpy()
            found = {}
            for batch in BATCHES:
                found[f"torch {batch}"] = through(plain, some.split(batch))
                found[f"channels-last {batch}"] = through(other, last.split(batch))
                found[f"onnxruntime {batch}"] = through(graphs[batch], [[part] for part in np.split(rows, len(rows) // batch)])
            return found

        trial = medians(ways(images[: IMAGES // 2]), 2)
        names = [
            min((n for n in trial if n.startswith(kind)), key=lambda n: trial[n]) for kind in ("torch", "channels-last", "onnx")
        ]
        every = ways(images)
        self.seconds = medians({name: every[name] for name in names}, 4)
        self.best = min(self.seconds, key=lambda name: self.seconds[name])
        self._way = every[self.best]

    def run(self) -> float:
        """CPU seconds of the fastest way, now."""
        start = time.process_time()
        self._way()
        return time.process_time() - start


def through(run: Callable[[Any], Any], batches: Sequence[Any]) -> Callable[[], None]:
    def way() -> None:
        with torch.inference_mode():
            for batch in batches:
                run(batch)

    return way


def medians(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, interleaved; the first round only warms up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: float(np.median(found)) for name, found in seconds.items()}


@dataclass
class Bench:
    """A net, and its forward pass."""

    net: str
    task: Task
    forward: Forward | None = None

    def trials(self, kind: Kind, trials: int) -> tuple[list[dict[str, float]], list[float]]:
        """CPU seconds of each trial by parts, and of the forward pass after each."""
        config = configs.make({"device": kind.device, "budget": kind.budget, "space": dict(kind.space), "workers": 0})
        setting = set_up(self.task, config)
        parts = Parts()
        evaluator = evaluator_for(setting.source, self.task)
        assert isinstance(evaluator, OrtEvaluator)
        if self.forward is None:
            images = torch.from_numpy(evaluator.examples.inputs[0])
            self.forward = Forward(self.task.model, evaluator, setting.prepared.network, images)
            fast = sorted(self.forward.seconds.items(), key=lambda item: item[1])
            print(f"{self.net}: dense forward, ms: " + ", ".join(f"{name} {1e3 * s:.0f}" for name, s in fast), flush=True)
        device: Any = TimedDevice(setting.device, parts)
        rows: list[dict[str, float]] = []
        dense: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            executor = Inline(lambda _: TimedEvaluator(evaluator, parts))
            study = Study.start(
                setting.space, device, Budget.parse(kind.budget), executor, folder=Path(folder), agent=kind.agent,
                trials=trials,
            )  # fmt: skip
            with study:
                wrapped(study.agent, "ask", parts, "ask")
                wrapped(study.agent, "tell", parts, "tell")
                book = study._book
                assert isinstance(book, Journal)
                wrapped(book, "append", parts, "journal")
                mark = [time.process_time()]

                def done(trial: Any, _: Study) -> None:
                    whole = time.process_time() - mark[0]
                    row = {name: parts.seconds[name] for name in PARTS[:-1]}
                    row["other"] = whole - sum(row.values())
                    if trial.cpu_seconds:  # not a repeat
                        rows.append({**row, "whole": whole})
                        dense.append(self.forward.run())  # type: ignore[union-attr]
                    parts.seconds.clear()
                    mark[0] = time.process_time()

                study.problem.cost(study.problem.cheapest)  # found once, before the first trial
                parts.seconds.clear()
                mark[0] = time.process_time()
                while len(rows) < trials and len(study.trials) < 4 * trials:
                    study.run(executor, len(study.trials) + 1, on_trial=[done])
        return rows, dense

    def checks(self) -> list[dict[str, Any]]:
        """Print the figures of `trial_checks`, and give them."""
        setting = set_up(self.task, configs.make({"device": "ort-cpu", "budget": "latency<=0.4x", "workers": 0}))
        evaluator = evaluator_for(setting.source, self.task)
        assert isinstance(evaluator, OrtEvaluator)
        found = checks(setting.space, evaluator)
        print(f"{self.net:10} " + ", ".join(f"{name} {value:.3g} {unit}" for name, value, unit in found), flush=True)
        suffix = "" if self.net == "residual" else f"_{self.net}"
        return [{"name": name + suffix, "value": value, "unit": unit} for name, value, unit in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="20 trials of the residual net alone")
    parser.add_argument("--net", choices=NETS)
    parser.add_argument("--agent", choices=KINDS)
    parser.add_argument("--trials", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    nets = [given.net] if given.net else ["residual"] if given.quick else [*NETS]
    trials = 20 if given.quick else given.trials
    figures: list[dict[str, Any]] = []
    for net in nets:
        model, splits = NETS[net]()
        example = splits["search"][0][0][:1]
        bench = Bench(net, Task(model, example, calibration=splits["calibration"], search=splits["search"]))
        for name in [given.agent] if given.agent else KINDS:
            rows, dense = bench.trials(KINDS[name], trials)
            figures += report(net, name, rows, dense)
        if not given.agent:
            figures += bench.checks()
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def report(net: str, name: str, rows: list[dict[str, float]], dense: list[float]) -> list[dict[str, Any]]:
    """Print one line by parts, as shares of a forward pass, and give the figures."""
    whole, base = np.array([r["whole"] for r in rows]), np.array(dense)
    mean, median = whole.mean() / base.mean(), float(np.median(whole) / np.median(base))
    shares = {part: float(np.mean([r[part] for r in rows]) / base.mean()) for part in PARTS}
    own = sum(shares[p] for p in AGENT) / mean
    text = "  ".join(f"{part} {share:.3f}" for part, share in shares.items())
    print(
        f"{net:10} {name:7} {mean:.3f} of a forward ({1e3 * base.mean():.0f} ms) on average, median {median:.3f}, "
        f"{len(rows)} trials; agent {100 * own:.0f} %:  {text}", flush=True,
    )  # fmt: skip
    suffix = name if net == "residual" else f"{name}_{net}"
    values = {f"trial_ratio_{suffix}": (mean, "1"), f"trial_ratio_median_{suffix}": (median, "1"),
              f"agent_share_{suffix}": (100 * own, "%"),
              **{f"trial_{part}_{suffix}": (share, "1") for part, share in shares.items()}}  # fmt: skip
    return [{"name": key, "value": value, "unit": unit} for key, (value, unit) in values.items()]


if __name__ == "__main__":
    main()
