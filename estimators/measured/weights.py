"""What no clock tells of exported files, for many policies at once: bytes, multiply-accumulates, energy by a model."""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from tightrope.estimators.encode import Extents
from tightrope.spaces.batch import FORMS, Batch, IntArray
from tightrope.spaces.network import Network, forms
from tightrope.spaces.points import FUSED, MOVERS, consumers, written
from tightrope.spaces.policy import Choice
from tightrope.spaces.unit import PARTS, units_of

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
        self._ends = [x.inputs for x in network.layers], [x.outputs for x in network.layers]
        self._parts = {i: parts_of(network, form, batch) for i, form in enumerate(FORMS)}
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
        count, ends = len(batch), [self._extents.each(extents, batch.widths) for extents in self._ends]
        size, macs, energy = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
        for shape in self._rest:
            size += 4 * self._extents.items(shape, batch.widths)
        widest = max(int(made.max(initial=0)) for made in (ends[1], batch.ranks))
        zeros = np.zeros((2, count, widest + 1), np.bool_)  # what zero points there are, by bytes of an item and length
        for form, parts in self._parts.items():
            who, at = np.nonzero(batch.forms == form)
            low, act, ranks, inputs, outputs = (a[who, at] for a in (batch.weight_bits, batch.act_bits, batch.ranks, *ends))
            channels = _channels(FORMS[form], inputs, outputs, ranks)
            integer, packed = act <= 8, (low < 32) & (act == 32)
            for part, read, made in zip(parts, channels[:-1], channels[1:], strict=True):
                kernel, groups, before, behind, calls, bias, many = part[:, at]
                weights = made * (read // np.where(groups, groups, read)) * kernel
                products = weights * behind * calls
                moved = weights * low / 8 + self._batch * (read * before + made * behind) * act / 8
                each = np.where(moved <= CACHED, CACHE_PJ, DRAM_PJ) * calls / self._batch
                biases = 4 * made * bias
                if self._onnx:
                    panels = np.where(many, -(-made // PANEL) * PANEL, made)
                    blocks = -(-np.where(many * (part is not parts[0]), -(-read // PANEL) * PANEL, read) // BLOCK)
                    whole = np.where(packed, panels * (blocks * (BLOCK * low // 8 + 4) + 4 * bias), 4 * weights + biases)
                    held = np.where(integer, weights + 4 * made + 2 * biases + STEP_BYTES, whole)
                    zeros[0, who[integer], made[integer]] = True
                    zeros[1, who[integer], (made * bias)[integer]] = True
                else:
                    held = -(-weights * low // 8) + biases + np.where(low < 32, 4 * made, 0) + np.where(act < 32, 8, 0)
                size += _sums(who, held, count)
                macs += _sums(who, products, count)
                energy += np.bincount(who, products * np.where(integer, INTEGER_PJ, FLOAT_PJ) + moved * each, count)
        if self._onnx:
            size += self._shields(batch)
            for each_bytes, there in zip((1, 4), zeros, strict=True):
                size += each_bytes * (there @ np.arange(there.shape[1]))
        return Held(size, macs, energy)

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


def _sums(who: IntArray, values: IntArray, count: int) -> IntArray:
    """Sums of whole numbers by whom they are of."""
    return np.bincount(who, values, count).astype(np.int64)


def _channels(form: str, inputs: IntArray, outputs: IntArray, ranks: IntArray) -> list[IntArray]:
    """Channels before, between and behind the units of a layer."""
    if form == "tucker":
        return [inputs, np.minimum(ranks, inputs), np.minimum(ranks, outputs), outputs]
    return [inputs, ranks, outputs] if form else [inputs, outputs]


def parts_of(network: Network, form: str, batch: int) -> list[IntArray]:
    """What the widths do not change of the units of all layers in a form, `7 x L` for each part: kernel size, groups (0: as many
    as channels), places of the tensors that are read and made, calls, whether there is a bias, and whether there is more than one
    row. Layers that cannot take the form have zeros."""
    found = [np.zeros((7, len(network.layers)), np.int64) for _ in range(PARTS[form])]
    for at, layer in enumerate(network.layers):
        if form and form not in forms(layer):
            continue
        many = batch * prod(layer.out_size) > 1
        for part, unit in zip(found, units_of(layer, Choice(rank=1 if form else None, form=form), network.widths), strict=True):
            groups = 0 if layer.kind == "depthwise" else unit.groups
            part[:, at] = prod(unit.kernel), groups, prod(unit.in_size), prod(unit.out_size), unit.calls, unit.bias, many
    return found
