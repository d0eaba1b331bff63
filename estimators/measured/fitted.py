"""One network's latency table, filled and fitted: what a measured device knows of the network that it is prepared for."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.optimize import nnls

from tightrope.estimators.encode import Batch, Encoder
from tightrope.estimators.measured.apart import T
from tightrope.estimators.measured.clock import CHUNK, Float, Timed, low_quartile, noise_floor
from tightrope.estimators.measured.grid import Design, Ints, design
from tightrope.estimators.measured.nodes import Key
from tightrope.estimators.measured.patterns import Patterns, Told, learn
from tightrope.estimators.measured.sampling import mixed, probes, rounds_of
from tightrope.estimators.measured.table import Table, Untimed, designs
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Network
from tightrope.spaces.policy import Policy, unique
from tightrope.spaces.space import Space

MET, PLAIN, ANCHORS = 1000, 500, 40
"""Policies that are lowered to find the nodes to time, others that show what is common, and nets that are built to fit the sum."""
NODE_ROUNDS, NET_ROUNDS = 20, 40
DRIFT = 0.015  # of the same net timed in two runs, both on the scale of the reference nodes
CHUNK_NETS, CHUNK_BYTES = 8, 64 << 20
LEAST_NETS = 8
REMEMBERED = 4096  # policies whose nodes are kept
FEW = 8  # policies that are costed one by one
PER_MS = 1e9  # times are added as whole picoseconds, so that a sum does not depend on its order
Progress = Callable[[int, int], None]
Run = Callable[[Callable[[], tuple[int, Float, float, float]]], tuple[int, Float, float, float]]
log = logging.getLogger(__name__)


class Runtime(Protocol):
    """What runs a network's policies, whole and unit by unit."""

    def lowered(self, policy: Policy) -> list[tuple[Key, str]]:
        """The units of a policy, each with the layer or operator that it belongs to."""
        ...

    def told(self, policy: Policy) -> tuple[list[tuple[Key, str]], Told | None]:
        """The same, and the patterns that they follow; None where a runtime does not say how sizes follow the policy."""
        ...

    def unit(self, key: Key) -> tuple[Timed, int]:
        """A unit alone, and the bytes that it takes."""
        ...

    def apart(self, work: Callable[[], T]) -> T:
        """Do work that builds and times units: in a process of its own if what it leaves in memory slows what runs after it."""
        ...

    def net(self, policy: Policy) -> Timed:
        """A policy's whole net."""
        ...

    def steady(self) -> Sequence[Timed]:
        """Calls that tell how fast the machine is while others are timed, the same for every table; the last does nothing."""
        ...


class Fitted:
    """Times of policies of one space in a runtime.

    Latency is `weights[0]` times the sum of the nodes' times plus `weights[1]` per node.

    Attributes:
        errors: relative errors of the predicted latency of the nets that were built to fit it, each left out of its fit.
        spread: half of a 90 % interval, relative: what 90 % of the errors stay below, and the clock's drift between runs.

    Raises:
        DeviceError: the runtime cannot run the network, or the table on disk is damaged or for something else.
    """

    def __init__(
        self, network: Network, encode: Encoder, space: Space, runtime: Callable[[], Runtime], path: Path | None,
        mark: Mapping[str, Any], progress: Progress | None, seed: int, *, here: bool = True,
    ) -> None:  # fmt: skip
        self.network, self.encode, self.space, self._make, self._here = network, encode, space, runtime, here
        self._known: dict[Policy, list[tuple[Key, str]]] = {}
        self._picoseconds: dict[Key, float] = {}
        self.table = Table(path, mark)
        if not self.table.complete:
            self._fill(np.random.default_rng(seed), progress)
        noted = self.table.notes.get("patterns")
        self.patterns = None if noted is None else Patterns.from_json(network, noted)
        self._fit()

    @cached_property
    def runtime(self) -> Runtime:
        """What lowers, builds and runs policies; made when it is first needed."""
        return self._make()

    def _fill(self, rng: np.random.Generator, progress: Progress | None) -> None:
        """Time the nodes of the space and the nets to fit."""
        wanted, patterns = survey(self.space, self.runtime, self.encode, rng)
        if patterns is not None:
            self.table.note("patterns", patterns.to_json())
        self.table.declare(wanted)
        missing = self.table.missing(wanted)
        anchors = unique(mixed(self.space, rng, 2 * ANCHORS))[:ANCHORS]
        total = len(missing) + len(anchors)
        log.info("timing %d nodes of %d families, and %d nets", len(missing), len(wanted), len(anchors))
        names = [json.dumps(p.to_json(), sort_keys=True) for p in anchors]
        fresh = [i for i, name in enumerate(names) if name not in self.table.nets]
        done = 0
        for start in range(0, len(fresh), CHUNK_NETS):
            chosen = fresh[start : start + CHUNK_NETS]
            runners = [self.runtime.net(p) for p in (self.space.dense, *(anchors[i] for i in chosen))]
            samples, reference, empty = rounds_of(runners, NET_ROUNDS, rng, self.runtime.steady())
            dense = float(low_quartile(samples[:, :1])[0])
            self.table.add_nets([names[i] for i in chosen], samples[:, 1:], reference, empty, dense)
            done += len(chosen)
            if progress is not None:
                progress(done, total)
        for chunk in self._time([missing[i] for i in rng.permutation(len(missing)).tolist()], rng, self.runtime.apart):
            done += chunk
            if progress is not None:
                progress(done, total)
        self.table.finish()

    def _time(self, keys: Sequence[Key], rng: np.random.Generator, run: Run) -> Iterator[int]:
        """Time nodes and add them to the table, in chunks, each of which `run` does; gives the number of each."""
        left = [*keys]
        while left:
            count, samples, reference, empty = run(partial(self._chunk, left, rng.spawn(1)[0]))
            self.table.add(left[:count], samples, reference, empty)
            left = left[count:]
            yield count

    def _chunk(self, keys: Sequence[Key], rng: np.random.Generator) -> tuple[int, Float, float, float]:
        """Time the first of the nodes, as many as memory may hold at once: their number, and what `rounds_of` says of them."""
        runners: list[Timed] = []
        size = 0
        for key in keys[:CHUNK]:
            if size >= CHUNK_BYTES:
                break
            runner, taken = self.runtime.unit(key)
            runners.append(runner)
            size += taken
        return len(runners), *rounds_of(runners, NODE_ROUNDS, rng, self.runtime.steady())

    def timed(self, policies: Sequence[Policy], *, rounds: int = NET_ROUNDS, seed: int = 0) -> tuple[Float, float]:
        """Build the nets of policies and time them beside the dense one: milliseconds on the table's scale, and the noise floor."""
        rng, times, floors = np.random.default_rng(seed), [], []
        for start in range(0, len(policies), CHUNK_NETS):
            nets = [self.runtime.net(p) for p in (self.space.dense, *policies[start : start + CHUNK_NETS])]
            samples, _, empty = rounds_of(nets, rounds, rng, self.runtime.steady())
            dense, *figures = (low_quartile(samples) - empty).tolist()
            times += [self.table.dense_ms * figure / dense for figure in figures]
            floors.append(noise_floor(samples))
        return np.array(times), float(np.mean(floors))

    def _fit(self) -> None:
        """One scale and one cost per node, nearest to the nets that were built, and the error when each is left out.

        The dense net counts as much as a quarter of the others, since budgets are ratios to it.
        """
        pairs = [(Policy.from_json(json.loads(name)), time) for name, time in self.table.nets.items()]
        if len(pairs) < LEAST_NETS:
            raise DeviceError(
                f"fitting needs at least {LEAST_NETS} timed nets, the table has {len(pairs)}; move it away to measure anew"
            )
        policies = [self.space.dense, *(p.normal(self.network) for p, _ in pairs)]
        features = self.features(policies, self.encode(policies))
        rows = features / np.array([1.0, *(ratio for _, ratio in pairs)])[:, None] / self.table.dense_ms
        dense, rows = np.repeat(rows[:1], len(pairs) // 4, axis=0), rows[1:]
        self.weights = nearest_sum(np.concatenate([rows, dense]))
        self.errors = tuple(
            float(rows[i] @ nearest_sum(np.concatenate([np.delete(rows, i, 0), dense])) - 1) for i in range(len(rows))
        )
        self.spread = float(np.quantile(np.abs(self.errors), 0.9)) + DRIFT
        log.info("latency of %d nets left out one by one is predicted to %.1f %%", len(rows), 100 * np.mean(np.abs(self.errors)))

    def held_errors(self) -> list[float]:
        """Relative errors of the predicted latency of nets that the fit never saw."""
        policies = [Policy.from_json(json.loads(name)).normal(self.network) for name in self.table.held]
        if not policies:
            return []
        found = self.latency(policies, self.encode(policies))
        return [float(ms / self.table.dense_ms / ratio - 1) for ms, ratio in zip(found, self.table.held.values(), strict=True)]

    def latency(self, policies: Sequence[Policy], batch: Batch) -> Float:
        """Milliseconds of policies, `b`-dim; `batch` has them as arrays."""
        features = self.features(policies, batch)
        found: Float = features[:, 0] * self.weights[0] + features[:, 1] * self.weights[1]
        return found

    def features(self, policies: Sequence[Policy], batch: Batch) -> Float:
        """The sum of the nodes' times in milliseconds, and their number, `b x 2`.

        Nodes of the space that the probes did not enclose are timed now.

        Raises:
            DeviceError: a node is outside of what was timed, and the policy outside of the space.
        """
        if self.patterns is None:
            found = np.full((len(batch), 2), np.nan)
        else:
            found = self._few(self.patterns, batch) if len(batch) <= FEW else self._many(self.patterns, batch)
        for i in np.flatnonzero(np.isnan(found[:, 0])).tolist():  # shows what no probe did, or has nodes that were not timed
            times = self.times(policies[i])
            found[i] = sum(np.rint(np.multiply(times, PER_MS)).tolist()), len(times)
        return found / [PER_MS, 1.0]

    def _many(self, patterns: Patterns, batch: Batch) -> Float:
        """Picoseconds and number of nodes, NaN where they cannot be told."""
        flat = patterns(batch)
        found = np.zeros((len(batch), 2))
        by_family: dict[str, list[tuple[Ints, Ints]]] = {}
        for place, who in flat.who.items():
            family, columns = patterns.patterns[place]
            by_family.setdefault(family, []).append((who, columns))
        for family, parts in by_family.items():
            who = np.concatenate([w for w, _ in parts])
            sizes = np.concatenate([flat.sizes[w[:, None], columns] for w, columns in parts])
            times = np.rint(self.table.times(family, sizes) * PER_MS)
            found[:, 0] += np.bincount(who, times, len(batch))
            found[:, 1] += np.bincount(who, minlength=len(batch))
        found[~flat.told] = np.nan
        return found

    def _few(self, patterns: Patterns, batch: Batch) -> Float:
        """The same, quicker for single policies."""
        sights = patterns.sights(batch)
        told, sizes = patterns.tells(sights), patterns.columns(batch).tolist()
        found = np.full((len(batch), 2), np.nan)
        for i in np.flatnonzero(told).tolist():
            row = sizes[i]
            times = [self._time_of((f, tuple([row[c] for c in columns]))) for f, columns in patterns.of(sights[i].tolist())]
            found[i] = sum(times), len(times)
        return found

    def _time_of(self, key: Key) -> float:
        if key not in self._picoseconds:
            self._picoseconds[key] = float(np.rint(self.table.times(key[0], np.array([key[1]], np.int64))[0] * PER_MS))
        return self._picoseconds[key]

    def lowered(self, policy: Policy) -> list[tuple[Key, str]]:
        """The nodes of a policy, each with the layer or operator that it belongs to."""
        if policy not in self._known:
            if len(self._known) > REMEMBERED:
                self._known.clear()
            self._known[policy] = self.runtime.lowered(policy)
        return self._known[policy]

    def times(self, policy: Policy) -> list[float]:
        """Milliseconds of a policy's nodes as it is lowered, alone; nodes that the probes did not enclose are timed now."""
        keys = [k for k, _ in self.lowered(policy)]
        try:
            return [self.table.time(k) for k in keys]
        except Untimed:
            missing = [k for k in dict.fromkeys(keys) if not self.table.knows(k)]
        if not self._here or not self.space.contains(policy):
            raise DeviceError(
                f"the latency table must enclose every node of a policy, but {len(missing)} are outside of what was timed, "
                f"{missing[0][0]} at {list(missing[0][1])} among them; prepare the device with the space that the policy is from"
            )
        log.info("timing %d nodes that no probe enclosed, %s among them", len(missing), missing[0])
        self.table.declare({family: design(family, [sizes]) for family, sizes in missing})
        for _ in self._time(missing, np.random.default_rng(0), lambda work: work()):
            pass
        self._picoseconds.clear()
        return [self.table.time(k) for k in keys]


def survey(
    space: Space, runtime: Runtime, encode: Encoder, rng: np.random.Generator
) -> tuple[dict[str, Design], Patterns | None]:  # fmt: skip
    """The nodes of a space to time, and the patterns that its policies come to where the runtime tells them."""
    policies = probes(space, rng, MET) + mixed(space, rng, PLAIN)
    met: dict[str, set[tuple[int, ...]]] = {}
    shown: list[Told] = []
    for index, policy in enumerate(policies):
        nodes, told = runtime.told(policy)
        if told is not None:
            shown.append(told)
        if index < len(policies) - PLAIN:
            for (family, sizes), _ in nodes:
                met.setdefault(family, set()).add(sizes)
    return designs(met), learn(space.network, encode(policies), shown) if len(shown) == len(policies) else None


def nearest_sum(rows: np.ndarray, rounds: int = 30) -> np.ndarray:
    """Weights, none below zero, that bring `rows @ weights` nearest to one by the mean absolute error.

    Least squares, repeated with each row weighed by the inverse of its error, so that single nets do not pull the rest.
    """
    heavy = np.ones(len(rows))
    weights, _ = nnls(rows, heavy)
    for _ in range(rounds):
        heavy = 1 / np.sqrt(np.maximum(np.abs(rows @ weights - 1), 1e-3))
        weights, _ = nnls(rows * heavy[:, None], heavy)
    return np.asarray(weights)
