"""Systolic arrays that hold weights, outputs or inputs still, in the closed forms of SCALE-Sim's stall-free cycles.

Samajdar et al., "A systematic methodology for characterizing scalability of DNN accelerators using SCALE-Sim", ISPASS 2020,
section III: a product runs in folds over the array, each of which fills, streams and drains.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import ArrayLike

from tightrope.estimators.analytic.block import Block, Figures, FloatArray
from tightrope.estimators.analytic.energy import mac_pj
from tightrope.estimators.analytic.model import Model, Pair
from tightrope.spaces.batch import IntArray
from tightrope.spaces.errors import DeviceError


@dataclass(frozen=True)
class Systolic(Model):
    """`rows` x `columns` multiply-accumulate units; `dataflow` is `ws`, `os` or `is` (weights, outputs, inputs held still).

    Memory is taken to keep up, as in SCALE-Sim's stall-free mode, so that bits save energy and bytes but no cycles. The
    groups of a convolution run one after another.
    """

    rows: int
    columns: int
    dataflow: str
    clock_mhz: float
    accumulator_bits: int
    multiply_pj: float
    add_pj: float
    sram_pj_per_byte: float
    dram_pj_per_byte: float

    def __post_init__(self) -> None:
        if self.dataflow not in ("ws", "os", "is"):
            raise DeviceError(f"dataflow must be ws, os or is, got {self.dataflow!r}")

    def pairs(self, kind: str) -> tuple[Pair, ...]:
        """Every pair of 2..8 bits, on 8-bit units."""
        return tuple((w, a) for w in range(2, 9) for a in range(2, 9))

    def cycles(self, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> IntArray:
        """Cycles of an `m x k` by `k x n` product: `m` output pixels, `n` filters, `k` weights a filter."""
        m, n, k = (np.asarray(x, np.int64) for x in (m, n, k))
        r, c = self.rows, self.columns
        if self.dataflow == "os":
            found: IntArray = -(-m // r) * -(-n // c) * (r + c + k - 2) - 1
        else:
            across, streamed = (n, m) if self.dataflow == "ws" else (m, n)
            found = -(-k // r) * -(-across // c) * (2 * r + c + streamed - 2) - 1
        return found

    def cost(self, block: Block, batch: int) -> Figures:
        """Stall-free cycles; energy of the products, of the array's use of SRAM, and of each operand's one trip from DRAM."""
        m, n = batch * block.pixels * np.ones_like(block.inputs), block.outputs // block.groups
        k = block.inputs // block.groups * prod(block.unit.kernel)
        times = block.groups * block.unit.calls
        energy = (
            block.macs * batch * mac_pj(block, self.multiply_pj, self.add_pj)
            + times * self._sram_bytes(m, n, k, block) * self.sram_pj_per_byte
            + block.unit.calls * self.dram_pj_per_byte
            * (block.weight_bytes + batch * (block.input_bytes + block.output_items * block.act_bits / 8))
        )  # fmt: skip
        return Figures.make(
            len(block), compute=(self.cycles(m, n, k) * times).astype(np.float64), energy_pj=energy, clock_mhz=self.clock_mhz
        )

    def _sram_bytes(self, m: IntArray, n: IntArray, k: IntArray, block: Block) -> FloatArray:
        """Bytes that all folds read and write: what stands still once, what streams once a fold, unfinished sums twice."""
        r, c = self.rows, self.columns
        weights, inputs, sums = k * n * block.weight_bits / 8, m * k * block.act_bits / 8, m * n * self.accumulator_bits / 8
        if self.dataflow == "os":
            return -(-m // r) * weights + -(-n // c) * inputs + sums
        folds = 2 * -(-k // r) - 1
        if self.dataflow == "ws":
            return weights + -(-n // c) * inputs + folds * sums
        return -(-m // c) * weights + inputs + folds * sums
