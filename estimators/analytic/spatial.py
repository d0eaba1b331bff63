"""A spatial array with its memory hierarchy: registers at the units, SRAMs beside the array, DRAM behind one port.

The mechanisms are those that ZigZag (Mei et al., IEEE Trans. Computers 2021) costs for a latency-optimal mapping: dimensions
that do not fill the array waste it, weights and outputs move while it computes, the inputs of a layer come first. What a
mapping search would add is left out; the benchmark shows how far that is from ZigZag's own numbers.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from tightrope.estimators.analytic.block import Block, Figures, FloatArray
from tightrope.estimators.analytic.energy import mac_pj
from tightrope.estimators.analytic.model import Model, Pair
from tightrope.spaces.errors import DeviceError


@dataclass(frozen=True)
class Spatial(Model):
    """An array whose sides are unrolled over output channels `k`, input channels `c` and output positions `ox`, `oy`.

    `interface_bits` is the width of the DRAM port in bits a cycle. Inputs and outputs share `map_buffer_bytes`, weights have
    `weight_buffer_bytes`; where neither holds its data whole, one of them is fetched again, whichever is cheaper. Weights stay in
    registers of more than a byte, else they are read anew for each array of output positions. With `resident_weight_bytes`
    the weights of a whole network live on the chip, and what exceeds it is streamed at `stream_gb_s` in each inference: the
    cliff of an edge TPU. Energies are picojoules: of registers for each multiply-accumulate at 8 bits, of memories for each byte.
    """

    unroll: dict[str, int]
    clock_mhz: float
    interface_bits: float
    weight_buffer_bytes: int
    map_buffer_bytes: int
    weight_register_bytes: int
    multiply_pj: float
    add_pj: float
    sum_register_pj: float
    weight_register_pj: float
    map_read_pj_per_byte: float
    map_write_pj_per_byte: float
    dram_read_pj_per_byte: float
    dram_write_pj_per_byte: float
    input_register_pj: float = 0.0
    weight_read_pj_per_byte: float = 0.0
    weight_write_pj_per_byte: float = 0.0
    drain_cycles_per_unit: float = 0.0
    resident_weight_bytes: float = 0.0
    stream_gb_s: float = 0.0

    def __post_init__(self) -> None:
        if not set(self.unroll) <= {"k", "c", "ox", "oy"}:
            raise DeviceError(f"unroll must name k, c, ox or oy, got {[*self.unroll]}")
        if (self.resident_weight_bytes > 0) != (self.stream_gb_s > 0):
            raise DeviceError("resident_weight_bytes and stream_gb_s must be given together")

    def pairs(self, kind: str) -> tuple[Pair, ...]:
        """Every pair of 2..8 bits, on 8-bit units."""
        return tuple((w, a) for w in range(2, 9) for a in range(2, 9))

    def cycles(self, block: Block, batch: int) -> tuple[FloatArray, FloatArray]:
        """Cycles of the array, and of these the arrays of output positions.

        The groups of a convolution lie along `k` as output channels do; each uses only its own share of `c`.
        """
        side = {"k": 1, "c": 1, "ox": 1, "oy": 1} | self.unroll
        high, wide = block.unit.out_size
        positions = batch * -(-high // side["oy"]) * -(-wide // side["ox"]) * np.ones(len(block))
        channels = np.ceil(block.outputs / side["k"]) * np.ceil(block.inputs / block.groups / side["c"])
        return channels * positions * prod(block.unit.kernel), positions

    def cost(self, block: Block, batch: int) -> Figures:
        """The longer of computing and moving weights and outputs, after loading the inputs."""
        side = {"k": 1, "c": 1, "ox": 1, "oy": 1} | self.unroll
        cycles, positions = self.cycles(block, batch)
        weights, inputs = block.weight_bytes, batch * self._input_bytes(block)
        outputs = batch * block.output_items * block.act_bits / 8
        weights_moved, inputs_moved = self._fetched(weights, inputs, outputs)
        per_cycle = 8 / self.interface_bits
        loading, streaming = inputs_moved * per_cycle, (weights_moved + outputs) * per_cycle
        used = np.minimum(block.outputs, side["k"]) + np.minimum(block.inputs // block.groups, side["c"]) - 1

        macs, w, a = block.macs / block.unit.calls * batch, block.weight_bits / 8, block.act_bits / 8
        fed = cycles * np.minimum(block.inputs, side["c"] * np.where(block.groups > 1, side["k"], 1)) * side["ox"] * side["oy"] * a
        again = 1.0 if self.weight_register_bytes > 1 else positions
        energy = (
            macs * mac_pj(block, self.multiply_pj, self.add_pj)
            + macs * (self.sum_register_pj + self.weight_register_pj * w + self.input_register_pj * a)
            + weights * (self.weight_write_pj_per_byte + self.weight_read_pj_per_byte * again)
            + (inputs + outputs) * self.map_write_pj_per_byte + (fed + outputs) * self.map_read_pj_per_byte
            + (weights_moved + inputs_moved) * self.dram_read_pj_per_byte + outputs * self.dram_write_pj_per_byte
        )  # fmt: skip
        calls = block.unit.calls
        return Figures.make(
            len(block), compute=calls * cycles, stall=calls * np.maximum(0, streaming - cycles), memory=calls * loading,
            overhead=calls * self.drain_cycles_per_unit * used, energy_pj=calls * energy, clock_mhz=self.clock_mhz,
        )  # fmt: skip

    def whole(self, weight_bytes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Streaming the weights that the chip cannot keep."""
        if not self.resident_weight_bytes:
            return super().whole(weight_bytes)
        excess = np.maximum(0, weight_bytes - self.resident_weight_bytes)
        return excess / (self.stream_gb_s * 1e6), excess * self.dram_read_pj_per_byte * 1e-9

    def _input_bytes(self, block: Block) -> FloatArray:
        """Bytes of the input that the output positions touch, padding included."""
        unit, touched = block.unit, 1
        if unit.kind == "linear":
            return block.input_bytes
        for out, kernel, stride, dilation in zip(unit.out_size, unit.kernel, unit.stride, unit.dilation, strict=True):
            reach = (kernel - 1) * dilation + 1
            touched *= (out - 1) * stride + reach if reach >= stride else out * kernel
        return block.inputs * touched * block.act_bits / 8

    def _fetched(self, weights: FloatArray, inputs: FloatArray, outputs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Bytes of weights and of inputs that DRAM hands over in all."""
        if self.resident_weight_bytes:
            return np.zeros_like(weights), inputs
        map_tiles = np.ceil((inputs + outputs) / self.map_buffer_bytes)
        weight_tiles = np.ceil(weights / self.weight_buffer_bytes)
        again = (map_tiles > 1) & (weight_tiles > 1)
        weights_again = again & (weights * (map_tiles - 1) <= inputs * (weight_tiles - 1))
        inputs_again = again & ~weights_again
        return weights * np.where(weights_again, map_tiles, 1), inputs * np.where(inputs_again, weight_tiles, 1)
