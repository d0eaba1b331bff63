"""Peak memory of activations, by liveness over the operators of a network."""

from math import prod

import numpy as np

from tightrope.estimators.analytic.block import FloatArray
from tightrope.estimators.analytic.operators import readers, sort_of
from tightrope.estimators.encode import Extents
from tightrope.spaces.batch import IntArray
from tightrope.spaces.network import Network

_INPUT = "input"


class Liveness:
    """When every activation of a network is made and last read, worked out once; `peak` then is arithmetic.

    A tensor lies in memory at the activation bits of the layers that read it, the widest of them where they differ, also
    through the operators between; what no layer reads (the model's output) at its own item size. A view shares the memory
    of what it reads, and an operator on one value at a time writes in place where nobody else reads its input.
    """

    def __init__(self, network: Network) -> None:
        self._network, extents = network, Extents(network)
        self._at, self._items = extents.at, extents.items
        self._layers = {layer.name: i for i, layer in enumerate(network.layers)}
        self._readers = readers(network)
        made = {op.name for op in network.ops}
        self._inputs = [name for name in self._readers if name not in made]
        self._steps = []
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
                self._steps.append((i, op))
        self._ends: dict[int, list[str]] = {}
        for memory, i in last.items():
            self._ends.setdefault(i, []).append(memory)

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
        size = self.sizes(widths, act_bits)
        alive = sum((size[name] for name in self._inputs), start=np.zeros(count))
        peak, done = alive.copy(), 0
        for i, op in self._steps:
            for step in range(done, i):
                alive = alive - sum(size[name] for name in self._ends.get(step, ()))
            done = i
            alive = alive + size[op.name]
            peak = np.maximum(peak, alive)
        return peak.astype(np.int64)

    def sizes(self, widths: IntArray, act_bits: IntArray) -> dict[str, FloatArray]:
        """Bytes of every tensor of one example, views included, as `b`-dim arrays; the model's own inputs under their names."""
        bits = self._bits(act_bits)
        size = {op.name: np.ceil(self._items(op.shape, widths) * bits[op.name] / 8) for op in self._network.ops}
        return size | {name: self._input(name, widths, bits[name]) for name in self._inputs}

    def _bits(self, act_bits: IntArray) -> dict[str, IntArray]:
        """The bits of each tensor, from the last operator back to the inputs."""
        count = len(act_bits)
        bits: dict[str, IntArray] = {}
        own = {op.name: op.bytes_per_item for op in self._network.ops}
        for name in [*reversed(own), *self._inputs]:
            item = own.get(name, 4)
            asked = [act_bits[:, self._layers[r.layer]] if r.kind == "layer" else bits[r.name] for r in self._readers.get(name, ())]
            bits[name] = np.max(asked, axis=0) if asked and item == 4 else np.full(count, 8 * item)
        return bits

    def _input(self, name: str, widths: IntArray, bits: IntArray) -> FloatArray:
        """Bytes of one of the model's own inputs, whose shape its first reader tells."""
        reader = self._readers[name][0]
        if reader.kind == "layer":
            layer = self._network.layer(reader.layer)
            return np.ceil(self._at(layer.inputs, widths) * prod(layer.in_size) * bits / 8)
        return np.ceil(self._items(reader.shape, widths) * bits / 8)
