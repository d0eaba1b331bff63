"""Costs of many policies of one network: every distinct variant of a layer, or of others like it, is costed once and looked up."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from tightrope.estimators.analytic.block import Block, FloatArray, blocks_of
from tightrope.estimators.analytic.memory import Liveness
from tightrope.estimators.analytic.model import Model, Traffic
from tightrope.estimators.analytic.operators import fused, products, sort_of
from tightrope.estimators.encode import Encoder, Extents, Shapes
from tightrope.estimators.marked import Marked, spread
from tightrope.spaces.batch import FORMS, Batch, IntArray
from tightrope.spaces.errors import PolicyError
from tightrope.spaces.network import Extent, Network
from tightrope.spaces.policy import BITS
from tightrope.spaces.unit import PARTS, Unit

COLUMNS = ("compute_ms", "memory_ms", "stall_ms", "overhead_ms", "energy_mj", "size_bytes", "macs")
MOST_PARTS = max(PARTS.values())
_MOST = 1 << 16  # variants of a layer remembered: 11 MB
_FIELDS = ((8, "bits"), (8, "bits"), (4, "form"), (1 << 15, "rank"), (1 << 20, "inputs"), (1 << 20, "outputs"))  # of a code


class Table:
    """Everything that a model says of one network at one batch size, remembered."""

    def __init__(self, network: Network, name: str, model: Model, batch: int) -> None:
        self.network, self._model, self._batch = network, model, batch
        self.encode = Encoder(network, name, {x.name: frozenset(model.pairs(x.kind)) for x in network.layers})
        self._group_at = {g.name: i for i, g in enumerate(network.groups)}
        self._layer_at = {x.name: i for i, x in enumerate(network.layers)}
        self._liveness = Liveness(network)
        extents = Extents(network)
        self._at, self._items = extents.at, extents.items
        self._rest = Shapes(network, [parameter.shape for parameter in network.parameters])
        self.products = products(network)
        self.between = [
            op for op in network.ops if sort_of(op) in ("unary", "elementwise", "reduce") and op.name not in fused(network)
        ]
        alike: list[Hashable] = [self._geometry(i) for i in range(len(network.layers))] + [p.op for p in self.products]
        memos = {key: Marked((MOST_PARTS, len(COLUMNS)), _MOST) for key in dict.fromkeys(alike)}
        self._memos = [memos[key] for key in alike]
        self._inputs = self._matrix([x.inputs for x in network.layers])
        self._outputs = self._matrix([x.outputs for x in network.layers])

    def rows(self, found: Batch) -> list[FloatArray]:
        """For each layer, then each product of activations, a `b x 3 x 7` array of `COLUMNS` by unit."""
        codes = _join(
            np.searchsorted(BITS, found.weight_bits), np.searchsorted(BITS, found.act_bits), found.forms, found.ranks,
            found.widths @ self._inputs[0] + self._inputs[1], found.widths @ self._outputs[0] + self._outputs[1],
        )  # fmt: skip
        answers = [self._look(i, codes[:, i], self._layer) for i in range(len(self._layer_at))]
        for i, product in enumerate(self.products, len(self._layer_at)):
            m, k, n = (self._at(extent, found.widths) for extent in (product.m, product.k, product.n))
            calls = self._items(product.calls, found.widths)
            eight = np.full(len(m), BITS.index(8))
            one = self._look(i, _join(eight, eight, 0 * m, m, k, n), self._product)
            answers.append(one * np.reshape(calls, (-1, 1, 1)))
        return answers

    def between_rows(self, found: Batch) -> list[FloatArray]:
        """For each operator of `between`, a `b x 7` array of `COLUMNS`; empty where the model costs layers alone."""
        if not self.between or not self._model.costs_operators:
            return []
        sizes, answers = self._liveness.sizes(found.widths, found.act_bits), []
        for op in self.between:
            read = sum((sizes[name] for name in op.inputs), start=np.zeros(len(found.widths)))
            items = self._items(op.shape, found.widths).astype(np.float64)
            traffic = Traffic(sort_of(op), read * self._batch, sizes[op.name] * self._batch, items * self._batch)
            f = self._model.operator(traffic)
            nothing = np.zeros(len(items))
            answers.append(np.stack([f.compute_ms, f.memory_ms, f.stall_ms, f.overhead_ms, f.energy_mj, nothing, nothing], axis=1))
        return answers

    def rest_bytes(self, found: Batch) -> IntArray:
        """Bytes of the parameters outside of layers, at 32 bits."""
        return np.asarray(4 * self._rest(found.widths).sum(axis=1))

    def peak_ram_bytes(self, found: Batch) -> IntArray:
        """Peak memory of activations, for one batch."""
        return self._liveness.peak(found.widths, found.act_bits) * self._batch

    def _look(self, at: int, codes: IntArray, cost: Callable[[int, IntArray], FloatArray]) -> FloatArray:
        """Rows by code; new codes are costed all at once."""
        memo = self._memos[at]
        places = memo.look(spread(codes), lambda new: cost(at, codes[new]))
        return memo.rows[places]

    def _geometry(self, at: int) -> Hashable:
        """What layers have in common that cost alike where codes are equal."""
        some, ends = Extent(1), (at == 0, at == len(self._layer_at) - 1)
        return replace(self.network.layers[at], name="", inputs=some, outputs=some, activation="", frozen=""), ends

    def _layer(self, at: int, codes: IntArray) -> FloatArray:
        weight, act, form, rank, inputs, outputs = _split(codes)
        bits, layer, rows = np.array(BITS), self.network.layers[at], np.zeros((len(codes), MOST_PARTS, len(COLUMNS)))
        for f in np.unique(form).tolist():
            same = form == f
            blocks = blocks_of(
                layer, FORMS[f], self.network.widths, inputs[same], outputs[same], rank[same], bits[weight[same]], bits[act[same]],
                first=at == 0, last=at == len(self._layer_at) - 1,
            )  # fmt: skip
            for part, block in enumerate(blocks):
                rows[same, part] = self._row(block)
        return rows

    def _product(self, at: int, codes: IntArray) -> FloatArray:
        _, _, _, m, k, n = _split(codes)
        rows = np.zeros((len(codes), MOST_PARTS, len(COLUMNS)))
        for tokens in np.unique(m).tolist():
            same = m == tokens
            name, place = self.products[at - len(self._layer_at)].op, (1, tokens)
            unit = Unit(name, "linear", 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, place, place, 8, 8, bias=False)
            eight = np.full(int(same.sum()), 8)
            rows[same, 0] = self._row(Block(unit, k[same], n[same], eight, eight))
        rows[:, :, COLUMNS.index("size_bytes")] = rows[:, :, COLUMNS.index("macs")] = (
            0  # a product has no weights; MACs are the layers'
        )
        return rows

    def _row(self, block: Block) -> FloatArray:
        f = self._model.cost(block, self._batch)
        macs = block.macs * self._batch
        return np.stack([f.compute_ms, f.memory_ms, f.stall_ms, f.overhead_ms, f.energy_mj, block.size_bytes, macs], axis=1)

    def _matrix(self, extents: Sequence[Extent]) -> tuple[IntArray, IntArray]:
        matrix = np.zeros((len(self._group_at), len(extents)), np.int64)
        for i, extent in enumerate(extents):
            for group, repeat in extent.terms:
                matrix[self._group_at[group], i] += repeat
        return matrix, np.array([extent.fixed for extent in extents], np.int64)


def _join(*fields: IntArray) -> IntArray:
    """One whole number for each variant, from the values of `_FIELDS`."""
    code = np.zeros(1, np.int64)
    for values, (size, what) in zip(fields, _FIELDS, strict=True):
        if np.max(values, initial=0) >= size:
            raise PolicyError(f"{what} of a layer must be below {size} to be costed, got {np.max(values)}")
        code = code * size + values
    return code


def _split(codes: IntArray) -> list[IntArray]:
    values = []
    for size, _ in reversed(_FIELDS):
        codes, value = np.divmod(codes, size)
        values.append(value)
    return values[::-1]
