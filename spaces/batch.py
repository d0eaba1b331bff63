"""Many policies of one network as arrays, so that decoding and costing them is array arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.network import Network
from tightrope.spaces.policy import DENSE, Choice, Policy

IntArray = NDArray[np.int64]
FORMS = ("", "svd", "spatial", "tucker")


@dataclass(frozen=True, eq=False)
class Batch(Sequence[Policy]):
    """`b` policies: group widths `b x G`; weight bits, activation bits, ranks (0: whole) and places in `FORMS`, `b x L`.

    A sequence of policies, each made when it is asked for; a slice is a batch.
    """

    network: Network
    widths: IntArray
    weight_bits: IntArray
    act_bits: IntArray
    ranks: IntArray
    forms: IntArray

    @staticmethod
    def of(network: Network, policies: Sequence[Policy]) -> Batch:
        """The policies as arrays; one that is a batch of this network already is taken as it is.

        Raises:
            PolicyError: a policy is for another network, or has a width that no model could.
        """
        if isinstance(policies, Batch) and policies.network.fingerprint == network.fingerprint:
            return policies
        fingerprint, dense = network.fingerprint, np.array([g.width for g in network.groups], np.int64)
        groups = {group.name: i for i, group in enumerate(network.groups)}
        layers = {layer.name: i for i, layer in enumerate(network.layers)}
        widths = np.repeat(dense[None], len(policies), axis=0)
        plain = np.array([DENSE.weight_bits, DENSE.act_bits, 0, 0])
        choices = np.repeat(plain, len(policies) * len(layers)).reshape(4, len(policies), len(layers))
        form = {name: i for i, name in enumerate(FORMS)}
        try:
            if {p.network for p in policies} - {fingerprint}:
                raise KeyError
            rows, names, sizes = _entries([p.widths for p in policies])
            if len(rows):
                widths[rows, _numbers(map(groups.__getitem__, names), len(rows))] = sizes
            rows, names, what = _entries([p.choices for p in policies])
            if len(rows):
                _, one, which = np.unique(_numbers(map(id, what), len(rows)), return_index=True, return_inverse=True)
                known = [what[i] for i in one.tolist()]  # most are alike, and read once
                read = np.array([(c.weight_bits, c.act_bits, c.rank or 0, form[c.form]) for c in known], np.int64).T
                choices[:, rows, _numbers(map(layers.__getitem__, names), len(rows))] = read[:, which]
        except KeyError:
            for policy in policies:
                policy.check(network)
            raise
        if (widths < 1).any() or (widths > dense).any():
            for policy in policies:
                policy.check(network)
        return Batch(network, widths, *choices)

    def __len__(self) -> int:
        return len(self.widths)

    @overload
    def __getitem__(self, at: int) -> Policy: ...
    @overload
    def __getitem__(self, at: slice) -> Batch: ...
    def __getitem__(self, at: int | slice) -> Policy | Batch:
        if isinstance(at, slice):
            return self.take(at)
        network = self.network
        rows = zip(*(a[at].tolist() for a in (self.weight_bits, self.act_bits, self.ranks, self.forms)), strict=True)
        choices = tuple((x.name, c) for x, row in zip(network.layers, rows, strict=True) if (c := _choice(*row)) is not DENSE)
        widths = zip(network.groups, self.widths[at].tolist(), strict=True)
        return Policy(network.fingerprint, tuple((g.name, w) for g, w in widths if w != g.width), choices)

    def take(self, at: slice | Sequence[int] | IntArray) -> Batch:
        """The policies at these places."""
        arrays = (self.widths, self.weight_bits, self.act_bits, self.ranks, self.forms)
        return Batch(self.network, *(a[at] for a in arrays))

    def keys(self) -> list[bytes]:
        """For each policy bytes that no other policy of the network has."""
        arrays = (self.widths, self.weight_bits, self.act_bits, self.ranks, self.forms)
        table = np.concatenate(arrays, axis=1).astype(np.int32)
        data, size = table.tobytes(), table.shape[1] * 4
        return [data[i : i + size] for i in range(0, len(table) * size, size)]


def _entries(of: Sequence[tuple[tuple[str, Any], ...]]) -> tuple[IntArray, Iterator[str], list[Any]]:
    """All entries of policies: the policy, the name and the value of each. No tuple is made for one, which Python's collector of
    cycles would count."""
    every = [*chain.from_iterable(of)]
    rows = np.repeat(np.arange(len(of)), [*map(len, of)])
    return rows, map(itemgetter(0), every), [*map(itemgetter(1), every)]


def _numbers(values: Iterable[int], count: int) -> IntArray:
    return np.fromiter(values, np.int64, count)


@lru_cache(maxsize=1 << 14)
def _choice(weight_bits: int, act_bits: int, rank: int, form: int) -> Choice:
    choice = Choice(weight_bits, act_bits, rank or None, FORMS[form] if rank else "")
    return DENSE if choice == DENSE else choice
