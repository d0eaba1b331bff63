"""Many policies of one network as arrays, so that their costs are array arithmetic."""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from tightrope.spaces.batch import Batch, IntArray
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Extent, Network
from tightrope.spaces.policy import Policy

Pairs = Mapping[str, frozenset[tuple[int, int]]]


class Extents:
    """Sizes of one network at the widths of many policies, a `b x G` array."""

    def __init__(self, network: Network) -> None:
        self._groups = {group.name: i for i, group in enumerate(network.groups)}

    def at(self, extent: Extent, widths: IntArray) -> IntArray:
        """An extent at the widths of each policy, `b`-dim."""
        found = np.full(len(widths), extent.fixed, np.int64)
        for group, repeat in extent.terms:
            found += widths[:, self._groups[group]] * repeat
        return found

    def each(self, extents: Sequence[Extent], widths: IntArray) -> IntArray:
        """Several extents, `b x n`."""
        return np.stack([self.at(extent, widths) for extent in extents], axis=1)

    def items(self, shape: tuple[Extent, ...], widths: IntArray) -> IntArray:
        """Number of elements of a tensor of this shape, `b`-dim."""
        found = np.full(len(widths), prod(extent.fixed for extent in shape if not extent.terms), np.int64)
        for extent in shape:
            if extent.terms:
                found *= self.at(extent, widths)
        return found


class Shapes:
    """Number of elements of many tensors at once, as products of linear forms over the widths."""

    def __init__(self, network: Network, shapes: Sequence[tuple[Extent, ...]]) -> None:
        groups = {group.name: i for i, group in enumerate(network.groups)}
        follow = [[extent for extent in shape if extent.terms] for shape in shapes]
        self._fixed = np.array([prod(extent.fixed for extent in shape if not extent.terms) for shape in shapes], np.int64)
        most = max(map(len, follow), default=0)
        self._forms = [(np.zeros((len(groups), len(shapes)), np.int64), np.ones(len(shapes), np.int64)) for _ in range(most)]
        for tensor, extents in enumerate(follow):
            for (matrix, fixed), extent in zip(self._forms, extents, strict=False):
                fixed[tensor] = extent.fixed
                for group, repeat in extent.terms:
                    matrix[groups[group], tensor] += repeat

    def __call__(self, widths: IntArray) -> IntArray:
        """Elements of each of the `T` tensors, `b x T`, at `b x G` widths."""
        found = np.repeat(self._fixed[None], len(widths), axis=0)
        for matrix, fixed in self._forms:
            found *= widths @ matrix + fixed
        return found


class Encoder:
    """Encodes policies of one network.

    Args:
        pairs: for every layer the pairs of weight and activation bits that the device executes.
    """

    def __init__(self, network: Network, device: str, pairs: Pairs) -> None:
        self.network, self._device, self._pairs = network, device, pairs
        self._able = np.zeros((len(network.layers), 1 << 12), np.bool_)  # by 64 times the weight bits, plus the activation bits
        for i, layer in enumerate(network.layers):
            self._able[i, [64 * w + a for w, a in pairs[layer.name]]] = True

    def __call__(self, policies: Sequence[Policy]) -> Batch:
        """The policies as arrays, checked as far as it is cheap: network, names, widths and bit pairs.

        Raises:
            PolicyError: a policy is for another network, or no model could satisfy it.
            DeviceError: the device does not execute the bits of a layer.
        """
        found = Batch.of(self.network, policies)
        self._check(found)
        return found

    def _check(self, found: Batch) -> None:
        able = self._able[np.arange(len(self._able)), found.weight_bits * 64 + found.act_bits]
        if not able.all():
            row, at = np.argwhere(~able)[0].tolist()
            layer = self.network.layers[at]
            offered = sorted(self._pairs[layer.name])
            raise DeviceError(
                f"device {self._device!r} executes {len(offered)} pairs of bits of weights and activations for layer "
                f"{layer.name!r}, {offered[0]} to {offered[-1]}, and {found.weight_bits[row, at]} and {found.act_bits[row, at]} "
                "bits are none of them"
            )
