"""Peak RAM of `ort-cpu`: predicted against the arena that ONNX Runtime really takes, on the demo's net and the task's three.

    python -m benchmarks.memory [--json FILE] [--quick] [--batch N ...] [--net NAME ...]

For each net and batch size random policies, drawn as in `benchmarks/latency.py`, are predicted, built as they would be exported,
and called twice; what the arena takes in the second call counts. Weights are random, which does not matter. `ram_exact` is the
share without any error, `estimate_ms` what a prediction costs in CPU time.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import tasks
from benchmarks.latency import random_policy
from tightrope.compressors.export.skeleton import skeleton_of
from tightrope.compressors.prepare import prepare
from tightrope.estimators.measured.actual import arena_taken
from tightrope.estimators.measured.arena import arena_bytes
from tightrope.estimators.measured.ort import OrtCpu, OrtRuntime, isa
from tightrope.search import demo_task
from tightrope.search.evaluate import Source
from tightrope.spaces import Space

NETS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "demo": (demo_task.ResNet, (1, 28, 28)), **{name: (net.build, (3, 40, 40)) for name, net in tasks.NETS.items()},
}  # fmt: skip


def run(name: str, batches: list[int], policies: int) -> dict[str, tuple[float, str]]:
    """The figures of one net, with their units."""
    build, shape = NETS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(64, *shape)
    prepared = prepare(build().eval(), images[:2], [(images, torch.zeros(64))])
    space, source = Space.build(prepared.network, OrtCpu().pairs), Source(prepared, skeleton_of(prepared))
    found: dict[str, tuple[float, str]] = {}
    for batch in batches:
        rng, runtime = np.random.default_rng(2), OrtRuntime(prepared.network, source, batch, isa())
        chosen = [random_policy(space, rng) for _ in range(policies)]
        start = time.process_time()
        peaks = np.array([arena_bytes(runtime.lowering.nodes(policy), runtime.block) for policy in chosen])
        spent = time.process_time() - start
        errors = np.abs(peaks / [arena_taken(source.model(policy, batch)) for policy in chosen] - 1)
        found |= {
            f"ram_median_error_batch{batch}": (100 * float(np.median(errors)), "%"),
            f"ram_worst_error_batch{batch}": (100 * float(errors.max()), "%"),
            f"ram_within_10pct_batch{batch}": (100 * float(np.mean(errors <= 0.1)), "%"),
            f"ram_exact_batch{batch}": (100 * float(np.mean(errors == 0)), "%"),
            f"estimate_ms_batch{batch}": (1e3 * spent / policies, "ms"),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="10 policies a net instead of 30")
    parser.add_argument("--batch", type=int, action="append", help="batch size, several times; 1 and 16 unless given")
    parser.add_argument("--net", choices=[*NETS], action="append", help="of these nets only")
    given = parser.parse_args()
    rows = []
    for net in given.net or NETS:
        for figure, (value, unit) in run(net, given.batch or [1, 16], 10 if given.quick else 30).items():
            print(f"{net + ' ' + figure:44} {value:10.3f} {unit}", flush=True)
            rows.append({"name": f"{figure}_{net}", "value": value, "unit": unit})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
