"""BitFusion: a systolic array of bit-level fusion units, by the equations of its public simulator.

Sharma et al., "Bit Fusion: Bit-Level Dynamically Composable Architecture", ISCA 2018, sections III and V; the cycle, traffic
and tiling-search equations are those of the simulator that its authors published, written anew from their description.
The search itself is compiled (`bitfusion.cpp`): agents meet thousands of new layer variants, each of which is a search.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from tightrope.estimators.analytic._bitfusion import search
from tightrope.estimators.analytic.block import Block, Figures, FloatArray
from tightrope.estimators.analytic.model import Model
from tightrope.spaces.errors import DeviceError


@dataclass(frozen=True, eq=False)
class Mapping:
    """The best tiling and loop order of `n` variants, one group and one call: `n`-dim arrays of cycles, bits and picojoules."""

    cycles: FloatArray
    compute_cycles: FloatArray
    stall_cycles: FloatArray
    edge_cycles: FloatArray
    dram_read_bits: FloatArray
    dram_write_bits: FloatArray
    energy_pj: FloatArray


@dataclass(frozen=True)
class BitFusion(Model):
    """`rows` x `columns` fusion units between three double-buffered SRAMs (a tile may fill half of each) and one memory interface.

    A fusion unit multiplies 8 x 8 bits in a cycle; operands of 3 or 4 bits run twice, of 1 or 2 bits four times as fast, each
    side on its own. Bits of 5 to 7 save traffic only. Depthwise and grouped convolutions are costed as one small convolution a
    group, one after another: the array has no other way to run them, and the simulator none to cost them.
    """

    rows: int
    columns: int
    clock_mhz: float
    interface_bits: int
    weight_buffer_bytes: int
    input_buffer_bytes: int
    output_buffer_bytes: int
    accumulator_bits: int
    core_pj_per_cycle: float
    weight_read_pj_per_bit: float
    weight_write_pj_per_bit: float
    input_read_pj_per_bit: float
    input_write_pj_per_bit: float
    output_read_pj_per_bit: float
    output_write_pj_per_bit: float
    dram_pj_per_bit: float

    @cached_property
    def _chip(self) -> tuple[float, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.name != "clock_mhz")

    def pairs(self, kind: str) -> tuple[tuple[int, int], ...]:
        """Every pair of 2..8 bits; 32-bit operands have no place on the array."""
        return tuple((w, a) for w in range(2, 9) for a in range(2, 9))

    def cost(self, block: Block, batch: int) -> Figures:
        """Compute, stalls while the memory is behind, the first fill and last drain as memory; see `search`."""
        found = self.search(block, batch)
        times = block.groups * block.unit.calls
        return Figures.make(
            len(block), compute=found.compute_cycles * times, stall=found.stall_cycles * times, memory=found.edge_cycles * times,
            energy_pj=found.energy_pj * times, clock_mhz=self.clock_mhz,
        )  # fmt: skip

    def search(self, block: Block, batch: int) -> Mapping:
        """The mapping of fewest cycles, then least energy, over power-of-two tiles and all orders of the five loops.

        The tokens of a linear layer count as examples of the batch. The first convolution of a network is unrolled over the
        kernel too (im2col), others over channels alone.
        """
        if max(block.weight_bits.max(), block.act_bits.max()) > 8:
            raise DeviceError("BitFusion multiplies operands of at most 8 bits")
        unit = block.unit
        examples, size = (batch * block.pixels, (1, 1)) if unit.kind == "linear" else (batch, unit.out_size)
        unrolled = unit.first and unit.kind == "conv"
        layer = (examples, *size, *unit.kernel, *unit.stride, *unit.dilation, unrolled)
        channels = block.inputs // block.groups, block.outputs // block.groups
        variants = np.stack([*channels, block.weight_bits, block.act_bits], axis=1).astype(np.int64)
        found = np.empty((len(block), 7))
        missing = search(self._chip, layer, variants, found)
        if missing >= 0:
            raise DeviceError(f"no tile of layer {unit.layer!r} with {block.inputs[missing]} input channels fits the buffers")
        return Mapping(*found.T)
