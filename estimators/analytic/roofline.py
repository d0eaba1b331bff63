"""Roofline of a CPU or GPU: a unit takes the longer of its arithmetic and its traffic, and a launch.

Williams, Waterman and Patterson, "Roofline", CACM 2009. A width speeds up arithmetic only where the profile lists an
instruction for it; otherwise operands are only stored narrow and widened to the next instruction that there is.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from tightrope.estimators.analytic.block import Block, Figures, FloatArray
from tightrope.estimators.analytic.model import Model, Pair, Traffic
from tightrope.spaces.errors import DeviceError

CLASSES = ("conv", "pointwise", "depthwise", "linear")


def kernel_class(block: Block) -> str:
    """The class of kernel that runs a block: linear, depthwise, pointwise (1 x 1) or conv."""
    if block.unit.kind != "conv":
        return block.unit.kind
    return "pointwise" if prod(block.unit.kernel) == 1 else "conv"


@dataclass(frozen=True)
class Roofline(Model):
    """Peaks in GMAC/s and energies in pJ/MAC by instruction, named `<weight bits>x<activation bits>` (`8x8`, `32x32`).

    `efficiency` is the share of the peak that a class of kernel reaches. Traffic within `cache_bytes` moves at `cache_gb_s`.
    """

    peak_gmacs: dict[str, float]
    mac_pj: dict[str, float]
    efficiency: dict[str, float]
    cache_bytes: int
    cache_gb_s: float
    dram_gb_s: float
    launch_us: float
    cache_pj_per_byte: float
    dram_pj_per_byte: float
    costs_operators = True

    def __post_init__(self) -> None:
        if set(self.mac_pj) != set(self.peak_gmacs):
            raise DeviceError(f"mac_pj must name the instructions of peak_gmacs, {[*self.peak_gmacs]}, got {[*self.mac_pj]}")
        if set(self.efficiency) != set(CLASSES) or max(self.efficiency.values()) > 1:
            raise DeviceError(f"efficiency must give a share of at most 1 for each of {CLASSES}, got {self.efficiency}")
        for name in self.peak_gmacs:
            parts = name.split("x")
            if len(parts) != 2 or not all(p.isdigit() for p in parts):
                raise DeviceError(f"an instruction of peak_gmacs must be named like 8x8, got {name!r}")

    @cached_property
    def instructions(self) -> list[tuple[int, int, float, float]]:
        """Weight bits, activation bits, GMAC/s and pJ/MAC of each instruction, fastest first."""
        rows = []
        for name, peak in self.peak_gmacs.items():
            weight, act = map(int, name.split("x"))
            rows.append((weight, act, peak, self.mac_pj[name]))
        return sorted(rows, key=lambda row: -row[2])

    def pairs(self, kind: str) -> tuple[Pair, ...]:
        """Weights of 2..8 bits or float under the activations of each instruction."""
        acts = {a for _, a, _, _ in self.instructions}
        return tuple(
            (w, a) for w in (2, 3, 4, 5, 6, 7, 8, 32) for a in sorted(acts)
            if w <= max(8, a) and any(w <= iw and a <= ia for iw, ia, _, _ in self.instructions)
        )  # fmt: skip

    def cost(self, block: Block, batch: int) -> Figures:
        """Weights, inputs and outputs move once at their bits; outputs at the activation bits of the layer."""
        peak, pj = np.zeros(len(block)), np.zeros(len(block))
        for weight, act, gmacs, energy in self.instructions:
            able = (block.weight_bits <= weight) & (block.act_bits <= act) & (peak == 0)
            peak[able], pj[able] = gmacs * self.efficiency[kernel_class(block)], energy
        macs = block.macs * batch
        moved = block.weight_bytes + batch * (block.input_bytes + block.output_items * block.act_bits / 8)
        return self._figures(macs / (peak * 1e6), moved, macs * pj, block.unit.calls)

    def operator(self, traffic: Traffic) -> Figures:
        """Moving what it reads and writes, and a launch."""
        return self._figures(np.zeros_like(traffic.items), traffic.read_bytes + traffic.written_bytes, 0.0 * traffic.items, 1)

    def _figures(self, compute_ms: FloatArray, moved: FloatArray, compute_pj: FloatArray, calls: int) -> Figures:
        inside = moved <= self.cache_bytes
        memory_ms = calls * moved / (np.where(inside, self.cache_gb_s, self.dram_gb_s) * 1e6)
        energy = compute_pj + calls * moved * np.where(inside, self.cache_pj_per_byte, self.dram_pj_per_byte)
        overhead = np.full(len(moved), calls * self.launch_us * 1e-3)
        return Figures(compute_ms, np.zeros(len(moved)), np.maximum(0, memory_ms - compute_ms), overhead, energy * 1e-9)
