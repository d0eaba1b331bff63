"""BitFusion: a systolic array of bit-level fusion units, by the equations of its public simulator.

Sharma et al., "Bit Fusion: Bit-Level Dynamically Composable Architecture", ISCA 2018, sections III and V; the cycle, traffic
and tiling-search equations are those of the simulator that its authors published, written anew from their description.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.estimators.analytic.block import Block, Figures, FloatArray
from tightrope.estimators.analytic.model import Model
from tightrope.estimators.encode import IntArray
from tightrope.spaces.errors import DeviceError

_BATCH = 256  # variants searched at once: enough to amortise the calls of NumPy, few enough for the cache
_WEIGHTS, _INPUTS, _OUTPUTS = range(3)
_LOOPS = ("io", "bhwi", "bhwo")  # the loops that weights, inputs and outputs depend on: batch, height, width, in, out
_ORDER = "ibhwo"  # from the inner loop out: sums stay until they are done


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
        parts = [self._search(block.part(slice(i, i + _BATCH)), batch) for i in range(0, len(block), _BATCH)]
        names = Mapping.__dataclass_fields__
        return Mapping(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))

    def _search(self, block: Block, batch: int) -> Mapping:
        tiles = self._tiles(block, batch)
        loops = "".join(loop for loop in _ORDER if (tiles.trips[loop] > 1).any())
        orders = list(_orders(loops, same=np.array_equal(tiles.trips["h"], tiles.trips["w"])))

        # A tile whose least cost is above what some tile reaches in one good order cannot win.
        reached = np.full(len(block), np.inf)
        np.minimum.at(reached, tiles.variant, self._run(tiles, loops)[0])
        tiles = tiles.keep(self._least(tiles) <= reached[tiles.variant])

        best = self._run(tiles, orders[0])
        for order in orders[1:]:
            now = self._run(tiles, order)
            better = (now[0] < best[0]) | ((now[0] == best[0]) & (now[-1] < best[-1]))
            best = tuple(np.where(better, x, y) for x, y in zip(now, best, strict=True))
        ranked = np.lexsort((best[-1], best[0], tiles.variant))
        chosen = ranked[np.unique(tiles.variant[ranked], return_index=True)[1]]
        return Mapping(*(x[chosen] for x in best))

    def _run(self, tiles: "_Tiles", order: str) -> tuple[FloatArray, ...]:
        """The fields of `Mapping` for each tile, with the loops in one order, from the inner one out."""
        traffic, largest = tiles.traffic(order, self._halves)
        reads, writes = traffic.sum(0), traffic[_OUTPUTS]
        fill, drain = largest.sum(0), largest[_OUTPUTS]
        stall = np.maximum(0, np.ceil((reads + writes - fill - drain) / self.interface_bits) - tiles.compute)
        edge = np.ceil(fill / self.interface_bits) + np.ceil(drain / self.interface_bits)
        energy = (
            tiles.inside_pj
            + self.weight_write_pj_per_bit * traffic[_WEIGHTS]
            + self.input_write_pj_per_bit * traffic[_INPUTS]
            + (self.output_read_pj_per_bit + self.output_write_pj_per_bit) * writes
            + self.dram_pj_per_bit * (reads + writes)
        )
        return tiles.compute + stall + edge, tiles.compute, stall, edge, reads, writes, energy

    def _least(self, tiles: "_Tiles") -> FloatArray:
        """Cycles that a tiling takes in any order: computing and one fill and drain, or moving everything once."""
        once = [size * np.prod([tiles.trips[x] for x in _LOOPS[i]], axis=0) for i, size in enumerate(tiles.sizes)]
        moved = sum(once) + once[_OUTPUTS]
        ends = tiles.sizes.sum(0) + tiles.sizes[_OUTPUTS]
        least: FloatArray = np.maximum(moved, tiles.compute * self.interface_bits + ends) / self.interface_bits
        return least

    @property
    def _halves(self) -> tuple[float, float, float]:
        """Bits of half of each buffer, which is what a tile may fill."""
        return self.weight_buffer_bytes * 4.0, self.input_buffer_bytes * 4.0, self.output_buffer_bytes * 4.0

    def _tiles(self, block: Block, batch: int) -> "_Tiles":
        """All tilings of all variants that fit the buffers."""
        unit, (kh, kw) = block.unit, block.unit.kernel
        examples, (high, wide) = (batch * block.pixels, (1, 1)) if unit.kind == "linear" else (batch, unit.out_size)
        in_channels, out_channels = block.inputs // block.groups, block.outputs // block.groups
        # Along the axes of the grid: variants, output tiles (examples and positions), input channels, output channels.
        b, o = (
            x.reshape(1, -1, 1, 1) for x in np.meshgrid(_powers(np.array([examples]), 1), _powers(np.array([max(high, wide)]), 1))
        )
        ic, oc = _powers(in_channels, 1)[:, None, :, None], _powers(out_channels, self.columns)[:, None, None, :]
        w, a = block.weight_bits[:, None, None, None], block.act_bits[:, None, None, None]
        oh, ow, columns = np.minimum(o, high), np.minimum(o, wide), np.ceil(oc / self.columns)
        together = self.rows * _speed(w) * _speed(a)
        steps = np.ceil(ic * kh * kw / together)
        weights = steps * together * oc * w
        if unit.first and unit.kind == "conv":
            inputs = oh * ow * kh * kw * ic * b * a
        else:
            tall = (kh - 1) * unit.dilation[0] + 1 + (oh - 1) * unit.stride[0]
            broad = (kw - 1) * unit.dilation[1] + 1 + (ow - 1) * unit.stride[1]
            inputs = tall * broad * ic * b * a
            steps = np.ceil(ic / together) * kh * kw
        outputs = oh * ow * columns * self.columns * b * self.accumulator_bits
        sizes = weights, inputs, outputs
        fits = (ic > 0) & (oc > 0)
        for size, half in zip(sizes, self._halves, strict=True):
            fits = fits & (size <= half)
        at = np.nonzero(fits)
        v = at[0]
        missing = np.setdiff1d(np.arange(len(block)), v)
        if missing.size:
            raise DeviceError(f"no tile of layer {unit.layer!r} with {block.inputs[missing[0]]} input channels fits the buffers")

        def pick(values: IntArray | FloatArray) -> FloatArray:
            picked: FloatArray = np.broadcast_to(values, fits.shape)[at].astype(np.float64)
            return picked

        tb, th, tw, ti, to = pick(b), pick(oh), pick(ow), pick(ic), pick(oc)
        trips = {
            "b": np.ceil(examples / tb), "h": np.ceil(high / th), "w": np.ceil(wide / tw),
            "i": np.ceil(in_channels[v] / ti), "o": np.ceil(out_channels[v] / to),
        }  # fmt: skip
        sums = np.prod(list(trips.values()), axis=0) * tb * th * tw  # over all tiles, for one column
        compute = sums * pick(columns) * pick(steps)
        reads_pj = self.weight_read_pj_per_bit * block.weight_bits[v] + self.input_read_pj_per_bit * block.act_bits[v]
        inside = (
            self.core_pj_per_cycle * compute
            + sums * to * ti * kh * kw * reads_pj
            + sums * to * self.accumulator_bits * (self.output_read_pj_per_bit + self.output_write_pj_per_bit)
        )
        return _Tiles(v, np.stack([pick(size) for size in sizes]), trips, compute, inside)


@dataclass(frozen=True, eq=False)
class _Tiles:
    """`t` tilings: which variant each belongs to, bits of its weights, inputs and outputs (`3 x t`), trips of the five loops,
    compute cycles of all tiles, and picojoules spent inside the array."""

    variant: IntArray
    sizes: FloatArray
    trips: dict[str, FloatArray]
    compute: FloatArray
    inside_pj: FloatArray

    def keep(self, which: NDArray[np.bool_]) -> "_Tiles":
        trips = {loop: trips[which] for loop, trips in self.trips.items()}
        return _Tiles(self.variant[which], self.sizes[:, which], trips, self.compute[which], self.inside_pj[which])

    def traffic(self, order: str, halves: tuple[float, float, float]) -> tuple[FloatArray, FloatArray]:
        """Bits that each operand moves, and its largest footprint that half its buffer holds, both `3 x t`.

        From the inner loop out, an operand moves again for each trip of a loop that it depends on, or of any loop once its
        footprint has outgrown half its buffer.
        """
        traffic, largest = self.sizes.copy(), self.sizes.copy()
        for loop in order:
            for operand, now in enumerate(traffic):
                if loop in _LOOPS[operand]:
                    now *= self.trips[loop]
                    np.copyto(largest[operand], now, where=now <= halves[operand])
                else:
                    np.multiply(now, self.trips[loop], out=now, where=now > halves[operand])
        return traffic, largest


def _speed(bits: IntArray) -> IntArray:
    """How many operands of these bits share the place of an 8-bit one: floor(8 / bits) rounded down to 1, 2 or 4."""
    return np.where(bits <= 2, 4, np.where(bits <= 4, 2, 1))


def _powers(most: IntArray, step: int) -> IntArray:
    """Tile sizes `step`, 2 `step`, 4 `step`, ... and `most` for each entry of `most`: `n x k`, 0 where there is none."""
    count = int(np.ceil(np.log2(np.ceil(most.max() / step)))) + 1
    sizes = np.broadcast_to(step * 2 ** np.arange(count, dtype=np.int64), (len(most), count))
    before = np.concatenate([np.zeros((len(most), 1), np.int64), sizes[:, :-1]], axis=1)
    return np.where(before < most[:, None], np.minimum(sizes, most[:, None]), 0)


def _orders(loops: str, *, same: bool) -> Iterator[str]:
    """Orders of the loops from the inner one out; `same`: h and w run equally often, so that only h before w is needed."""
    if not loops:
        yield ""
    for loop in loops:
        if not (same and loop == "w" and "h" in loops):
            yield from (loop + rest for rest in _orders(loops.replace(loop, ""), same=same))
