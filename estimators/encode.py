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

    def items(self, shape: tuple[Extent, ...], widths: IntArray) -> IntArray:
        """Number of elements of a tensor of this shape, `b`-dim."""
        found = np.full(len(widths), prod(extent.fixed for extent in shape if not extent.terms), np.int64)
        for extent in shape:
            if extent.terms:
                found *= self.at(extent, widths)
        return found


class Encoder:
    """Encodes policies of one network.

    Args:
        pairs: for every layer the pairs of weight and activation bits that the device executes.
    """

    def __init__(self, network: Network, device: str, pairs: Pairs) -> None:
        self.network, self._device, self._pairs = network, device, pairs
        self._codes = [np.array(sorted(64 * w + a for w, a in pairs[x.name])) for x in network.layers]

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
        codes = found.weight_bits * 64 + found.act_bits
        for i, layer in enumerate(self.network.layers):
            known = self._codes[i]
            place = np.minimum(np.searchsorted(known, codes[:, i]), len(known) - 1)
            wrong = np.flatnonzero(known[place] != codes[:, i])
            if wrong.size:
                weight, act = divmod(int(codes[wrong[0], i]), 64)
                offered = sorted(self._pairs[layer.name])
                raise DeviceError(
                    f"device {self._device!r} executes {len(offered)} pairs of bits of weights and activations for layer "
                    f"{layer.name!r}, {offered[0]} to {offered[-1]}, and {weight} and {act} bits are none of them"
                )
