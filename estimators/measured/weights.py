"""What no clock tells of exported files, for many policies at once: bytes, multiply-accumulates, energy by a model."""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from tightrope.estimators.encode import Extents
from tightrope.spaces.batch import FORMS, Batch, IntArray
from tightrope.spaces.network import Network
from tightrope.spaces.points import FUSED, MOVERS, consumers, written
from tightrope.spaces.policy import Choice
from tightrope.spaces.unit import units_of

PANEL, BLOCK = 16, 32  # output features, and inputs under one scale, of weight-only linear layers
STEP_BYTES = 5  # scale and zero point of an 8-bit tensor
Mask = NDArray[np.bool_]

FLOAT_PJ, INTEGER_PJ = 4.6, 0.3  # of a multiply-accumulate: Horowitz, ISSCC 2014, 45 nm, without the instruction around it
CACHE_PJ, DRAM_PJ = 12.5, 120.0  # of a byte: 1 MB SRAM, the same; embedded DDR at 15 pJ/bit
CACHED = 1 << 20  # bytes of weights and activations of a unit that stay in a core's own cache


@dataclass(frozen=True, eq=False)
class Held:
    """Of `b` policies, all for one example: bytes of the file's constants, multiply-accumulates, and picojoules by the model."""

    size_bytes: IntArray
    macs: IntArray
    energy_pj: NDArray[np.float64]


class Weights:
    """What the layers of one network hold and multiply, unit by unit."""

    def __init__(self, network: Network, batch: int, *, onnx: bool) -> None:
        self.network, self._batch, self._onnx, self._extents = network, batch, onnx, Extents(network)
        self._rest = [p.shape for p in network.parameters]
        self._layers = {layer.name: i for i, layer in enumerate(network.layers)}
        self._ops, self._readers = {op.name: op for op in network.ops}, consumers(network)
        self._holders: dict[str, set[int]] = {}  # layers that, as integer ones, have an operator's tensor held in 8 bits
        for name, behind in written(network).items():
            for point in (self._ops[name].inputs[0], behind):
                self._holders.setdefault(point, set()).add(self._layers[self._ops[name].layer])

    def __call__(self, batch: Batch) -> Held:
        """Count them.

        Packed files are counted by the rule of `Unit.size_bytes`. In an ONNX file a floating-point weight or bias takes 4 bytes;
        an 8-bit layer has a byte for each weight, a scale for each output channel, and 4 bytes and a scale for each bias, with
        zero points that all layers of a width share; weight-only layers pack blocks of 32 inputs under one scale, and whole
        panels of 16 outputs where there is more than one row; between codes a floating-point layer has a scale and a zero point
        for each channel that it reads (`shielded` in the exporter).
        """
        count = len(batch)
        size, macs, energy = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
        for shape in self._rest:
            size += 4 * self._extents.items(shape, batch.widths)
        zeros: list[IntArray] = []
        for at, layer in enumerate(self.network.layers):
            inputs, outputs = (self._extents.at(e, batch.widths) for e in (layer.inputs, layer.outputs))
            for form in np.unique(batch.forms[:, at]).tolist():
                who = np.flatnonzero(batch.forms[:, at] == form)
                ends = _ends(FORMS[form], inputs[who], outputs[who], batch.ranks[who, at])
                parts = units_of(layer, Choice(rank=1 if form else None, form=FORMS[form]), self.network.widths)
                for unit, read, made in zip(parts, ends[:-1], ends[1:], strict=True):
                    groups = read if layer.kind == "depthwise" else unit.groups
                    weights = made * (read // groups) * prod(unit.kernel)
                    products = weights * prod(unit.out_size) * unit.calls
                    macs[who] += products
                    low, act = batch.weight_bits[who, at], batch.act_bits[who, at]
                    integer, packed = act <= 8, (low < 32) & (act == 32)
                    moved = weights * low / 8 + self._batch * (read * prod(unit.in_size) + made * prod(unit.out_size)) * act / 8
                    each = np.where(moved <= CACHED, CACHE_PJ, DRAM_PJ) * unit.calls / self._batch
                    energy[who] += products * np.where(integer, INTEGER_PJ, FLOAT_PJ) + moved * each
                    bias = 4 * made if unit.bias else 0 * made
                    many = self._batch * prod(layer.out_size) > 1
                    panels = -(-made // PANEL) * PANEL if many else made
                    blocks = -(-(-(-read // PANEL) * PANEL if many and unit.part else read) // BLOCK)
                    whole = np.where(
                        packed, panels * blocks * (BLOCK * low // 8 + 4) + (4 * panels if unit.bias else 0), 4 * weights + bias
                    )
                    if not self._onnx:
                        size[who] += -(-weights * low // 8) + bias + np.where(low < 32, 4 * made, 0) + np.where(act < 32, 8, 0)
                        continue
                    size[who] += np.where(integer, weights + 4 * made + 2 * bias + STEP_BYTES, whole)
                    for item in (1, 4) if unit.bias else (1,):
                        zero = np.zeros(count, np.int64)
                        zero[who] = np.where(integer, item * (made << 4) + item, 0)  # told apart by item and length
                        zeros.append(zero)
        if self._onnx:
            size += self._shields(batch)
        shared = np.sort(np.array(zeros, np.int64).reshape(len(zeros), count), axis=0)
        fresh = np.diff(shared, axis=0, prepend=0) != 0
        return Held(size + np.where(fresh, shared >> 4, 0).sum(axis=0), macs, energy)

    def _shields(self, batch: Batch) -> IntArray:
        """Bytes of the scales and zero points by channel of tensors that whole floating-point layers between codes read."""
        integer = (batch.weight_bits <= 8) & (batch.act_bits <= 8)

        def held(name: str) -> Mask:
            found: Mask = np.logical_or.reduce(integer[:, sorted(self._holders.get(name, ()))], axis=1)
            return found

        def coded(name: str) -> Mask:
            """Whether a tensor is there in codes: held, or moved from where it is."""
            op = self._ops.get(name)
            return held(name) | coded(op.inputs[0]) if op is not None and op.kind in MOVERS else held(name)

        def rounded(name: str) -> Mask:
            """Whether a tensor's only use is to become codes, behind what moves or limits it."""
            after = self._readers.get(name, [])
            passes = len(after) == 1 and after[0].kind in MOVERS | FUSED
            return held(name) | rounded(after[0].name) if passes else held(name)

        read: dict[str, tuple[IntArray, Mask]] = {}
        for op in self._ops.values():
            if op.kind == "layer":
                at = self._layers[op.layer]
                between = (batch.weight_bits[:, at] == 32) & (batch.forms[:, at] == 0) & coded(op.inputs[0]) & rounded(op.name)
                channels, before = read.get(op.inputs[0], (self._extents.at(self.network.layers[at].inputs, batch.widths), between))
                read[op.inputs[0]] = channels, before | between
        total = np.zeros(len(batch), np.int64)
        for channels, shielded in read.values():
            total += np.where(shielded, STEP_BYTES * channels, 0)
        return total


def _ends(form: str, inputs: IntArray, outputs: IntArray, ranks: IntArray) -> list[IntArray]:
    """Channels before, between and behind the units of a layer."""
    if form == "tucker":
        return [inputs, np.minimum(ranks, inputs), np.minimum(ranks, outputs), outputs]
    return [inputs, ranks, outputs] if form else [inputs, outputs]
