"""The rounding rule of a space as array arithmetic: points of [0,1]^d to policies and back."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.batch import FORMS, Batch, IntArray
from tightrope.spaces.network import Extent, Network
from tightrope.spaces.policy import Policy

Point = NDArray[np.float64]


class Grid:
    """All options as padded tables, for `Space`; arguments as there.

    Every group and layer has its coordinates, `G + 3 L` in all; one that is no variable is 1, which picks its only option.

    Args:
        variables: names of the decisions that are, in order.
    """

    def __init__(
        self, network: Network, widths: Mapping[str, Sequence[int]], ranks: Mapping[str, Sequence[float]], forms: Mapping[str, str],
        pairs: Mapping[str, Sequence[tuple[int, int]]], variables: Sequence[str],
    ) -> None:  # fmt: skip
        self._network, layers = network, network.layers
        names = [f"channels:{g.name}" for g in network.groups]
        names += [f"{kind}:{x.name}" for kind in ("weight_bits", "act_bits", "rank") for x in layers]
        at = {name: i for i, name in enumerate(names)}
        self._count, self._at = len(names), np.array([at[name] for name in variables], np.int64)
        bits = [sorted({w for w, _ in pairs[x.name]}) for x in layers]
        acts = [[sorted(a for w, a in pairs[x.name] if w == weight) for weight in b] for x, b in zip(layers, bits, strict=True)]
        most = max(len(b) for b in bits)
        self._widths, self._n_widths = _padded([widths[g.name] for g in network.groups])  # G x options
        self._weights, self._n_weights = _padded(bits)  # L x options
        padded, count = _padded([a for row in acts for a in row + row[-1:] * (most - len(row))])
        self._acts, self._n_acts = padded.reshape(len(layers), most, -1), count.reshape(len(layers), most)  # L x weights x options
        self._shares, self._n_shares = _padded([ranks[x.name] for x in layers])
        self._inputs, self._outputs = _linear(network, [x.inputs for x in layers]), _linear(network, [x.outputs for x in layers])
        self._forms = np.array([FORMS.index(forms[x.name]) for x in layers], np.int64)
        # MACs of factors: inputs * inner * before + inner * outer * between + outer * outputs * behind
        kernel = np.array([x.kernel for x in layers], np.int64).T
        before, after = (np.array(n, np.int64) for n in ([prod(x.in_size) for x in layers], [prod(x.out_size) for x in layers]))
        middle = np.array([x.out_size[0] * x.in_size[1] for x in layers], np.int64)
        self._spatial, self._tucker = (self._forms == FORMS.index(form) for form in ("spatial", "tucker"))
        self._kernel, self._all = kernel, kernel.prod(0) * after
        self._before = np.where(self._spatial, kernel[0] * middle, np.where(self._tucker, before, after))
        self._between = np.where(self._tucker, self._all, 0)
        self._behind = np.where(self._spatial, kernel[1] * after, after)
        self._layer_at = {x.name: i for i, x in enumerate(layers)}

    def decode(self, points: Point) -> Batch:
        """The policies of `b x d` points."""
        whole = np.ones((len(points), self._count))
        whole[:, self._at] = points
        g, n = len(self._widths), len(self._weights)
        row = np.arange(n)
        widths = self._widths[np.arange(g), _picked(whole[:, :g], self._n_widths)]
        weight = _picked(whole[:, g : g + n], self._n_weights)
        act = _picked(whole[:, g + n : g + 2 * n], self._n_acts[row, weight])
        ranks = self._ranks(self._shares[row, _picked(whole[:, g + 2 * n :], self._n_shares)], widths)
        forms = np.where(ranks > 0, self._forms, 0)
        return Batch(self._network, widths, self._weights[row, weight], self._acts[row, weight, act], ranks, forms)

    def encode(self, policy: Policy) -> Point:
        """The point of a policy, `d`-dim."""
        given, row = Batch.of(self._network, [policy]), np.arange(len(self._weights))
        weight = _nearest(self._weights, given.weight_bits[0])
        shares = self._shares.T
        found = self._ranks(shares, given.widths)  # options x L
        full = self._full_rank(*self._channels(given.widths))[0]
        exact = found == given.ranks
        last = len(shares) - 1 - exact[::-1].argmax(0)
        share = np.where(given.ranks[0] > 0, given.ranks[0] / full, 1.0)
        near = np.where(exact.any(0), np.minimum(last, self._n_shares - 1), _nearest(self._shares, share))
        index = np.concatenate([
            _nearest(self._widths, given.widths[0]), weight, _nearest(self._acts[row, weight], given.act_bits[0]), near
        ])  # fmt: skip
        counts = np.concatenate([self._n_widths, self._n_weights, self._n_acts[row, weight], self._n_shares])
        return np.asarray(((index + 0.5) / counts)[self._at])

    def rank_of(self, layer: str, share: float, widths: Mapping[str, int]) -> int:
        """The rank of one layer at a share, 0 where it stays whole."""
        shares = np.ones((1, len(self._weights)))
        shares[0, self._layer_at[layer]] = share
        given = np.array([[widths[g.name] for g in self._network.groups]], np.int64)
        return int(self._ranks(shares, given)[0, self._layer_at[layer]])

    def _channels(self, widths: IntArray) -> tuple[IntArray, IntArray]:
        return widths @ self._inputs[0] + self._inputs[1], widths @ self._outputs[0] + self._outputs[1]

    def _full_rank(self, inputs: IntArray, outputs: IntArray) -> IntArray:
        return np.where(
            self._spatial, np.minimum(inputs * self._kernel[0], outputs * self._kernel[1]),
            np.where(self._tucker, np.maximum(inputs, outputs), np.minimum(inputs, outputs)),
        )  # fmt: skip

    def _ranks(self, shares: Point, widths: IntArray) -> IntArray:
        """The ranks of `b x L` shares at `b x G` widths; 0 where a layer stays whole or its factors save no MACs."""
        inputs, outputs = self._channels(widths)
        rank = np.maximum(1, np.rint(shares * self._full_rank(inputs, outputs) / 4) * 4).astype(np.int64)
        inner, outer = (np.where(self._tucker, np.minimum(rank, n), rank) for n in (inputs, outputs))
        macs = inputs * inner * self._before + inner * outer * self._between + outer * outputs * self._behind
        saves = (shares < 1) & (self._forms > 0) & (macs < inputs * outputs * self._all)
        return np.where(saves, rank, 0)


def _picked(x: Point, count: IntArray) -> IntArray:
    """The rounding rule: `min(floor(x * n), n - 1)`."""
    return np.minimum((x * count).astype(np.int64), count - 1)


def _nearest(options: NDArray[Any], values: NDArray[Any]) -> IntArray:
    """For each row of options, the place of that nearest to its value, the first where some tie."""
    return np.asarray(np.abs(options - values[:, None]).argmin(1))


def _padded(rows: Sequence[Sequence[float]]) -> tuple[NDArray[Any], IntArray]:
    """Rows as one array, their last entries repeated, and how long each is."""
    most = max(map(len, rows), default=1)
    padded = np.array([[*row, *[row[-1]] * (most - len(row))] for row in rows])
    return padded.reshape(len(rows), most), np.array([len(row) for row in rows], np.int64)


def _linear(network: Network, extents: Sequence[Extent]) -> tuple[IntArray, IntArray]:
    """Extents as `widths @ matrix + fixed`."""
    matrix, at = np.zeros((len(network.groups), len(extents)), np.int64), {g.name: i for i, g in enumerate(network.groups)}
    for i, extent in enumerate(extents):
        for group, repeat in extent.terms:
            matrix[at[group], i] += repeat
    return matrix, np.array([extent.fixed for extent in extents], np.int64)
