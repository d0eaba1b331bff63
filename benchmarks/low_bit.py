"""Accuracy at few bits, post-training and after a little training, on the harder task's three nets.

    python -m benchmarks.low_bit [--json FILE] [--quick] [--seeds N] [--nets residual ...] [--trained-seeds N] [--out DIR]

Every layer but the first and the last has W4A8, W3A8 or W2A8; those two have 8 bits. What is scored is the ONNX graph that the
policy is exported to (codes below 8 bits in int8, which is exact), on one thread. Post-training variants are chosen for each net
and width by the search split, over all seeds, and reported on the test split. Of the residual net each seed is a net of its own;
of the others there is one trained net, and a seed draws another 500 calibration images only. A gap is what is lost against the
dense net, paired by image and seed; intervals are bootstrapped over seeds and source digits. `w4_best_gap` and its like are of the
net that loses most. Every finished cell is a file in DIR: run it again to go on; what is there is what is shown.
"""

import argparse
import hashlib
import json
import logging
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.recipe import Cells, bits, bootstrap, whole
from benchmarks.tasks import NETS, splits, trained
from benchmarks.tasks.clutter import Batches, Canvases
from tightrope.compressors.assemble import assemble
from tightrope.compressors.compress import compress, payload_of
from tightrope.compressors.export.skeleton import skeleton_of
from tightrope.compressors.finetune import Tuning, finetune
from tightrope.compressors.prepare import Prepared, Settings, prepare
from tightrope.search.evaluate import Source, runner
from tightrope.spaces.network import Network
from tightrope.spaces.policy import Choice, Policy

WIDTHS = (4, 3, 2)
TRAINED = {"residual": 8, "depthwise": 1, "transformer": 1}
"""Of how many seeds there is a net; a seed beyond takes the net of seed 0, and other calibration images."""
PLAIN = Settings(clip="max", rounding="nearest", bias_correction=False, equalise=False)
CLIPPED = replace(PLAIN, clip="mse")
CORRECTED = replace(CLIPPED, bias_correction=True)
VARIANTS = {
    "plain": PLAIN,
    "clip": CLIPPED,
    "equal": replace(CLIPPED, equalise=True),
    "bias": CORRECTED,
    "bias_equal": replace(CORRECTED, equalise=True),
    "gptq": replace(CORRECTED, rounding="gptq"),
    "gptq_equal": replace(CORRECTED, rounding="gptq", equalise=True),
    "adaround": replace(CORRECTED, rounding="adaround"),
}
LSQ = Tuning(epochs=3, lr=1e-3, weight_steps="lsq", ranges="lsq")  # lr by the search split: 3e-3 cost the transformer a point
CALIBRATION = 500
BATCH = 100  # divides both splits


def uniform(network: Network, width: int) -> Policy:
    """This width everywhere, 8 bits in the first and the last layer, 8-bit activations; 32 is the dense net."""
    if width == 32:
        return Policy.make(network)
    ends = {network.layers[0].name, network.layers[-1].name}
    return Policy.make(network, choices={x.name: Choice(8 if x.name in ends else width, 8) for x in network.layers})


class Net:
    """One trained net with its calibration images and the graph that it is scored on."""

    def __init__(self, name: str, seed: int, quick: bool) -> None:
        self.model: nn.Module = trained(name, seed if seed < TRAINED[name] else 0)
        data = splits()
        train = data["train"].part
        rows = slice(CALIBRATION * seed, CALIBRATION * (seed + 1))
        drawn = Canvases(train.images[rows], train.targets[rows], train.sources[rows])
        self.train = data["train"][: 10 if quick else len(data["train"])]
        self.calibration = Batches(drawn)
        self.source = Source(self.prepared(PLAIN), skeleton_of(self.prepared(PLAIN)))

    @cache  # noqa: B019
    def prepared(self, settings: Settings) -> Prepared:
        """One calibration for all variants that calibrate alike."""
        if settings.rounding != "nearest" or settings.clip != "max" or settings.bias_correction:
            like = self.prepared(replace(PLAIN, equalise=settings.equalise))
            return replace(like, settings=settings, memo=type(like.memo)(like.memo.limit))
        return prepare(self.model, self.calibration[0][0][:1], self.calibration, settings)

    def scores(self, payload: Any) -> dict[str, Any]:
        """Accuracy on the search split in percent, and which test images are right, as a text of 0 and 1."""
        run, right = runner(self.source.written(payload, BATCH)), {}
        for split in ("search", "test"):
            images, targets = whole(split)
            outputs = [run([images[at : at + BATCH]]) for at in range(0, len(images), BATCH)]
            right[split] = np.concatenate(outputs).argmax(1) == targets
        return {"search": 100 * float(right["search"].mean()), "test": "".join("01"[int(r)] for r in right["test"])}

    def policy(self, width: int) -> Policy:
        return uniform(self.source.prepared.network, width)

    def post_training(self) -> dict[str, Any]:
        """`dense`, and every variant at every width."""
        found = {"dense": self.scores(payload_of(compress(None, self.policy(32), self.prepared(PLAIN))))}
        for name, settings in VARIANTS.items():
            for width in WIDTHS:
                found[f"w{width}_{name}"] = self.scores(assemble(self.prepared(settings), self.policy(width)))
        return found

    def after_training(self, width: int, tuning: Tuning) -> dict[str, Any]:
        """From GPTQ's rounding, some epochs of learned steps."""
        module = compress(None, self.policy(width), self.prepared(VARIANTS["gptq_equal"]))
        finetune(module, self.model, self.train, tuning)
        return self.scores(payload_of(module))


@lru_cache(maxsize=1)
def net(name: str, seed: int, quick: bool) -> Net:
    return Net(name, seed, quick)


def gap(cells: list[dict[str, Any]], key: str) -> tuple[float, float, float, float]:
    """Points lost on the test split against the dense net: mean, standard error and the ends of the 95 % interval."""
    lost = np.stack([bits(cell["dense"]) - bits(cell[key]) for cell in cells])
    return bootstrap(lost, np.random.default_rng(0))


def figures(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Print the table of all nets; returns the figures. `found` has for each net a cell a seed."""
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str = "points") -> None:
        rows.append({"name": name, "value": round(value, 5), "unit": unit})

    worst: dict[str, tuple[float, float, float]] = {}
    for name, cells in found.items():
        add(f"{name}_seeds", len(cells), "1")
        dense = 100 * np.mean([bits(cell["dense"]).mean() for cell in cells])
        add(f"{name}_dense_accuracy", dense, "%")
        print(f"\n{name}: dense {dense:.2f} % on test, {len(cells)} seeds; points lost, 95 % interval")
        print(f"{'':12}" + "".join(f"{f'W{width}A8':>24}" for width in WIDTHS))
        for variant in [*VARIANTS, "lsq"]:
            line = ""
            for width in WIDTHS:
                have = [cell for cell in cells if f"w{width}_{variant}" in cell]
                if not have:
                    line += f"{'-':>24}"
                    continue
                mean, _, low, high = gap(have, f"w{width}_{variant}")
                line += f"{f'{mean:6.2f} ({low:.2f} to {high:.2f})':>24}"
                add(f"{name}_w{width}_{variant}_gap", mean)
                if variant == "lsq":
                    add(f"{name}_w{width}_lsq_seeds", len(have), "1")
                    keep_worst(worst, f"w{width}_lsq_gap", mean, low, high)
            print(f"{variant:12}{line}")
        for width in WIDTHS:
            best = max(VARIANTS, key=lambda v: np.mean([cell[f"w{width}_{v}"]["search"] for cell in cells]))
            mean, _, low, high = gap(cells, f"w{width}_{best}")
            print(f"W{width}A8: {best} has the most on the search split; it loses {mean:.2f} ({low:.2f} to {high:.2f}) on test")
            add(f"{name}_w{width}_best_gap", mean)
            keep_worst(worst, f"w{width}_best_gap", mean, low, high)
    for figure, (mean, low, high) in worst.items():
        add(figure, mean)
        add(f"{figure}_lo", low)
        add(f"{figure}_hi", high)
    return rows


def keep_worst(worst: dict[str, tuple[float, float, float]], figure: str, mean: float, low: float, high: float) -> None:
    if figure not in worst or mean > worst[figure][0]:
        worst[figure] = mean, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help='write [{"name", "value", "unit"}] here')
    parser.add_argument("--quick", action="store_true", help="residual net, one seed, little training: that it runs, no more")
    parser.add_argument("--seeds", type=int, help="5 unless given")
    parser.add_argument("--nets", nargs="+", choices=NETS, help="some of the nets; all three unless given")
    parser.add_argument("--trained-seeds", type=int, help="seeds that are trained too, after the others; all unless given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cache/low_bit"), help="folder of the cells")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("recipe").setLevel(logging.INFO)
    torch.set_num_threads(1)
    seeds = given.seeds or (1 if given.quick else 5)
    nets = given.nets or (["residual"] if given.quick else [*NETS])
    tuning = replace(LSQ, epochs=1) if given.quick else LSQ
    tags = (hashlib.sha256(f"{what} {given.quick}".encode()).hexdigest()[:8] for what in (VARIANTS, (VARIANTS, tuning)))
    cells, trained_cells = (Cells(given.out / tag) for tag in tags)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in nets}
    for seed in range(seeds):
        for name in nets:
            make = lambda name=name, seed=seed: net(name, seed, given.quick).post_training()  # noqa: E731
            found[name].append(cells.get(f"{name}-{seed}", make))
    for seed in range(min(seeds, seeds if given.trained_seeds is None else given.trained_seeds)):
        for name in nets:
            for width in WIDTHS[:2]:
                key = f"w{width}_lsq"
                found[name][seed][key] = trained_cells.get(
                    f"{name}-{seed}-{key}",
                    lambda name=name, seed=seed, width=width: net(name, seed, given.quick).after_training(width, tuning),  # type: ignore[misc]
                )
    rows = figures(found)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
