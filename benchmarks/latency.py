"""Latency of `ort-cpu` or `torch-cpu`: predicted against measured, on the demo's net and both examples.

    python -m benchmarks.latency [--json FILE] [--quick] [--batch N] [--device torch-cpu]

For each net a latency table is built from nothing, then random policies (each group's width uniform in 25-100 %, precision
drawn per layer, a quarter of the layers low-rank) are predicted, built as they would be exported, and timed in interleaved rounds.
Weights are random, which does not matter to time. They are timed beside the dense net and seven of the table's own nets, which
tell the scale that both times stand on; a run whose noise floor exceeds 3 % is repeated, not passed (after three the quietest is
told). For `torch-cpu` another process then reads the table and times the same policies (`latency_other_process_mape`).
The last column is the worst net; of `latency_interval_coverage`, which can be too high or too low, the mean. Each net has a process
of its own; `table_peak_memory` is what that has taken when the table is made.
"""

import argparse
import gc
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from scipy.stats import spearmanr
from torch import nn

from examples import depthwise_digits, vit_digits
from tightrope.compressors.export.skeleton import skeleton_of
from tightrope.compressors.prepare import prepare
from tightrope.estimators.measured.actual import actual, predicted
from tightrope.estimators.measured.base import Measured
from tightrope.estimators.measured.ort import OrtCpu
from tightrope.estimators.measured.torch_cpu import TorchCpu
from tightrope.search import demo_task
from tightrope.search.evaluate import Source
from tightrope.search.kernels import KernelSource
from tightrope.spaces import Network, Policy, Space

NETS: dict[str, Callable[[], nn.Module]] = {
    "demo": demo_task.ResNet, "depthwise": depthwise_digits.DepthwiseNet, "transformer": vit_digits.VisionTransformer,
}  # fmt: skip
MOST_NOISE = 0.03


def random_policy(space: Space, rng: np.random.Generator) -> Policy:
    """A policy as the module's docstring says."""
    point = rng.random(space.dimension)
    for i, variable in enumerate(space.variables):
        options = variable.options
        if variable.kind == "channels":
            allowed = [k for k, width in enumerate(options) if width >= 0.25 * options[-1]]
            point[i] = (rng.choice(allowed) + 0.5) / len(options)
        elif variable.kind == "rank":
            point[i] = 1.0 if rng.random() > 0.25 else (rng.integers(len(options) - 1) + 0.5) / len(options)
    return space.decode(point)


def ready(build: Callable[[], nn.Module], name: str, batch: int) -> tuple[Measured, Space, Source]:
    """The device, the space and the source of one net."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(64, 1, 28, 28)
    prepared = prepare(build().eval(), images[:2], [(images, torch.zeros(64))])
    device: Measured = OrtCpu(batch=batch) if name == "ort-cpu" else TorchCpu(batch=batch)
    source = (Source if name == "ort-cpu" else KernelSource)(prepared, skeleton_of(prepared))
    return device, Space.build(prepared.network, device.pairs), source


def cpu_seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def most_memory() -> float:
    """MiB that this process has taken at most; `ru_maxrss` would begin with what the process that started it had."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def timed(device: Measured, network: Network, policies: list[Policy]) -> tuple[Any, float]:
    """Milliseconds and noise floor of a run that is quiet enough, or of the quietest of three."""
    runs: list[tuple[Any, float]] = []
    while len(runs) < 3 and all(floor > MOST_NOISE for _, floor in runs):
        if runs:
            print(f"noise floor {100 * runs[-1][1]:.1f} % is above {100 * MOST_NOISE:.0f} %: repeated", file=sys.stderr)
        runs.append(device.timed(network, policies))
    return min(runs, key=lambda run: run[1])


def elsewhere(net: str, batch: int, folder: str, policies: list[Any]) -> tuple[list[float], float]:
    """In another process: relative errors of the table in `folder` on nets that are timed here, and the noise floor."""
    device, space, source = ready(NETS[net], "torch-cpu", batch)
    device.prepare(space.network, space, source, cache=Path(folder))
    chosen = [Policy.from_json(p) for p in policies]
    measured, floor = timed(device, space.network, chosen)
    costs = device.estimate_many(space.network, chosen)
    return [c.latency_ms / float(m) - 1 for c, m in zip(costs, measured, strict=True)], floor


def bulk(device: Measured, space: Space, rng: np.random.Generator, count: int = 4000) -> dict[str, tuple[float, str]]:
    """Policies a second of process time, each new, once the table's grids are read (the median of four batches behind the first);
    and how the patterns agree with lowering."""
    rates = []
    for _ in range(5):
        policies = [space.sample(rng) for _ in range(count)]
        start = time.process_time()
        costs = device.estimate_many(space.network, policies)
        rates.append(count / (time.process_time() - start))
    fitted = device.known(space.network).fitted
    exact = [sum(fitted.shares(policy)) for policy in policies[:100]]
    off = np.abs(np.array([c.latency_ms for c in costs[:100]]) / exact - 1)
    return {
        "policies_a_second": (float(np.median(rates[1:])), "1/s"),
        "patterns_equal_lowering": (100 * float(np.mean(off < 1e-6)), "%"),
        "patterns_worst_error": (100 * float(off.max()), "%"),
    }


def size_error(size: int, model: Any) -> float:
    """How far a size is from the constants of a file, shapes left out."""
    whole = sum(len(t.raw_data) for t in model.graph.initializer if t.data_type != onnx.TensorProto.INT64)
    return abs(size / whole - 1)


def figures(net: str, name: str, policies: int, batch: int) -> dict[str, tuple[float, str]]:
    """The figures of one net, with their units, from a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_figures, net, name, policies, batch).result()


def _figures(net: str, name: str, policies: int, batch: int) -> dict[str, tuple[float, str]]:
    rng = np.random.default_rng(2)
    device, space, source = ready(NETS[net], name, batch)
    prepared = source.prepared
    if isinstance(device, OrtCpu):
        source.skeleton(prepared.network.widths, batch)  # learnt here, so that the table's cost does not contain it
    with tempfile.TemporaryDirectory() as folder:
        start = cpu_seconds()
        device.prepare(prepared.network, space, source, cache=Path(folder))
        built, memory = cpu_seconds() - start, most_memory()
        made, device = device, type(device)(batch=batch)
        gc.collect()  # of what making the table left behind, which a process that only opens it has not; `made` keeps the rest
        start = time.process_time()
        device.prepare(prepared.network, space, source, cache=Path(folder))
        reopened = time.process_time() - start
        del made
        chosen = [random_policy(space, rng) for _ in range(policies)]
        start = time.process_time()
        costs = device.estimate_many(prepared.network, chosen)
        asked = time.process_time() - start
        measured, floor = timed(device, prepared.network, chosen)
        found = np.array([c.latency_ms for c in costs])
        inside = [c.interval_ms[0] <= m <= c.interval_ms[1] for c, m in zip(costs, measured, strict=True) if c.interval_ms]
        more = bulk(device, space, rng)
        if isinstance(device, OrtCpu):
            same = [predicted(device.nodes(prepared.network, p)) == actual(source.model(p, batch)) for p in chosen]
            more["nodes_match"] = (100 * float(np.mean(same)), "%")
            more["size_worst_error"] = (
                100 * max(size_error(c.size_bytes, source.model(p, batch)) for c, p in zip(costs, chosen, strict=True)),
                "%",
            )
        else:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                other, noise = pool.submit(elsewhere, net, batch, folder, [p.to_json() for p in chosen]).result()
            more["latency_other_process_mape"] = (100 * float(np.mean(np.abs(other))), "%")
            more["latency_other_process_within_10pct"] = (100 * float(np.mean(np.abs(other) <= 0.1)), "%")
            more["latency_other_process_noise_floor"] = (100 * noise, "%")
    errors = np.abs(found / measured - 1)
    return more | {
        "latency_mape": (100 * float(errors.mean()), "%"),
        "latency_within_10pct": (100 * float((errors <= 0.1).mean()), "%"),
        "latency_spearman": (float(spearmanr(found, measured)[0]), "1"),
        "latency_bias": (100 * float(np.mean(found / measured - 1)), "%"),
        "latency_noise_floor": (100 * floor, "%"),
        "latency_interval_coverage": (100 * float(np.mean(inside)), "%"),
        "table_cpu_seconds": (built, "s"),
        "table_reopen_seconds": (reopened, "s"),
        "table_peak_memory": (memory, "MiB"),
        "peak_memory": (most_memory(), "MiB"),
        "table_nodes": (float(sum(len(f.exact) for f in device.known(prepared.network).fitted.table.families.values())), "1"),
        "estimate_ms": (1e3 * asked / policies, "ms"),
    }


WORST_IS_LEAST = {
    "latency_within_10pct",
    "latency_other_process_within_10pct",
    "latency_spearman",
    "nodes_match",
    "policies_a_second",
    "patterns_equal_lowering",
}


def worst(figure: str, values: Sequence[float]) -> float:
    """The worst of a figure's values over nets; the mean of what can be too high or too low."""
    if figure == "latency_interval_coverage":
        return float(np.mean(values))
    return min(values) if figure in WORST_IS_LEAST else max(values, key=abs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="15 policies a net instead of 30")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["ort-cpu", "torch-cpu"], default="ort-cpu")
    parser.add_argument("--net", choices=[*NETS], action="append", help="of these nets only")
    given = parser.parse_args()
    results = {net: figures(net, given.device, 15 if given.quick else 30, given.batch) for net in given.net or NETS}
    first = next(iter(results.values()))
    rows = []
    print(f"{'':38}" + "".join(f"{name:>14}" for name in results) + f"{'worst':>14}")
    for figure, (_, unit) in first.items():
        values = [r[figure][0] for r in results.values()]
        of_all = worst(figure, values)
        print(f"{figure + ', ' + unit:38}" + "".join(f"{v:14.3f}" for v in (*values, of_all)))
        rows.append({"name": figure, "value": of_all, "unit": unit})
        rows += [{"name": f"{figure}_{n}", "value": v, "unit": unit} for n, v in zip(results, values, strict=True)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
