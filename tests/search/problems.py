"""Small search problems with closed-form scores and costs, for tests: nothing is trained, so a trial takes microseconds."""

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tightrope.search.agent import Agent, Problem
from tightrope.search.distribute import Payload
from tightrope.search.trial import Trial
from tightrope.spaces import Budget, Cost, Extent, Group, Layer, Network, Policy, Score, Space
from tightrope.spaces.network import full_rank
from tightrope.spaces.unit import Unit, lower

AGENTS = ("amc", "auto", "cmaes", "ddpg", "gp", "haq", "ilp", "netadapt", "nsga2", "random", "tpe", "uniform")


def residual_network() -> Network:
    """Seven layers: a stem, a residual stage with tied channels, a depthwise layer between two others, and a classifier."""

    def group(name: str) -> Extent:
        return Extent(0, ((name, 1),))

    def conv(name: str, inputs: Extent, outputs: Extent, size: int, kernel: int = 3) -> Layer:
        return Layer(name, "conv", inputs, outputs, (kernel, kernel), padding=(kernel // 2,) * 2, in_size=(size, size),
                     out_size=(size, size), activation="relu")  # fmt: skip

    depthwise = Layer("dw", "depthwise", group("c"), group("c"), (3, 3), padding=(1, 1), groups=64, in_size=(8, 8), out_size=(8, 8))
    return Network(
        (
            conv("stem", Extent(3), group("a"), 16), conv("a1", group("a"), group("b"), 16), conv("a2", group("b"), group("a"), 16),
            conv("c1", group("a"), group("c"), 8), depthwise, conv("c2", group("c"), group("d"), 8, 1),
            Layer("head", "linear", group("d"), Extent(10)),
        ),
        (Group("a", 32), Group("b", 48), Group("c", 64), Group("d", 96)),
    )  # fmt: skip


@dataclass(frozen=True)
class Additive:
    """A simulated device: every unit takes its MACs times its bits, and loading its bytes."""

    name: str = "additive"
    simulated: bool = True
    batch: int = 1
    metrics: frozenset[str] = frozenset({"latency_ms", "size_bytes", "macs"})
    notes: tuple[str, ...] = ()

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        return [(4, 4), (4, 8), (8, 8), (32, 32)]

    def unit_ms(self, unit: Unit) -> float:
        return 1e-6 * unit.macs * (unit.weight_bits + unit.act_bits) / 64 + 1e-6 * unit.size_bytes

    def estimate(self, network: Network, policy: Policy) -> Cost:
        units = lower(network, policy)
        ms = sum(self.unit_ms(u) for u in units)
        return Cost(ms, sum(u.size_bytes for u in units), sum(u.macs for u in units), simulated=True, provenance=self.name)

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        return [self.estimate(network, p) for p in policies]


@dataclass(frozen=True)
class Jagged(Additive):
    """The same with steps and traps: 8-bit units pay an overhead, odd widths are padded, and a change of precision converts."""

    name: str = "jagged"

    def estimate(self, network: Network, policy: Policy) -> Cost:
        units, ms, bits = lower(network, policy), 0.0, 32
        for unit in units:
            padded = math.ceil(unit.out_channels / 32) * 32 / unit.out_channels
            ms += self.unit_ms(unit) * padded + (0.02 if unit.weight_bits == 8 else 0.005)
            ms += 0.03 if unit.act_bits != bits else 0.0
            bits = unit.act_bits
        size, macs = sum(u.size_bytes for u in units), sum(u.macs for u in units)
        return Cost(ms, size, macs, simulated=True, provenance=self.name)


class ClosedForm:
    """A score that falls with every channel, rank and bit taken, by different amounts in different layers.

    The damage of a layer is the sum of a term for its share of channels, its share of rank and its bits, times a sensitivity;
    neighbours that are both hurt hurt more. 99 points are dense.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def evaluate(self, policy: Policy) -> Score:
        widths = policy.all_widths(self.network)
        damage = []
        for i, layer in enumerate(self.network.layers):
            choice = policy.choice(layer.name)
            share = layer.outputs.at(widths) / layer.outputs.at(self.network.widths)
            rank = 1.0 if choice.rank is None else choice.rank / full_rank(layer, choice.form, widths)
            bits = 2.0 ** (2 - choice.weight_bits) + 2.0 ** (3 - choice.act_bits)
            sensitivity = (1.0, 6.0, 0.5, 3.0, 8.0, 0.4, 1.0)[i % 7]
            damage.append(sensitivity * ((1 - share) ** 2 + 0.7 * (1 - rank) ** 2 + bits))
        total = sum(damage) + 0.3 * sum(a * b for a, b in pairwise(damage))
        value = 99.0 * math.exp(-0.06 * total)
        return Score(value, math.sqrt(max(value * (100 - value), 1.0) / 1000), 1000)


class Watched(ClosedForm):
    """The same, observed: sleeps, writes down each policy that it scores, and misbehaves on the policies that it is told to.

    `payload` may hold `sleep` (seconds), `log` (a path, as bytes), `base` (any array, to be left alone) and, as policies'
    hashes modulo 7, `raises` and `dies`: those raise an error, or kill their own process.
    """

    def __init__(self, payload: Payload) -> None:
        super().__init__(residual_network())
        self.payload = payload
        self.log = Path(payload["log"].tobytes().decode()) if "log" in payload else None

    def evaluate(self, policy: Policy) -> Score:
        if "sleep" in self.payload:
            time.sleep(float(self.payload["sleep"][0]))
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {mark(policy)}\n")
        if "base" in self.payload and self.payload["base"].flags.writeable:
            raise ValueError("the shared arrays can be written")
        if "raises" in self.payload and mark(policy) % 7 == self.payload["raises"][0]:
            raise MemoryError("of this policy there is too much")
        if "dies" in self.payload and mark(policy) % 7 == self.payload["dies"][0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(policy)


def mark(policy: Policy) -> int:
    """A number that stands for a policy in every process."""
    return int.from_bytes(repr(policy.to_json()).encode(), "little") % 1_000_000_007


def payload(**values: object) -> dict[str, np.ndarray]:
    """Arrays for `Watched`."""
    return {k: np.frombuffer(str(v).encode(), np.uint8) if k == "log" else np.array([v]) for k, v in values.items()}


DEVICE = Jagged()
SPACE = Space.build(residual_network(), DEVICE.pairs)
_SMALL = {"hidden": 16, "updates": 0.2}
FAST: dict[str, dict[str, object]] = {
    "amc": _SMALL, "auto": {"settings": {"tpe": {"startup": 8, "candidates": 4}}}, "ddpg": _SMALL, "gp": {"startup": 8, "most": 99},
    "haq": _SMALL, "tpe": {"startup": 8, "candidates": 4},
}  # fmt: skip


def essence(trials: Sequence[Trial]) -> list[tuple[object, ...]]:
    """Trials without when and how long."""
    return [(t.number, t.policy, t.cost, t.score, t.feasible, t.failed) for t in trials]


def make_space(device: Additive, kinds: str = "all") -> Space:
    """The space of a device: `all` of it, only `channels`, `one` decision of two options, or a `point`."""
    if kinds == "all":
        return Space.build(residual_network(), device.pairs)
    space = Space.build(residual_network(), lambda layer: [(8, 8)], ranks=False)
    if kinds != "channels":
        space = replace(space, widths={g: options[-1:] for g, options in space.widths.items()})
    return replace(space, widths={**space.widths, "c": (8, 64)}) if kinds == "one" else space


def make_problem(
    device: Additive | None = None, budget: str | Sequence[str] = "latency<=0.2x", *, seed: int = 0, trials: int = 100,
    kinds: str = "all",
) -> Problem:  # fmt: skip
    device = device or Additive()
    space, parsed = make_space(device, kinds), Budget.parse(budget)
    limits = parsed.resolve(device.estimate(space.network, space.dense), device.metrics, device.name)
    dense = ClosedForm(space.network).evaluate(space.dense)
    return Problem(space, device, limits, dense, parsed.floor, seed, trials)


def judge(problem: Problem, number: int, policy: Policy, name: str = "test") -> Trial:
    """The trial of a policy, scored."""
    cost, score = problem.cost(policy), ClosedForm(problem.network).evaluate(policy)
    return Trial(number, name, policy, cost, score, problem.meets(score, cost))


def play(problem: Problem, agent: Agent, trials: int, *, workers: int = 1) -> list[Trial]:
    """Ask, score and tell, so many at a time."""
    played: list[Trial] = []
    told = 0
    while told < trials:
        while len(played) < min(told + workers, trials):
            number = len(played)
            policy = agent.ask(number)
            name = getattr(agent, "part", lambda _: "test")(number)
            played.append(judge(problem, number, policy, name))
        agent.tell(played[told])
        told += 1
    return played
