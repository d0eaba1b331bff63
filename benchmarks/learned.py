"""How well the times of nodes with many free sizes are learned (`estimators/measured/learned.py`), by kind of nodes.

    python -m benchmarks.learned [--json FILE] [--batch N] [--device torch-cpu]

The nodes are the timed ones in the table of a net of concatenated branches, which is in the cache and filled at first use. Errors
are relative and absolute: median and 90th percentile. `left_out`: each node in turn, with smoothness and noise as all nodes chose
them, as the device tells it. `held_out`: a quarter of a kind's nodes at random, of which nothing is known, 20 times. The same nodes
are told by two simpler means: a power law in the free sizes and the bytes, by least squares (`power_law`), and the time of the node
that is nearest in bytes (`nearest`). What no means can tell is how far a node's own passes are from its time (`passes`).
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.latency import ready
from tightrope.estimators.measured.grid import Axis, Floats, Ints, Sizes
from tightrope.estimators.measured.learned import Learned
from tightrope.estimators.measured.nodes import bytes_of
from tightrope.estimators.measured.table import Table, identity, pooled

SPLITS = 20  # of a kind's nodes into held-out and known ones
Known = Mapping[Sizes, float]


class Fork(nn.Module):
    """Convolutions side by side, the first 1 x 1 and the others 3 x 3, and their channels one after another."""

    def __init__(self, inputs: int, *widths: int) -> None:
        super().__init__()
        sides = [1, *[3] * (len(widths) - 1)]
        self.branches = nn.ModuleList(nn.Conv2d(inputs, w, k, padding=k // 2) for w, k in zip(widths, sides, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1).relu()


def forked() -> nn.Module:
    """Two and three branches, as SqueezeNet and Inception have them: [b, 1, 28, 28] -> [b, 10] logits."""
    forks = Fork(32, 32, 32), nn.MaxPool2d(2), Fork(64, 48, 64), Fork(112, 48, 48, 32)
    stem, head = (nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU()), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(*stem, *forks, *head)


def by_process(family: str, axes: tuple[Axis, ...], known: Known, sizes: Ints) -> Floats:
    """What the device does."""
    return Learned(axes, known).at(sizes)


def by_power_law(family: str, axes: tuple[Axis, ...], known: Known, sizes: Ints) -> Floats:
    """Least squares of the logarithm of time on those of the free sizes and of the bytes that a node reads and makes."""

    def features(rows: Ints) -> Floats:
        logs = np.log(rows[:, [axis.column for axis in axes]]), np.log(bytes_of(family, rows).sum(axis=0))[:, None]
        made: Floats = np.concatenate([np.ones((len(rows), 1)), *logs], axis=1)
        return made

    weights, *_ = np.linalg.lstsq(features(np.array([*known])), np.log([*known.values()]), rcond=None)
    found: Floats = np.exp(features(sizes) @ weights)
    return found


def by_nearest(family: str, axes: tuple[Axis, ...], known: Known, sizes: Ints) -> Floats:
    """The time of the known node that is nearest in bytes."""
    own, others = np.log(bytes_of(family, np.array([*known])).sum(axis=0)), np.log(bytes_of(family, sizes).sum(axis=0))
    found: Floats = np.array([*known.values()])[np.abs(others[:, None] - own).argmin(axis=1)]
    return found


TOLD: Mapping[str, Callable[[str, tuple[Axis, ...], Known, Ints], Floats]] = {
    "held_out": by_process, "power_law": by_power_law, "nearest": by_nearest,
}  # fmt: skip
HOWS = ("left_out", *TOLD, "passes")


def errors(table: Table, family: str, rng: np.random.Generator) -> dict[str, Floats]:
    """Absolute relative errors of a kind's timed nodes, by how they were told."""
    axes, known = table.families[family].axes, table.families[family].exact
    samples = table.families[family].samples
    passes = [np.array([pooled([one]) for _, one in samples[sizes]]) / time - 1 for sizes, time in known.items()]
    found = {"left_out": [Learned(axes, known).left_out], "passes": passes}
    for _ in range(SPLITS):
        order = [[*known][i] for i in rng.permutation(len(known)).tolist()]
        held, kept = order[: len(known) // 4], {sizes: known[sizes] for sizes in order[len(known) // 4 :]}
        for how, tell in TOLD.items():
            times = tell(family, axes, kept, np.array(held, np.int64))
            found.setdefault(how, []).append(times / [known[sizes] for sizes in held] - 1)
    return {how: np.abs(np.concatenate(parts)) for how, parts in found.items()}


def run(name: str, batch: int) -> dict[str, tuple[int, dict[str, Floats]]]:
    """The number of timed nodes and the errors of each learned kind, and of all together."""
    device, space, source = ready(forked, name, batch)
    device.prepare(space.network, space, source)
    table, rng = device.known(space.network).fitted.table, np.random.default_rng(0)
    found = {family: (len(table.families[family].exact), errors(table, family, rng)) for family in sorted(table.learned())}
    whole = {how: np.concatenate([each[how] for _, each in found.values()]) for how in HOWS}
    return {**found, "all": (sum(nodes for nodes, _ in found.values()), whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=16, help="16 unless given: alone, a node of one image takes a microsecond")
    parser.add_argument("--device", choices=["ort-cpu", "torch-cpu"], default="ort-cpu")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("error in %, median and 90th percentile\n" + "".join(f"{how:>18}" for how in HOWS) + "  nodes kind")
    for kind, (nodes, each) in run(given.device, given.batch).items():
        name = "all" if kind == "all" else f"{kind.partition('{')[0].rpartition(':')[2]}_{identity(kind)}"
        rows.append({"name": f"learned_nodes_{name}", "value": nodes, "unit": "1", "kind": kind})
        text = ""
        for how in HOWS:
            for what, share in (("median", 50), ("p90", 90)):
                value = 100 * float(np.percentile(each[how], share))
                text += f"{value:9.1f}"
                rows.append({"name": f"learned_{how}_{what}_error_{name}", "value": value, "unit": "%", "kind": kind})
        print(f"{text}{nodes:7} {kind}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
