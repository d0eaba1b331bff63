"""What every device offers: the bit pairs that it executes and what a policy costs on it."""

from collections.abc import Sequence
from typing import Protocol

from tightrope.spaces.cost import Cost
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy


class Device(Protocol):
    """A runtime that is measured or an accelerator that is simulated, at one batch size.

    `metrics` are those of `spaces.cost.METRICS` that it can tell. `notes` say which widths it cannot use, and why.
    """

    name: str
    simulated: bool
    batch: int
    metrics: frozenset[str]
    notes: tuple[str, ...]

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        """Pairs of weight and activation bits that it executes for a layer; 32 is floating point."""
        ...

    def estimate(self, network: Network, policy: Policy) -> Cost:
        """What a policy costs, in all of `metrics`. An operator that the device does not know raises `DeviceError`."""
        ...

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        """The same for many policies at once, without the breakdown by unit."""
        ...
