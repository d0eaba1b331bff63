"""Blocks: many variants of one unit at once, so that models cost them with array arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.batch import IntArray
from tightrope.spaces.network import Layer
from tightrope.spaces.policy import Choice
from tightrope.spaces.unit import Unit, units_of

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Block:
    """`n` variants of one unit: the geometry of `unit`, and channels and bits as `n`-dim arrays.

    Channels are counted whole (all conv groups together), as in `Unit`; those of `unit` itself mean nothing here.
    """

    unit: Unit
    inputs: IntArray
    outputs: IntArray
    weight_bits: IntArray
    act_bits: IntArray

    def __len__(self) -> int:
        return len(self.inputs)

    @staticmethod
    def of(unit: Unit) -> "Block":
        """The block of a single unit."""
        return Block(unit, *(np.array([x]) for x in (unit.in_channels, unit.out_channels, unit.weight_bits, unit.act_bits)))

    def part(self, where: slice) -> "Block":
        """The variants of a slice."""
        return Block(self.unit, self.inputs[where], self.outputs[where], self.weight_bits[where], self.act_bits[where])

    @cached_property
    def groups(self) -> IntArray:
        """Conv groups of each variant; those of a depthwise convolution follow its channels."""
        return self.inputs if self.unit.kind == "depthwise" else np.full_like(self.inputs, self.unit.groups)

    @property
    def pixels(self) -> int:
        """Output positions of one example: pixels of a map or tokens of a linear layer."""
        return prod(self.unit.out_size)

    @cached_property
    def weights(self) -> IntArray:
        """Number of weights."""
        return self.outputs * (self.inputs // self.groups) * prod(self.unit.kernel)

    @property
    def macs(self) -> IntArray:
        """Multiply-accumulates of all calls, for one example."""
        return self.weights * self.pixels * self.unit.calls

    @property
    def weight_bytes(self) -> FloatArray:
        """Bytes of the weights alone, packed at their bits."""
        return np.ceil(self.weights * self.weight_bits / 8)

    @property
    def input_bytes(self) -> FloatArray:
        """Bytes of the input map of one example at the activation bits; a linear layer reads `(1, tokens)`."""
        return self.inputs * prod(self.unit.in_size) * self.act_bits / 8

    @property
    def output_items(self) -> IntArray:
        """Elements of the output map of one example."""
        return self.outputs * self.pixels

    @property
    def size_bytes(self) -> IntArray:
        """Bytes in the packed file, by the rule of `Unit.size_bytes`."""
        packed = -(-self.weights * self.weight_bits // 8) + (4 * self.outputs if self.unit.bias else 0)
        low = self.weight_bits < 32
        return packed + np.where(low, 4 * self.outputs, 0) + np.where(self.act_bits < 32, 8, 0)


def blocks_of(
    layer: Layer,
    form: str,
    dense: Mapping[str, int],
    inputs: IntArray,
    outputs: IntArray,
    ranks: IntArray,
    weight_bits: IntArray,
    act_bits: IntArray,
    *,
    first: bool = False,
    last: bool = False,
) -> tuple[Block, ...]:
    """Lower `n` variants of a layer that share one low-rank form (empty: whole) to their blocks, in the order of `lower`.

    Args:
        dense: dense widths, at which the geometry is taken (it does not follow them).
        inputs, outputs, ranks, weight_bits, act_bits: `n`-dim arrays.
    """
    templates = units_of(layer, Choice(rank=1 if form else None, form=form), dict(dense))
    if form == "tucker":
        inner, outer = np.minimum(ranks, inputs), np.minimum(ranks, outputs)
        ends = [inputs, inner, outer, outputs]
    else:
        ends = [inputs, ranks, outputs] if form else [inputs, outputs]
    return tuple(
        Block(replace(t, first=first and t.part == 0, last=last), a, b, weight_bits, act_bits)
        for t, a, b in zip(templates, ends[:-1], ends[1:], strict=True)
    )


@dataclass(frozen=True, eq=False)
class Figures:
    """What `n` variants cost for one batch, all calls together: milliseconds, whose sum is the latency, and millijoules."""

    compute_ms: FloatArray
    memory_ms: FloatArray
    stall_ms: FloatArray
    overhead_ms: FloatArray
    energy_mj: FloatArray

    @staticmethod
    def make(
        n: int,
        *,
        compute: FloatArray | float = 0.0,
        memory: FloatArray | float = 0.0,
        stall: FloatArray | float = 0.0,
        overhead: FloatArray | float = 0.0,
        energy_pj: FloatArray | float = 0.0,
        clock_mhz: float,
    ) -> "Figures":
        """Figures from cycles at a clock, and energy in picojoules."""
        c, m, s, o = (np.broadcast_to(x, n) / (clock_mhz * 1e3) for x in (compute, memory, stall, overhead))
        return Figures(c, m, s, o, np.broadcast_to(energy_pj, n) * 1e-9)

    @property
    def latency_ms(self) -> FloatArray:
        return self.compute_ms + self.memory_ms + self.stall_ms + self.overhead_ms
