"""A clock that is told what everything takes, so that what is asserted of a table depends on no machine."""

from typing import Any

import numpy as np
import pytest

from tightrope.estimators.measured.clock import Timed
from tightrope.estimators.measured.nodes import Key, bytes_of
from tightrope.estimators.measured.ort import OrtRuntime
from tightrope.estimators.measured.torch_cpu import TorchRuntime
from tightrope.spaces import Policy

BYTES_PER_MS, CALL_MS = 1e7, 0.002
SHARE, EACH_MS = 0.9, 0.0005  # of its time alone that a node takes in a net, and what each costs there


class Told:
    """What takes `ms`, give or take `noise` of it."""

    def __init__(self, ms: float, noise: float = 0.0, seed: int = 0) -> None:
        self.ms, self.noise, self._rng = ms, noise, np.random.default_rng(seed)

    def visit(self) -> int:
        return round(1e6 * self.ms * (1 + self.noise * self._rng.uniform(-1, 1)))


def node_ms(key: Key) -> float:
    """A call, and the bytes that a node reads and makes at one rate; integer products work in steps of 16 channels."""
    family, sizes = key
    if family.startswith(("com.microsoft:QLinearConv", "com.microsoft:QGemm")):
        sizes = tuple(-(-s // 16) * 16 if s > 16 and s % 4 == 0 else s for s in sizes)
    return CALL_MS + float(bytes_of(family, np.array([sizes], np.int64)).sum()) / BYTES_PER_MS


def net_ms(keys: list[Key]) -> float:
    """The sum of the nodes, each for less than it takes alone, and what each costs in a net."""
    return sum(SHARE * node_ms(k) + EACH_MS for k in keys)


def tell(patch: pytest.MonkeyPatch, kind: type[OrtRuntime] | type[TorchRuntime], noise: float = 0.01) -> None:
    """Let a runtime's units and nets, which are built and run once as ever, take what they are told to."""
    unit, net, steady = kind.unit, kind.net, kind.steady

    def told_unit(self: Any, key: Key) -> tuple[Timed, int]:
        return Told(node_ms(key), noise), unit(self, key)[1]

    def told_net(self: Any, policy: Policy) -> Timed:
        net(self, policy)
        return Told(net_ms([key for key, _ in self.lowered(policy)]), noise)

    def told_steady(self: Any) -> list[Timed]:
        *calls, _ = steady(self)
        return [*(Told(0.1 * (i + 1), noise) for i in range(len(calls))), Told(CALL_MS / 2, noise)]

    patch.setattr(kind, "unit", told_unit)
    patch.setattr(kind, "net", told_net)
    patch.setattr(kind, "steady", told_steady)
