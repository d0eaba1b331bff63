"""Rows of public simulators and published boards (`oracle/*.csv`) as units and networks; for the tests and the benchmark."""

import csv
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from tightrope.estimators.analytic.block import Block, FloatArray
from tightrope.estimators.analytic.spatial import Spatial
from tightrope.spaces import Choice, Extent, Layer, Network, Policy
from tightrope.spaces.unit import Unit

FOLDER = Path(__file__).parent / "oracle"
Row = dict[str, str]

HAQ_UNIFORM = {1: 0.087, 2: 0.178, 3: 0.280, 4: 0.397, 5: 0.528, 6: 0.673, 7: 0.830}  # HAQ's table, b bits over 8 bits
HAQ_ACTS, HAQ_WEIGHTS = 2.00, 1.76  # median cost of a layer when its activation, its weight bits go from 4 to 8

# MLPerf Tiny results v0.5 and v0.7: milliseconds and millijoules of an inference.
TINY = {
    "cortex-m4": {"resnet8": (704, 29.2), "ds_cnn": (182, 7.37), "mobilenet_025": (601, 24.3), "autoencoder": (10.1, 0.416)},
    "cortex-m7": {"resnet8": (70.4, 11.2), "ds_cnn": (22.3, 3.71), "mobilenet_025": (64.4, 10.5), "autoencoder": (2.28, 0.349)},
}


def rows(name: str, folder: Path = FOLDER) -> list[Row]:
    """All rows of the CSV files of a folder whose names begin with `name`."""
    return [row for path in sorted(folder.glob(f"{name}*.csv")) for row in csv.DictReader(path.open(encoding="utf-8"))]


def unit(row: Row) -> Unit:
    """The layer of a BitFusion, ZigZag or nn-dataflow row; their inputs have the halo that a valid convolution needs."""
    kernel, stride = int(row["kernel"]), int(row["stride"])
    out = (int(row["out_hw"]),) * 2 if "out_hw" in row else (int(row["out_h"]), int(row["out_w"]))
    reach = ((out[0] - 1) * stride + kernel, (out[1] - 1) * stride + kernel)
    bits = int(row.get("wgt_bits") or row["w_bits"]), int(row.get("act_bits") or row["a_bits"])
    return Unit(
        row["layer"], "conv", int(row["in_ch"]), int(row["out_ch"]), (kernel, kernel), (stride, stride), (0, 0), (1, 1), 1,
        reach, out, *bits, first=row.get("im2col") == "1",
    )  # fmt: skip


def row_stationary(rows: int, columns: int) -> Spatial:
    """The array of the nn-dataflow rows with their costs, in units of one multiply-accumulate, 1 pJ here; a word is a byte here.

    A multiply-accumulate 1, a word of a register 1 (four for each multiply-accumulate), of the global buffer 6. DRAM is left out:
    for one image the rows charge none of a layer's weights to it.
    """
    return Spatial(
        unroll={"k": columns, "c": rows}, clock_mhz=1.0, interface_bits=64.0, weight_buffer_bytes=rows * columns * 256,
        map_buffer_bytes=55296, weight_register_bytes=256, multiply_pj=1.0, add_pj=0.0, sum_register_pj=2.0, weight_register_pj=1.0,
        input_register_pj=1.0, map_read_pj_per_byte=6.0, map_write_pj_per_byte=6.0, dram_read_pj_per_byte=0.0,
        dram_write_pj_per_byte=0.0,
    )  # fmt: skip


def nn_dataflow() -> tuple[FloatArray, FloatArray]:
    """Ours and nn-dataflow's energy on the chip, in multiply-accumulates, and cycles of 12 x 14 and 16 x 16 units, `n x 3` each."""
    ours, theirs = [], []
    for row in rows("nn_dataflow"):
        block, batch = Block.of(unit({**row, "w_bits": "8", "a_bits": "8"})), int(row["batch"])
        small, large = row_stationary(12, 14), row_stationary(16, 16)
        energy = small.cost(block, batch).energy_mj[0] * 1e9
        ours.append((energy, small.cycles(block, batch)[0][0], large.cycles(block, batch)[0][0]))
        theirs.append((int(row["energy"]) - 200 * int(row["dram_words"]), int(row["cycles_12x14"]), int(row["cycles_16x16"])))
    return np.array(ours, float), np.array(theirs, float)


@lru_cache
def nets() -> dict[str, Network]:
    """The four nets of MLPerf Tiny and MobileNetV2 as HAQ compressed it, layers alone, from `nets.csv`."""

    def layers(net: str) -> Iterator[Layer]:
        for row in rows("nets"):
            if row["net"] == net:
                n = {key: int(value) for key, value in row.items() if key not in ("net", "layer", "kind")}
                yield Layer(
                    row["layer"], row["kind"], Extent(n["in_ch"]), Extent(n["out_ch"]), (n["kernel_h"], n["kernel_w"]),
                    (n["stride"], n["stride"]), groups=n["in_ch"] if row["kind"] == "depthwise" else 1,
                    in_size=(n["in_h"], n["in_w"]), out_size=(n["out_h"], n["out_w"]),
                )  # type: ignore[arg-type]  # fmt: skip

    return {name: Network(tuple(layers(name))) for name in dict.fromkeys(row["net"] for row in rows("nets"))}


def uniform(network: Network, weight_bits: int, act_bits: int) -> Policy:
    """The policy that gives every layer the same bits."""
    return Policy.make(network, {}, {layer.name: Choice(weight_bits, act_bits) for layer in network.layers})
