"""Peak memory of activations, by liveness over the operators of a network."""

from collections.abc import Mapping
from math import prod

import numpy as np

from tightrope.estimators.analytic.block import FloatArray
from tightrope.estimators.analytic.operators import readers, sort_of
from tightrope.estimators.encode import Extents, Shapes
from tightrope.spaces.batch import IntArray
from tightrope.spaces.network import Extent, Network


class Liveness:
    """When every activation of a network is made and last read, worked out once; `peak` then is arithmetic.

    A tensor lies in memory at the activation bits of the layers that read it, the widest of them where they differ, also
    through the operators between; what no layer reads (the model's output) at its own item size. A view shares the memory
    of what it reads, and an operator on one value at a time writes in place where nobody else reads its input.
    """

    def __init__(self, network: Network) -> None:
        self._network, self._at = network, Extents(network).at
        self._readers = readers(network)
        own = {op.name: op.bytes_per_item for op in network.ops}
        inputs = [name for name in self._readers if name not in own]
        self._names = [*own, *inputs]
        self._shapes = Shapes(network, [*(op.shape for op in network.ops), *map(self._shape, inputs)])
        self._layers, self._least = self._bits(own)
        steps = []
        source: dict[str, str] = {}  # which memory a tensor lies in
        last: dict[str, int] = {}
        for i, op in enumerate(network.ops):
            read = [source.setdefault(name, name) for name in op.inputs]
            for memory in read:
                last[memory] = i
            alone = len(op.inputs) == 1 and len(self._readers[op.inputs[0]]) == 1
            sort = sort_of(op)
            shares = len(read) > 0 and (sort == "view" or (sort == "unary" and alone))
            source[op.name] = read[0] if shares else op.name
            if not self._readers.get(op.name):
                last[source[op.name]] = len(network.ops)
            if not shares:
                steps.append((i, op.name))
        ends: dict[int, list[str]] = {}
        for memory, i in last.items():
            ends.setdefault(i, []).append(memory)
        place = {name: i for i, name in enumerate(self._names)}
        events = [(place[name], 1) for name in inputs]  # tensors that come into memory, and ones that leave it (-1), in order
        done = 0
        for i, name in steps:
            events += [(place[memory], -1) for at in range(done, i) for memory in ends.get(at, ())]
            events.append((place[name], 1))
            done = i
        self._events, self._signs = np.array(events, np.int64).reshape(-1, 2).T

    def peak(self, widths: IntArray, act_bits: IntArray) -> IntArray:
        """The most bytes of activations that are alive at once, for one example.

        Args:
            widths: `b x G` array of the widths of the groups.
            act_bits: `b x L` array of the activation bits of the layers' inputs.
        Returns:
            `b`-dim array. A network without operators counts each layer's input and output alone.
        """
        count = len(widths)
        if not self._network.ops:
            peak = np.zeros(count)
            for i, layer in enumerate(self._network.layers):
                items = self._at(layer.inputs, widths) * prod(layer.in_size) + self._at(layer.outputs, widths) * prod(
                    layer.out_size
                )
                peak = np.maximum(peak, items * act_bits[:, i] / 8)
            return np.ceil(peak).astype(np.int64)
        changes = self._sizes(widths, act_bits)[:, self._events] * self._signs
        return np.asarray(changes.cumsum(axis=1).max(axis=1).astype(np.int64))

    def sizes(self, widths: IntArray, act_bits: IntArray) -> dict[str, FloatArray]:
        """Bytes of every tensor of one example, views included, as `b`-dim arrays; the model's own inputs under their names."""
        return dict(zip(self._names, self._sizes(widths, act_bits).T, strict=True))

    def _sizes(self, widths: IntArray, act_bits: IntArray) -> FloatArray:
        known = np.concatenate([np.zeros((len(act_bits), 1), np.int64), act_bits], axis=1)
        bits = np.maximum(known[:, self._layers].max(axis=2), self._least)
        return np.asarray(np.ceil(self._shapes(widths) * bits / 8))

    def _bits(self, own: Mapping[str, int]) -> tuple[IntArray, IntArray]:
        """The layers whose activation bits are those of each tensor, counted from 1, `T x n`, and the least that it has.

        From the last operator back to the inputs; `own` has the bytes of an item of what operators make.
        """
        at = {layer.name: i for i, layer in enumerate(self._network.layers, 1)}
        asked: dict[str, tuple[set[int], int]] = {}
        for name in [*reversed([*own]), *self._names[len(own) :]]:
            item, found = own.get(name, 4), set[int]()
            least = 0
            for op in self._readers.get(name, ()) if item == 4 else ():
                layers, other = ({at[op.layer]}, 0) if op.kind == "layer" else asked[op.name]
                found, least = found | layers, max(least, other)
            asked[name] = found, least if found or least else 8 * item
        most = max(1, *(len(layers) for layers, _ in asked.values())) if asked else 1
        rows = [[*sorted(asked[name][0]), *[0] * (most - len(asked[name][0]))] for name in self._names]
        return np.array(rows, np.int64).reshape(len(rows), most), np.array([asked[name][1] for name in self._names], np.int64)

    def _shape(self, name: str) -> tuple[Extent, ...]:
        """The shape of one of the model's own inputs, which its first reader tells."""
        reader = self._readers[name][0]
        if reader.kind == "layer":
            layer = self._network.layer(reader.layer)
            return (layer.inputs, *map(Extent, layer.in_size))
        return reader.shape
