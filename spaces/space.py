"""The choices that a device allows for a network, and points of it as vectors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tightrope.spaces.batch import Batch
from tightrope.spaces.errors import SpaceError
from tightrope.spaces.grid import Grid
from tightrope.spaces.network import Layer, Network, forms
from tightrope.spaces.policy import Choice, Policy

Pair = tuple[int, int]  # weight bits, activation bits
FP32: Pair = (32, 32)


@dataclass(frozen=True, slots=True)
class Variable:
    """One decision. `kind` is `channels` (of a group), or `rank`, `weight_bits` or `act_bits` (of a layer).

    `options` ascend from cheapest to dearest. Those of a rank are shares of the full rank at the widths chosen, the last of
    them 1.0 for a layer left whole. Those of `act_bits` depend on the weight bits chosen; here stand all that occur.
    """

    kind: str
    target: str
    options: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.target}"


@dataclass(frozen=True)
class Space:
    """Widths of each group, rank shares of each layer and bit pairs of each layer, each ascending in cost.

    A vector of [0,1]^d has one coordinate for each variable with more than one option, in the order in which a forward
    pass meets the targets. **The rounding rule**: a coordinate x picks option `min(floor(x * n), n - 1)` of its n options,
    so that all options are equally likely under a uniform x; `encode` gives the middle of an option's interval. A rank
    share s becomes `max(1, round(s * full / 4) * 4)`, or the layer whole where that saves no MACs.

    `losses` tells what the options of a decision are expected to lose, by its name, where something is known of the weights
    (`compressors/sensitivity.py`).
    """

    network: Network
    widths: Mapping[str, tuple[int, ...]]
    ranks: Mapping[str, tuple[float, ...]]
    forms: Mapping[str, str]
    pairs: Mapping[str, tuple[Pair, ...]]
    dropped: tuple[str, ...] = ()
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @staticmethod
    def build(
        network: Network,
        pairs: Callable[[Layer], Sequence[Pair]],
        *,
        least_width: float = 0.125,
        width_step: int = 8,
        rank_shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5),
        form: str = "spatial",
        dropped: Iterable[str] = (),
        channels: bool = True,
        ranks: bool = True,
    ) -> "Space":
        """The space of a device that executes `pairs(layer)` of weight and activation bits for a layer.

        Args:
            least_width: smallest share of its channels that a group keeps.
            width_step: widths are multiples of this, and the dense width. Groups with fewer than four steps go by ones.
            rank_shares: shares of the full rank; empty leaves every layer whole.
            form: `spatial` or `tucker` for k x k convolutions (linear and 1x1 take `svd`).
            dropped: what the device cannot use, in words, for the user.
            channels, ranks: False takes these decisions out of the space.

        First and last layer are never below 8 bits.
        """
        if not 0 < least_width <= 1 or width_step < 1 or any(not 0 < s < 1 for s in rank_shares):
            raise SpaceError(
                f"least_width must lie in (0, 1], width_step be at least 1 and rank shares lie in (0, 1), "
                f"got {least_width}, {width_step} and {tuple(rank_shares)}"
            )
        if form not in ("spatial", "tucker"):
            raise SpaceError(f"form must be spatial or tucker, got {form!r}")
        widths = {}
        for group in network.groups:
            step = width_step if group.width >= 4 * width_step else max(1, group.width // 8)
            least = max(1, math.ceil(group.width * least_width))
            steps = {w for w in range(step, group.width, step) if w >= least}
            widths[group.name] = tuple(sorted(steps | {group.width})) if channels else (group.width,)
        ends = {network.layers[0].name, network.layers[-1].name}
        bits, shares, low_rank = {}, {}, {}
        for layer in network.layers:
            offered = {p for p in pairs(layer) if layer.name not in ends or min(p) >= 8}
            bits[layer.name] = tuple(sorted(offered or {FP32}))
            able = [f for f in forms(layer) if f in ("svd", form)]
            low_rank[layer.name] = able[0] if able and ranks else ""
            shares[layer.name] = (*sorted(rank_shares), 1.0) if able and ranks and layer.name not in ends else (1.0,)
        return Space(network, widths, shares, low_rank, bits, tuple(dropped))

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """The decisions with more than one option, in the order of the walk."""
        found: list[Variable] = []
        seen: set[str] = set()
        for layer in self.network.layers:
            for group in layer.outputs.groups:
                if group not in seen:
                    seen.add(group)
                    found.append(Variable("channels", group, tuple(map(float, self.widths[group]))))
            pairs = self.pairs[layer.name]
            found.append(Variable("rank", layer.name, self.ranks[layer.name]))
            found.append(Variable("weight_bits", layer.name, tuple(sorted({float(w) for w, _ in pairs}))))
            most = max(sum(w == u for u, _ in pairs) for w, _ in pairs)
            options = tuple(sorted({float(a) for _, a in pairs})) if most > 1 else (float(pairs[-1][1]),)
            found.append(Variable("act_bits", layer.name, options))
        return tuple(v for v in found if len(v.options) > 1)

    @property
    def dimension(self) -> int:
        return len(self.variables)

    def decode(self, x: ArrayLike) -> Policy:
        """The policy of a vector in [0,1]^d, by the rounding rule."""
        return self.decode_many(np.asarray(x, dtype=np.float64)[None])[0]

    def decode_many(self, x: ArrayLike) -> Batch:
        """The policies of the rows of a `b x d` array."""
        points, d = np.asarray(x, dtype=np.float64), self.dimension
        if points.ndim != 2 or points.shape[1] != d or not (points.min(initial=0) >= 0 and points.max(initial=1) <= 1):
            raise SpaceError(f"a point of this space has {d} coordinates in [0, 1], got {np.squeeze(points)!r}")
        return self._grid.decode(points)

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self.network, self.widths, self.ranks, self.forms, self.pairs, [v.name for v in self.variables])

    def rank_of(self, layer: Layer, share: float, widths: Mapping[str, int]) -> int | None:
        """The rank that a share comes to at these widths; None where the layer stays whole or factors save no MACs."""
        if share >= 1 or not self.forms[layer.name]:
            return None
        return self._grid.rank_of(layer.name, share, widths) or None

    def encode(self, policy: Policy) -> NDArray[np.float64]:
        """The vector of a policy of this space; `decode` gives the policy back. The nearest option stands for another."""
        return self._grid.encode(policy)

    def nearest(self, policy: Policy) -> Policy:
        """The policy of this space nearest to another one of the same network, decision by decision."""
        policy.check(self.network)
        return self.decode(self.encode(policy))

    def contains(self, policy: Policy) -> bool:
        """Whether the policy is a point of this space."""
        return policy.network == self.network.fingerprint and self.nearest(policy) == policy

    def sample(self, rng: np.random.Generator) -> Policy:
        """A policy drawn uniformly in [0,1]^d."""
        return self.decode(rng.random(self.dimension))

    def uniform(self, share: float, pair: Pair | None = None) -> Policy:
        """The policy that keeps the same share of every group, leaves ranks whole and takes `pair` where it is offered."""
        widths = {g: min(options, key=lambda w: abs(w - share * options[-1])) for g, options in self.widths.items()}
        wanted = pair or FP32
        choices = {
            name: Choice(*min(pairs, key=lambda p: abs(p[0] - wanted[0]) + abs(p[1] - wanted[1])))
            for name, pairs in self.pairs.items()
        }
        return Policy.make(self.network, widths, choices)

    @property
    def dense(self) -> Policy:
        """The policy that changes nothing, or as little as the device allows (a device without floating point)."""
        return self.decode(np.ones(self.dimension))

    @cached_property
    def size(self) -> int:
        """Number of points, counting a rank share that comes to the layer whole as one of its own."""
        widths = math.prod(len(w) for w in self.widths.values())
        return widths * math.prod(len(self.pairs[x.name]) * len(self.ranks[x.name]) for x in self.network.layers)
