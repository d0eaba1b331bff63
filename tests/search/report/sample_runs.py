"""Run folders for tests and benchmarks: real networks, policies and costs; the scores are a formula, and marked as such."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tightrope.search.report.runs import policy_key
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.network import Extent, Group, Layer, Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space
from tightrope.spaces.unit import Unit, lower, macs, size_bytes, units_of

PAIRS = tuple((w, a) for w in (2, 4, 6, 8) for a in (4, 8))


def network(stages: int = 3, *, prefix: str = "") -> Network:
    """A residual net of widths 32, 64, 128, ... for 28x28 images of one channel; layer names begin with `prefix`."""

    def conv(name: str, inputs: Extent, group: str, size: int, *, stride: int = 1, kernel: int = 3) -> Layer:
        return Layer(
            prefix + name, "conv", inputs, Extent(0, ((group, 1),)), (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2),
            in_size=(size * stride, size * stride), out_size=(size, size), activation="relu",
        )  # fmt: skip

    layers = [conv("stem", Extent(1), "stage1", 28)]
    groups = [Group("stage1", 32), Group("inner1", 32)]
    size, before = 28, "stage1"
    for stage in range(1, stages + 1):
        body, inner, stride = f"stage{stage}", f"inner{stage}", 1 if stage == 1 else 2
        if stage > 1:
            size = -(-size // 2)
            groups += [Group(body, 32 << (stage - 1)), Group(inner, 32 << (stage - 1))]
            layers.append(conv(f"block{stage}.short", Extent(0, ((before, 1),)), body, size, stride=2, kernel=1))
        layers.append(conv(f"block{stage}.conv1", Extent(0, ((before, 1),)), inner, size, stride=stride))
        layers.append(conv(f"block{stage}.conv2", Extent(0, ((inner, 1),)), body, size))
        before = body
    layers.append(Layer(prefix + "head", "linear", Extent(0, ((before, 1),)), Extent(10)))
    return Network(tuple(layers), tuple(groups))


def unit_ms(unit: Unit) -> float:
    """A latency that follows MACs and bits, with an overhead."""
    return 0.004 + unit.macs / 4e7 * max(unit.weight_bits, unit.act_bits, 3) / 32


def shares(net: Network, policy: dict[str, Any]) -> dict[str, float]:
    """Latency by layer."""
    found: dict[str, float] = {}
    for unit in lower(net, Policy.from_json(policy)):
        found[unit.layer] = found.get(unit.layer, 0.0) + unit_ms(unit)
    return found


def cost(net: Network, policy: Policy, device: str, *, simulated: bool = False) -> Cost:
    """The sum over all units; where it is measured, with an interval."""
    latency = sum(map(unit_ms, lower(net, policy)))
    size = size_bytes(net, policy)
    spread = None if simulated else (latency * 0.96, latency * 1.05)
    return Cost(latency, size, macs(net, policy), latency * 0.7 if simulated else None, size + 60_000, spread, simulated,
                provenance=f"{device}, made up for a sample")  # fmt: skip


def score(net: Network, policy: Policy, rng: np.random.Generator) -> Score:
    """An accuracy that falls as layers lose channels, rank and bits, early layers most."""
    widths, loss = policy.all_widths(net), 0.0
    for i, layer in enumerate(net.layers):
        choice = policy.choice(layer.name)
        weight = 1.3 / (1 + 0.35 * i)
        kept = layer.outputs.at(widths) / layer.outputs.at(net.widths)
        loss += (
            weight
            * (4.5 * (1 - kept) ** 2 + 9 * 2.0 ** (1 - choice.weight_bits) + 5 * 2.0 ** (1 - choice.act_bits))
            * (1.6 if i % 3 else 0.5)
        )
        if choice.rank is not None:
            whole = units_of(layer, type(choice)(choice.weight_bits, choice.act_bits), widths)
            loss += 0.4 * weight * max(0.1, 1 - sum(u.macs for u in units_of(layer, choice, widths)) / whole[0].macs)
    value = 98.4 - loss + float(rng.normal(0, 0.15))
    value = max(value, 9.0)
    return Score(round(value, 3), round(100 * math.sqrt(max(value / 100 * (1 - value / 100), 1e-5) / 1000), 3), 1000)


def lines(net: Network, *, name: str, trials: int, agent: str, seed: int, budget: float = 0.25, simulated: bool = False,
          device: str = "ort-cpu") -> Iterator[dict[str, Any]]:  # fmt: skip
    """The lines of a journal."""
    rng = np.random.default_rng(seed)
    space = Space.build(net, lambda layer: (*PAIRS, (32, 32)))
    dense = Policy.make(net)
    whole = cost(net, dense, device, simulated=simulated)
    limit = budget * whole.latency_ms
    clock = 1_790_000_000.0
    yield {
        "kind": "study", "version": 1, "name": name, "network": net.fingerprint, "device": device, "simulated": simulated,
        "budget": {"text": [f"latency<={budget:g}x"], "limits": {"latency_ms": limit}, "floor": None}, "agent": agent, "seed": seed,
        "metric": "top1", "dense": {"policy": dense.to_json(), "score": score(net, dense, rng).to_json(), "cost": whole.to_json()},
        "started": clock,
    }  # fmt: skip
    best: list[tuple[float, int, np.ndarray, Policy]] = []
    for number in range(trials):
        point = rng.random(space.dimension)
        if best and agent != "random" and rng.random() < min(0.92, 5 * number / trials):
            parent = best[int(rng.integers(len(best)))][2]
            moved = rng.random(space.dimension) < 1.5 / space.dimension
            point = np.where(moved, point, parent)
        policy = space.decode(point)
        spent, got = cost(net, policy, device, simulated=simulated), score(net, policy, rng)
        feasible = spent.latency_ms <= limit
        failed = "the evaluation ran out of memory" if rng.random() < 0.01 else None
        clock += float(rng.uniform(0.5, 1.5))
        yield {
            "kind": "trial", "number": number, "agent": agent, "policy": policy.to_json(), "cost": spent.to_json(),
            "score": None if failed else got.to_json(), "feasible": feasible and failed is None, "failed": failed,
            "cpu_seconds": round(float(rng.uniform(0.4, 1.2)), 4), "time": clock,
        }  # fmt: skip
        if not failed:
            fit = got.value - 25 * max(0.0, spent.latency_ms / limit - 1)
            best = sorted([*best, (fit, number, point, policy)], key=lambda b: b[:2], reverse=True)[:12]
    near = min((space.sample(rng) for _ in range(50)), key=lambda p: abs(cost(net, p, device).latency_ms - limit))
    controls = {"uniform": space.uniform(0.5, (8, 8)), "recipe": space.uniform(0.375, (8, 8)), "random": near}
    for control, policy in controls.items():
        spent, got = cost(net, policy, device, simulated=simulated), score(net, policy, rng)
        yield {"kind": "control", "name": control, "policy": policy.to_json(), "cost": spent.to_json(), "score": got.to_json()}
    for _, number, _, policy in best[:3]:
        spent, got = cost(net, policy, device, simulated=simulated), score(net, policy, rng)
        ratio = spent.latency_ms / whole.latency_ms
        tuned = {**got.to_json(), "value": min(99.0, got.value + 0.4)}
        measured = None if simulated else {"ratio": ratio * 1.02, "low": ratio * 0.98, "high": ratio * 1.06}
        yield {"kind": "final", "number": number, "score": tuned, "cost": spent.to_json(), "measured": measured}


def write_run(folder: Path, *, net: Network | None = None, trials: int = 300, agent: str = "tpe", seed: int = 0,
              budget: float = 0.25, simulated: bool = False, device: str = "ort-cpu") -> list[dict[str, Any]]:  # fmt: skip
    """Write a run folder and return the lines of its journal."""
    net = net or network()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network.json").write_text(json.dumps(net.to_json()))
    made = list(
        lines(net, name=folder.name, trials=trials, agent=agent, seed=seed, budget=budget, simulated=simulated, device=device)
    )
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))
    with (folder / "layers.jsonl").open("w") as file:
        for line in made:
            if line["kind"] == "trial":
                file.write(json.dumps({"policy": policy_key(line["policy"]), "latency_ms": shares(net, line["policy"])}) + "\n")
    return made
