"""Cortex-M microcontrollers: cycles for each multiply-accumulate by class of kernel, constant power, flash and RAM limits.

Fitted to the published MLPerf Tiny results of the boards, whose four nets the tests and the benchmark rebuild.
"""

from dataclasses import dataclass

import numpy as np

from tightrope.estimators.analytic.block import Block, Figures
from tightrope.estimators.analytic.model import Model, Pair, Traffic
from tightrope.estimators.analytic.roofline import CLASSES, kernel_class
from tightrope.spaces.budget import Limits
from tightrope.spaces.errors import DeviceError


@dataclass(frozen=True)
class Microcontroller(Model):
    """One core that runs 8-bit kernels from flash; narrower weights save flash and cost unpacking.

    A policy larger than `flash_bytes`, or with activations above `ram_bytes`, is costed but does not fit: see `limits`.
    """

    clock_mhz: float
    cycles_per_mac: dict[str, float]
    cycles_per_item: float
    cycles_per_kernel: float
    unpack_cycles_per_mac: float
    power_mw: float
    flash_bytes: int
    ram_bytes: int
    costs_operators = True

    def __post_init__(self) -> None:
        if set(self.cycles_per_mac) != set(CLASSES):
            raise DeviceError(f"cycles_per_mac must name each of {CLASSES}, got {[*self.cycles_per_mac]}")

    def pairs(self, kind: str) -> tuple[Pair, ...]:
        """Activations of 8 bits under weights of 2..8."""
        return tuple((w, 8) for w in range(2, 9))

    def cost(self, block: Block, batch: int) -> Figures:
        """Compute by the class of kernel, unpacking as stall, the call as overhead; energy is time at constant power."""
        macs = block.macs * batch
        compute = macs * self.cycles_per_mac[kernel_class(block)]
        unpack = macs * np.where(block.weight_bits < 8, self.unpack_cycles_per_mac, 0.0)
        return self._figures(compute, unpack, self.cycles_per_kernel * block.unit.calls, len(block))

    def operator(self, traffic: Traffic) -> Figures:
        """Every value that it makes takes the same few cycles."""
        return self._figures(traffic.items * self.cycles_per_item, 0.0, self.cycles_per_kernel, len(traffic.items))

    @property
    def limits(self) -> Limits:
        return Limits((("size_bytes", float(self.flash_bytes)), ("peak_ram_bytes", float(self.ram_bytes))))

    def _figures(self, compute: "np.ndarray", stall: "np.ndarray | float", overhead: float, n: int) -> Figures:
        cycles = compute + stall + overhead
        energy_pj = cycles / self.clock_mhz * self.power_mw * 1e3  # us x mW = nJ
        return Figures.make(n, compute=compute, stall=stall, overhead=overhead, energy_pj=energy_pj, clock_mhz=self.clock_mhz)
