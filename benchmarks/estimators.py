"""How far devices are from public simulators, published boards and the clock, and how fast they answer.

    python benchmarks/estimators.py [--json FILE] [--quick] [--oracle FOLDER] [--simulated]

`--oracle` takes further rows: every `bitfusion*.csv`, `scalesim*.csv` and `zigzag*.csv` of the folder, in the columns of
`tests/estimators/oracle`. `--quick` times fewer policies; `--simulated` leaves out what has to be timed. Figures of `ort-cpu` are
the worst of three nets (`benchmarks/latency.py`), with the batch size behind their name.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "estimators")]

from handmade import Handmade, mobilenet, resnet8, vit  # noqa: E402
from oracles import FOLDER, HAQ_ACTS, HAQ_UNIFORM, HAQ_WEIGHTS, TINY, nets, nn_dataflow, rows, uniform, unit  # noqa: E402

from tightrope.estimators.analytic import load_profile, profiles  # noqa: E402
from tightrope.estimators.analytic.bitfusion import BitFusion  # noqa: E402
from tightrope.estimators.analytic.block import Block  # noqa: E402
from tightrope.estimators.analytic.spatial import Spatial  # noqa: E402
from tightrope.estimators.analytic.systolic import Systolic  # noqa: E402
from tightrope.spaces import Space  # noqa: E402
from tightrope.spaces.unit import lower  # noqa: E402

Figure = tuple[str, float, str]  # name, value, unit


def bitfusion(folder: Path) -> Iterator[Figure]:
    """Cycles row by row; the interface of a row stands at the end of its configuration (`bf_e_if192`)."""
    model = load_profile("bitfusion").model
    assert isinstance(model, BitFusion)
    equal, errors = 0, []
    found = rows("bitfusion", folder)
    for row in found:
        width = re.search(r"_if(\d+)", row["config"])
        array = replace(model, interface_bits=int(width[1])) if width else model
        best = array.search(Block.of(unit(row)), int(row["batch"]))
        equal += int(best.cycles[0]) == int(row["total_cycles"])
        pairs = ((best.dram_read_bits, "dram_read_bits", 1.0), (best.dram_write_bits, "dram_write_bits", 1.0),
                 (best.energy_pj, "energy_nJ_dram15pJ", 1e3))  # fmt: skip
        errors.append([abs(ours[0] / (scale * float(row[key])) - 1) for ours, key, scale in pairs])
    worst = 100 * np.max(errors, axis=0)
    yield "bitfusion_rows", len(found), "rows"
    yield "bitfusion_cycles_equal", equal, "rows"
    yield "bitfusion_dram_worst_error", float(worst[:2].max()), "%"
    yield "bitfusion_energy_worst_error", float(worst[2]), "%"


def scalesim(folder: Path) -> Iterator[Figure]:
    """Stall-free cycles, from each row's own product; rows of SCALE-Sim's USER bandwidth mode are no oracle."""
    found = [row for row in rows("scalesim", folder) if "CALC" in row["mode"]]
    equal = 0
    for row in found:
        model = load_profile(f"systolic-{row['dataflow']}").model
        assert isinstance(model, Systolic)
        array = replace(model, rows=int(row["array_rows"]), columns=int(row["array_cols"]))
        cycles = array.cycles(int(row["gemm_M"]), int(row["gemm_N"]), int(row["gemm_K"]))
        equal += int(cycles) == int(row["total_cycles"])
    yield "scalesim_rows", len(found), "rows"
    yield "scalesim_cycles_equal", equal, "rows"


def zigzag(folder: Path) -> Iterator[Figure]:
    """Latency and energy, by hardware: rank correlation and geometric-mean ratio of ours to ZigZag's."""
    found = rows("zigzag", folder)
    for hardware in dict.fromkeys(row["hardware"] for row in found):
        model = load_profile(hardware.replace("_", "-")).model
        assert isinstance(model, Spatial)
        own = [row for row in found if row["hardware"] == hardware]
        figures = [model.cost(Block.of(unit(row)), 1) for row in own]
        ours = np.array([(f.latency_ms[0] * model.clock_mhz * 1e3, f.energy_mj[0] * 1e9) for f in figures])
        theirs = np.array([(float(row["latency_cycles"]), float(row["energy_pJ"])) for row in own])
        yield f"{hardware}_rows", len(own), "rows"
        for i, metric in enumerate(("latency", "energy")):
            yield f"{hardware}_{metric}_spearman", float(spearmanr(ours[:, i], theirs[:, i])[0]), ""
            yield f"{hardware}_{metric}_ratio", float(np.exp(np.log(ours[:, i] / theirs[:, i]).mean())), "x"
            yield f"{hardware}_{metric}_worst", float(np.exp(np.abs(np.log(ours[:, i] / theirs[:, i])).max())), "x"


def dataflow() -> Iterator[Figure]:
    """nn-dataflow's row-stationary arrays: energy on the chip (12 x 14) and cycles of two arrays; the rows of the tests alone."""
    ours, theirs = nn_dataflow()
    yield "nn_dataflow_rows", len(ours), "rows"
    for i, metric in enumerate(("energy_on_chip", "cycles_12x14", "cycles_16x16")):
        yield f"nn_dataflow_{metric}_spearman", float(spearmanr(ours[:, i], theirs[:, i])[0]), ""
        yield f"nn_dataflow_{metric}_ratio", float(np.exp(np.log(ours[:, i] / theirs[:, i]).mean())), "x"
        yield f"nn_dataflow_{metric}_worst", float(np.exp(np.abs(np.log(ours[:, i] / theirs[:, i])).max())), "x"


def boards() -> Iterator[Figure]:
    """The MLPerf Tiny results: worst error of a board over the four nets."""
    for board, results in TINY.items():
        device = load_profile(board)
        costs = {net: device.estimate(nets()[net], uniform(nets()[net], 8, 8)) for net in results}
        yield f"{board}_latency_worst_error", 100 * max(abs(costs[n].latency_ms / ms - 1) for n, (ms, _) in results.items()), "%"
        yield (
            f"{board}_energy_worst_error",
            100 * max(abs((costs[n].energy_mj or 0) / mj - 1) for n, (_, mj) in results.items()),
            "%",
        )


def bitserial() -> Iterator[Figure]:
    """HAQ's published table: MobileNetV2 at batch 16."""
    model, network = load_profile("bitserial").model, nets()["mobilenet_v2"]
    layers = lower(network, uniform(network, 8, 8))

    def cost(weight_bits: int, act_bits: int) -> np.ndarray:
        units = (replace(u, weight_bits=weight_bits, act_bits=act_bits) for u in layers)
        return np.array([model.cost(Block.of(u), 16).latency_ms[0] for u in units])

    whole = cost(8, 8)
    errors = [abs(cost(b, b).sum() / whole.sum() / ratio - 1) for b, ratio in HAQ_UNIFORM.items()]
    yield "haq_uniform_worst_error", 100 * float(max(errors)), "%"
    yield "haq_double_act_bits_error", 100 * float(abs(np.median(whole / cost(8, 4)) / HAQ_ACTS - 1)), "%"
    yield "haq_double_weight_bits_error", 100 * float(abs(np.median(whole / cost(4, 8)) / HAQ_WEIGHTS - 1)), "%"


def speed(count: int) -> Iterator[Figure]:
    """Random joint policies a second of process time: met for the first time, and with variants already in the tables.

    The slowest device of all profiles is named; BitFusion, whose every new variant is a search over tilings, stands alone.
    """
    networks = {net.__name__: Handmade(net).network for net in (resnet8, mobilenet, vit)}
    first: dict[tuple[str, str], float] = {}
    again: dict[tuple[str, str], float] = {}
    for name in profiles():
        for title, network in networks.items():
            device = load_profile(name)
            space, rng = Space.build(network, device.pairs), np.random.default_rng(0)
            policies = [space.sample(rng) for _ in range(count)]
            for into in (first, again, again, again):
                start = time.process_time()
                device.estimate_many(network, policies)
                into[name, title] = max(into.get((name, title), 0.0), count / (time.process_time() - start))
    for title in networks:
        others = [name for name in profiles() if name != "bitfusion"]
        yield f"policies_a_second_{title}", min(again[name, title] for name in profiles()), "1/s"
        yield f"policies_a_second_{title}_new", min(first[name, title] for name in others), "1/s"
        yield f"policies_a_second_{title}_new_bitfusion", first["bitfusion", title], "1/s"


MEASURED = {
    "mape": "latency_mape", "within_10pct": "latency_within_10pct", "spearman": "latency_spearman",
    "noise_floor": "latency_noise_floor",
    "interval_coverage": "latency_interval_coverage", "nodes_match": "nodes_match", "size_worst_error": "size_worst_error",
    "policies_a_second_ort_cpu": "policies_a_second", "patterns_equal_lowering": "patterns_equal_lowering",
    "patterns_worst_error": "patterns_worst_error", "table_cpu_seconds": "table_cpu_seconds",
    "table_reopen_seconds": "table_reopen_seconds",
}  # fmt: skip


def measured(quick: bool) -> Iterator[Figure]:
    """`ort-cpu` against the clock at batch 1 and 16, and what the probe job of ResNet-18 takes."""
    from benchmarks import latency

    for batch in (1, 16):
        found = [latency.run(net, "ort-cpu", 15 if quick else 30, batch, np.random.default_rng(2)) for net in latency.NETS]
        for name, figure in MEASURED.items():
            worst = min if figure in latency.WORST_IS_LEAST else max
            yield f"{name}_batch{batch}", worst(f[figure][0] for f in found), found[0][figure][1]
    yield "memory_mib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB"
    yield "resnet18_job_mb", resnet18_job() / 1e6, "MB"


def resnet18_job() -> int:
    """Bytes of the job that covers ResNet-18's space."""
    import torch

    from benchmarks.nets import NETS
    from tightrope.compressors.export.skeleton import skeleton_of
    from tightrope.compressors.prepare import prepare
    from tightrope.estimators.measured import job
    from tightrope.estimators.measured.base import mark_of
    from tightrope.estimators.measured.ort import OrtCpu
    from tightrope.search.evaluate import Source

    torch.manual_seed(0)
    model, images = NETS["resnet18"]()
    prepared, device = prepare(model.eval(), images, [(images, torch.zeros(len(images)))]), OrtCpu()
    space = Space.build(prepared.network, device.pairs)
    mark = mark_of(prepared.network, space, 1, {**device.versions, "isa": device.isa})
    source = Source(prepared, skeleton_of(prepared))
    return sum(len(line) for line in job.write(prepared.network, space, source, device.encoder(prepared.network), mark))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write [{name, value, unit}] here")
    parser.add_argument("--quick", action="store_true", help="time fewer policies")
    parser.add_argument("--simulated", action="store_true", help="leave out what has to be timed")
    parser.add_argument("--oracle", type=Path, default=FOLDER, help="folder of the CSV rows")
    options = parser.parse_args()
    figures: list[Figure] = []
    parts = [bitfusion(options.oracle), scalesim(options.oracle), zigzag(options.oracle), dataflow(), boards(), bitserial()]
    parts += [speed(500 if options.quick else 4000)] + ([] if options.simulated else [measured(options.quick)])
    for part in parts:
        for name, value, unit_ in part:
            print(f"{name:48s} {value:14.4f} {unit_}", flush=True)
            figures.append((name, value, unit_))
    if options.json:
        options.json.write_text(json.dumps([{"name": n, "value": v, "unit": u} for n, v, u in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
