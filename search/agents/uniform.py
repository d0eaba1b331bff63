"""The uniform control: every group keeps the same share of its channels, every layer has the same precision."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tightrope.search.agent import Problem
from tightrope.search.agents.aim import Aim
from tightrope.search.agents.repair import fit
from tightrope.search.trial import Trial
from tightrope.spaces.batch import Batch, IntArray
from tightrope.spaces.budget import Limits
from tightrope.spaces.policy import Policy, unique
from tightrope.spaces.space import Pair, Space

QUARTERS = (0.25, 0.5, 0.75, 1.0)
"""Of the even shares: where it is looked for layers that cost less at more bits."""


class Uniform:
    """First, for each precision, the largest even share that fits (see `Even`); then small changes to the best of these.

    Args:
        spread: standard deviation of the changes, in [0,1]^d.
    """

    def __init__(self, problem: Problem, *, spread: float = 0.08) -> None:
        self._problem, self._even, self._spread = problem, problem.even, spread
        self._aim, self._best = Aim(problem), Aim(problem)

    def ask(self, number: int) -> Policy:
        problem, rng, even = self._problem, self._problem.rng(number), self._even.policies
        if number < len(even):
            return even[number]
        centre = problem.space.encode(even[0] if self._best.best is None else self._best.best.policy)
        point = np.clip(centre + rng.normal(0, self._spread, centre.shape), 0, 1)
        return fit(problem, point, self._aim.limits(rng))

    def tell(self, trial: Trial) -> None:
        self._aim.tell(trial)
        if trial.number < len(self._even.policies):
            self._best.tell(trial)

    def losses(self) -> Mapping[str, float]:
        return {}


class Even:
    """The even policies of a problem, a good place to begin any search; worked out at the first use, by estimates alone."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._policies: list[Policy] | None = None

    @property
    def policies(self) -> list[Policy]:
        """For each bit pair, the policy of the largest even share within the limits; the least one made to fit if none is.

        Layers have more bits than the pair where that costs less (`_lifted`). Pairs that another one beats in bits and share are
        left out. Under an accuracy to be kept, those of 0.75, 0.5 and 0.25 times the dense cost.
        """
        if self._policies is None:
            problem = self._problem
            aims = [problem.limits] if problem.floor is None else [problem.limited(share) for share in (0.75, 0.5, 0.25)]
            found = [p for limits in aims for p in self._within(limits)]
            self._policies = unique(found) or [fit(problem, problem.space.encode(problem.space.uniform(0.0, (8, 8))))]
        return self._policies

    def _within(self, limits: Limits) -> list[Policy]:
        """Those that no other one beats in weight bits, activation bits and share at once, dearest precision first.

        Where more than an eighth of the trials would go to them, some are left out evenly.
        """
        problem, shares = self._problem, even_shares(self._problem.space)
        space, found = problem.space, list[tuple[int, int, float, Policy]]()
        widths = Batch.of(space.network, [space.uniform(share) for share in shares]).widths
        for pair in sorted({p for offered in space.pairs.values() for p in offered}, reverse=True):
            bits = self._bits(space.uniform(1.0, pair))
            patterns = [self._lifted(widths[round(part * (len(shares) - 1))], bits, limits) for part in QUARTERS]
            different = {p.tobytes(): p for p in (bits, *patterns)}.values()
            ends = [self._largest(self._batch(widths, p), limits) for p in different]
            at, policy = max(ends, key=lambda end: (end[0], -problem.price(problem.cost(end[1]))))
            share = shares[at] if at >= 0 else 0.0
            beaten = any(w >= pair[0] and a >= pair[1] and s >= share for w, a, s, _ in found)
            if limits.met(problem.cost(policy)) and not beaten:
                found.append((*pair, share, policy))
        most = max(4, problem.trials // 8)
        kept = sorted({*np.linspace(0, len(found) - 1, min(most, len(found))).astype(int).tolist()})
        return [found[i][3] for i in kept]

    def _bits(self, policy: Policy) -> IntArray:
        batch = Batch.of(self._problem.network, [policy])
        return np.stack([batch.weight_bits[0], batch.act_bits[0]])

    def _batch(self, widths: IntArray, bits: IntArray) -> Batch:
        """Policies of `b x G` widths and `2 x L` or `b x 2 x L` bits, all layers whole."""
        count = max(len(widths), len(bits) if bits.ndim == 3 else 1)
        widths = np.broadcast_to(widths, (count, widths.shape[1]))
        bits = np.broadcast_to(bits, (count, *bits.shape[-2:]))
        whole = np.zeros_like(bits[:, 0])
        return Batch(self._problem.network, widths, bits[:, 0], bits[:, 1], whole, whole)

    def _largest(self, policies: Batch, limits: Limits) -> tuple[int, Policy]:
        """The place of the last of the policies of all even shares that is within the limits; -1 and the first one if none is."""
        met = [i for i, cost in enumerate(self._problem.costs(policies)) if limits.met(cost)]
        return (met[-1], policies[met[-1]]) if met else (-1, policies[0])

    def _lifted(self, widths: IntArray, bits: IntArray, limits: Limits) -> IntArray:
        """The bits, `2 x L`, with layers at more wherever that costs less at these widths.

        A runtime that computes in integers pays at both ends of a run of integer layers, and some layers, a first one of three
        channels say, are faster in floating point: of a net all in 8 bits a few layers at 32 save time and accuracy both.
        Layers are lifted one at a time, and the first few together, for as long as the cost falls.
        """
        problem, count = self._problem, bits.shape[1]
        use = limits.use if limits.top else problem.price
        for _ in range(count):
            tries = [bits]
            for layers in (*([i] for i in range(count)), *([*range(min(n, count))] for n in (2, 3))):
                for pair in self._above(bits, layers):
                    tries.append(bits.copy())
                    tries[-1][:, layers] = np.array(pair)[:, None]
            costs = [*map(use, problem.costs(self._batch(widths[None], np.array(tries))))]
            best = min(range(1, len(tries)), key=lambda i: costs[i], default=0)
            if costs[best] >= costs[0]:
                break
            bits = tries[best]
        return bits

    def _above(self, bits: IntArray, layers: Sequence[int]) -> list[Pair]:
        """Bit pairs of no fewer bits than any of these layers has, that all of them offer."""
        space = self._problem.space
        offered = set.intersection(*({*space.pairs[space.network.layers[i].name]} for i in layers))
        least = tuple(bits[:, layers].max(1).tolist())
        above = sorted(p for p in offered if p[0] >= least[0] and p[1] >= least[1] and p != least)
        return [above[0], above[-1]] if len(above) > 2 else above

    def near(self, number: int, rng: np.random.Generator, spread: float) -> NDArray[np.float64]:
        """A point near one of the even policies, which take turns; `spread` is its standard deviation in [0,1]^d."""
        centre = self._problem.space.encode(self.policies[number % len(self.policies)])
        return np.clip(centre + rng.normal(0, spread, centre.shape), 0, 1)


def even_shares(space: Space) -> list[float]:
    """Every share at which `Space.uniform` changes, ascending: all widths of all groups as shares of the dense ones."""
    return sorted({w / options[-1] for options in space.widths.values() for w in options} | {1.0})
