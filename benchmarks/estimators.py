"""How far devices are from public simulators, published boards and the clock, and how fast they answer.

    python benchmarks/estimators.py [--json FILE] [--quick] [--oracle FOLDER] [--simulated]

`--oracle` takes further rows: every `bitfusion*.csv`, `scalesim*.csv` and `zigzag*.csv` of the folder, in the columns of
`tests/estimators/oracle`. `--simulated` leaves out what has to be timed; `--quick` times fewer policies, and at batch 16 and on
`torch-cpu` the transformer only. Figures of `ort-cpu` and `torch-cpu` are the worst of three nets (`benchmarks/latency.py`), but
for the mean coverage of intervals and for `demo_table_...`. `elsewhere_...` goes the way of a device that is elsewhere, on this
machine: the job of the demo's net, `runner.py` in an isolated interpreter, the import, and its error on nets that no fit saw.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "estimators")]

from handmade import Handmade, mobilenet, resnet8, vit  # noqa: E402
from oracles import FOLDER, HAQ_ACTS, HAQ_UNIFORM, HAQ_WEIGHTS, TINY, nets, nn_dataflow, rows, uniform, unit  # noqa: E402

from benchmarks import latency, memory  # noqa: E402
from tightrope.compressors.export.skeleton import skeleton_of  # noqa: E402
from tightrope.compressors.prepare import prepare  # noqa: E402
from tightrope.estimators.analytic import load_profile, profiles  # noqa: E402
from tightrope.estimators.analytic.bitfusion import BitFusion  # noqa: E402
from tightrope.estimators.analytic.block import Block  # noqa: E402
from tightrope.estimators.analytic.spatial import Spatial  # noqa: E402
from tightrope.estimators.analytic.systolic import Systolic  # noqa: E402
from tightrope.estimators.measured import imported, job, runner  # noqa: E402
from tightrope.estimators.measured.base import mark_of  # noqa: E402
from tightrope.estimators.measured.ort import OrtCpu  # noqa: E402
from tightrope.search.demo_task import BasicBlock, ResNet  # noqa: E402
from tightrope.search.evaluate import Source  # noqa: E402
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
    """Random joint policies a second of process time, the best of two: met for the first time, and with variants in the tables.

    The slowest device of all profiles is named; BitFusion, whose every new variant is a search over tilings, stands alone.
    """
    networks = {net.__name__: Handmade(net).network for net in (resnet8, mobilenet, vit)}
    first: dict[tuple[str, str], float] = {}
    again: dict[tuple[str, str], float] = {}
    for name in profiles():
        for title, network in networks.items():
            space, rng = Space.build(network, load_profile(name).pairs), np.random.default_rng(0)
            for _ in range(2):
                device, policies = load_profile(name), [space.sample(rng) for _ in range(count)]
                for into in (first, again, again):
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
    "noise_floor": "latency_noise_floor", "interval_coverage": "latency_interval_coverage",
    "other_process_mape": "latency_other_process_mape", "other_process_within_10pct": "latency_other_process_within_10pct",
    "nodes_match": "nodes_match", "size_worst_error": "size_worst_error", "policies_a_second": "policies_a_second",
    "patterns_equal_lowering": "patterns_equal_lowering", "patterns_worst_error": "patterns_worst_error",
}  # fmt: skip


def measured(name: str, batch: int, policies: int, nets: Sequence[str]) -> Iterator[Figure]:
    """A device against the clock, the worst of some nets; at batch 1 what the demo's table takes, too."""
    found = {net: latency.figures(net, name, policies, batch) for net in nets}
    known = next(iter(found.values()))
    suffix = f"{name.replace('-', '_')}_batch{batch}"
    for title, figure in MEASURED.items():
        if figure in known:
            yield f"{title}_{suffix}", latency.worst(figure, [f[figure][0] for f in found.values()]), known[figure][1]
    if batch == 1 and "demo" in found:
        for title in ("table_cpu_seconds", "table_reopen_seconds", "table_peak_memory"):
            yield f"demo_{title}_{suffix}", *found["demo"][title]


def ram(policies: int) -> Iterator[Figure]:
    """Peak RAM against ONNX Runtime's arena, the worst of four nets at batch 1 and 16."""
    found = [memory.run(net, [1, 16], policies) for net in memory.NETS]
    for batch in (1, 16):
        yield f"ram_worst_error_batch{batch}", max(f[f"ram_worst_error_batch{batch}"][0] for f in found), "%"
        yield f"ram_within_10pct_batch{batch}", min(f[f"ram_within_10pct_batch{batch}"][0] for f in found), "%"


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016, table 1), random weights."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [BasicBlock(64, 64, 1), BasicBlock(64, 64, 1)]
    for width in (128, 256, 512):
        blocks += [BasicBlock(width // 2, width, 2), BasicBlock(width, width, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def probe(model: nn.Module, images: Tensor) -> str:
    """The job that covers a net's space at batch 1."""
    prepared, device = prepare(model.eval(), images, [(images, torch.zeros(len(images)))]), OrtCpu()
    space = Space.build(prepared.network, device.pairs)
    mark = mark_of(prepared.network, space, 1, {**device.versions, "isa": device.isa})
    return "".join(
        job.write(prepared.network, space, Source(prepared, skeleton_of(prepared)), device.encoder(prepared.network), mark)
    )


def resnet18_job() -> Iterator[Figure]:
    """What the job of ResNet-18's space takes."""
    start = time.process_time()
    text = probe(resnet18(), torch.randn(2, 3, 224, 224))
    yield "resnet18_job_mb", len(text) / 1e6, "MB"
    yield "resnet18_job_models", text.count('"model":'), "models"
    yield "resnet18_job_cpu_seconds", time.process_time() - start, "s"


def elsewhere() -> Iterator[Figure]:
    """Probe, run and import, as the module's docstring says."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TIGHTROPE_CACHE=folder):
        written, results = Path(folder, "job.jsonl"), Path(folder, "results.csv")
        written.write_text(probe(ResNet(), torch.randn(64, 1, 28, 28)), encoding="utf-8")
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-I", str(runner.__file__), written, results], check=True, stdout=subprocess.DEVNULL)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = imported.import_results("elsewhere", results, written)
    yield "elsewhere_nodes", report.nodes, "nodes"
    yield "elsewhere_runner_cpu_seconds", end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime, "s"
    yield "elsewhere_left_out_mape", imported.mape(report.left_out), "%"
    yield "elsewhere_held_out_mape", imported.mape(report.held_out), "%"
    yield "elsewhere_held_out_within_10pct", imported.within(report.held_out), "%"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write [{name, value, unit}] here")
    parser.add_argument("--quick", action="store_true", help="time fewer policies")
    parser.add_argument("--simulated", action="store_true", help="leave out what has to be timed")
    parser.add_argument("--oracle", type=Path, default=FOLDER, help="folder of the CSV rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    figures: list[Figure] = []
    parts = [bitfusion(options.oracle), scalesim(options.oracle), zigzag(options.oracle), dataflow(), boards(), bitserial()]
    parts += [speed(500 if options.quick else 4000)]
    if not options.simulated:
        policies, nets = (10, ["transformer"]) if options.quick else (30, [*latency.NETS])
        parts += [resnet18_job(), ram(policies), elsewhere(), measured("ort-cpu", 1, policies, [*latency.NETS])]
        parts += [measured("torch-cpu", 1, policies, nets), measured("ort-cpu", 16, policies, nets)]
    for part in parts:
        for name, value, unit_ in part:
            print(f"{name:48s} {value:14.4f} {unit_}", flush=True)
            figures.append((name, value, unit_))
            if options.json:  # at once: what has been measured is not lost with what fails
                options.json.write_text(json.dumps([{"name": n, "value": v, "unit": u} for n, v, u in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
