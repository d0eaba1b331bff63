"""One network's latency table, filled and fitted: what a measured device knows of the network that it is prepared for."""

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.optimize import nnls

from tightrope.estimators.encode import Encoder
from tightrope.estimators.marked import Marked
from tightrope.estimators.measured import rapl
from tightrope.estimators.measured.apart import T
from tightrope.estimators.measured.clock import CHUNK, Float, Timed, low_quartile, noise_floor, time_rounds, uncollected
from tightrope.estimators.measured.grid import Design, Ints, design
from tightrope.estimators.measured.nodes import CONSTANT, MADE, Key, bytes_of
from tightrope.estimators.measured.patterns import Flat, Patterns, Told, learn
from tightrope.estimators.measured.sampling import mixed, probes, rounds_of
from tightrope.estimators.measured.table import Pass, Table, designs, typical
from tightrope.estimators.threads import one_blas_thread
from tightrope.spaces.batch import Batch
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Network
from tightrope.spaces.policy import Policy, unique
from tightrope.spaces.space import Space

MET, PLAIN, REACHED, ANCHORS = 1000, 500, 4000, 40
"""Policies that are lowered to find the nodes to time, others that show what is common, those that patterns tell the largest nodes
of, and nets that are built to fit the sum."""
PASSES, NODE_ROUNDS, NET_ROUNDS = 3, 9, 10  # passes over all that is timed, and rounds at a time
TURNS = 3  # times that nets are timed in a pass, spread over it: what slows the dense net for seconds is in the ratios of these
DENSE_TURNS = 3  # of the dense net in each round while a table is filled: its noise is in every ratio
REFERENCES = 8  # nets, the dense one among them, that tell the scale of nets that predictions are held against
CARE = 3  # times as many passes for nets that predictions are held against
CHUNK_NETS, CHUNK_BYTES = 8, 256 << 20
MOST_NOISE, TRIES = 0.10, 3  # of the reference before anything is timed, and how often it is looked at
SURE = 0.9  # of the interval
POWER_SECONDS = 1.0  # of CPU time in which power is measured
SPILL = 2 << 20  # bytes of tensors beyond which a node is out of a core's own caches, alone otherwise than in a net
MOVING = re.compile(
    r"(com\.microsoft\.nchwc:)?(Reorder(In|Out)put|Transpose|QuantizeLinear|DequantizeLinear)\{"
    r"|(quantize|dequantize|channels_last|contiguous)\{"
)
PRODUCT = re.compile(r"(com\.microsoft(\.nchwc)?:)?(Fused)?(Conv|Gemm|MatMul)\{|(Conv[123]d|Linear)\{")
INTEGER = re.compile(r"(com\.microsoft:)?(QLinear(Conv|MatMul)|QGemm|(MatMul|Conv)Integer)\{|Quant(Conv|Linear)")
KINDS = 6
MOVES, WIDE_FLOATS, FLOATS, WIDE, INTEGERS = range(1, KINDS)
MIXING, FETCHING, EACH = range(KINDS, KINDS + 3)
"""Columns behind those of kinds: what mixing costs, weights that are fetched anew, and what each node costs."""
CACHE, MIB = 1 << 20, 1 << 20  # bytes of a core's own caches that a net has for weights
ALIKE = 0.3  # weight of the wish that all kinds of nodes have one scale
LEAST_NETS = 8
REMEMBERED = 4096  # policies whose nodes are kept
FEW = 8  # policies that are costed one by one
TINY = 1e-12
PER_MS = 1e9  # times are added as whole picoseconds, so that a sum does not depend on its order
Progress = Callable[[int, int], None]
Run = Callable[[Callable[[], Any]], Any]
Beside = tuple[list[int], float, Float, float, float]
"""Indices of policies whose nets were timed, what the dense net takes beside them, and what `rounds_of` says of these rounds."""
Reference = tuple[Policy, float]
"""A policy and the ratio of its net's time to the dense one's, where that is known."""
log = logging.getLogger(__name__)


class Runtime(Protocol):
    """What runs a network's policies, whole and unit by unit."""

    block: int  # channels that its kernels work on at a time: units hang on which sizes fill such blocks

    def lowered(self, policy: Policy) -> list[tuple[Key, str]]:
        """The units of a policy, each with the layer or operator that it belongs to."""
        ...

    def told(self, policy: Policy) -> tuple[list[tuple[Key, str]], Told]:
        """The same, and the patterns that they follow."""
        ...

    def unit(self, key: Key) -> tuple[Timed, int]:
        """A unit alone, and the bytes that it takes."""
        ...

    def apart(self, work: Callable[[], T]) -> T:
        """Do work that builds and times units or nets: in a process of its own if what it leaves in memory slows what follows."""
        ...

    def net(self, policy: Policy) -> Timed:
        """A policy's whole net."""
        ...

    def keeping(self, policies: Collection[Policy]) -> AbstractContextManager[None]:
        """While this lasts, what is timed again, nets of these policies among it, is made once, as far as there is room."""
        ...

    def steady(self) -> Sequence[Timed]:
        """Calls that tell how fast the machine is while others are timed, the same for every table; the last does nothing."""
        ...


class Fitted:
    """Times of policies of one space in a runtime.

    Latency is the sum of the nodes' times, each kind of nodes (`traits`) with a scale of its own, plus what mixing costs and what
    weights cost that are fetched anew, plus the last weight per node. Alone, a small node that only moves values finds them in the
    nearest cache, where a net has left them further off; and a large one reads and writes what is out of all caches of the core,
    where in a net the node before has left part of it. Alone, a node has its weights in the cache, where a net has only those that
    its other tensors leave there: with `w` bytes of weights and `m` made, `w max(0, 1 - CACHE / (w + m))` are fetched anew. And a
    net that multiplies both integers and floating point takes longer than its parts, by up to a fifth where a matrix unit does the
    integers (seen with AMX; why is not known): with `i` and `f` milliseconds of each alone, the more is in proportion to
    `i f / (i + f)`.

    Attributes:
        errors: relative errors of the predicted latency of the nets that were built to fit it, each left out of its fit.
        learned: words on the kinds of nodes that are learned and not read from a grid, if any: how many, and their error.
        watts: what the processor takes while the dense net runs, idle power included; None where it has no counter to be read.
        spread: half of a 90 % interval, relative, of the latency of one more net, from the errors of the nets that were built.

    Raises:
        DeviceError: the runtime cannot run the network, or the table on disk is damaged or for something else.
    """

    def __init__(
        self, network: Network, encode: Encoder, space: Space, runtime: Callable[[], Runtime], path: Path | None,
        mark: Mapping[str, Any], progress: Progress | None, seed: int, *, here: bool = True,
    ) -> None:  # fmt: skip
        self.network, self.encode, self.space, self._make, self._here = network, encode, space, runtime, here
        self._known: dict[Policy, list[tuple[Key, str]]] = {}
        self._forget()
        self.table = Table(path, mark)
        fresh = not self.table.complete
        if fresh:
            self._fill(np.random.default_rng(seed), progress)
        with uncollected():
            noted = self.table.notes.get("patterns")
            self.patterns = None if noted is None else Patterns.from_json(network, noted)
            power = self.table.notes.get("power")
            self.watts = None if power is None else power.take("watts", float)
            self._fit()
        if fresh:
            self.table.note("fit", {"left_out": [*self.errors], "noise_floor": self._floor})

    @cached_property
    def runtime(self) -> Runtime:
        """What lowers, builds and runs policies; made when it is first needed."""
        return self._make()

    @one_blas_thread()
    def _fill(self, rng: np.random.Generator, progress: Progress | None) -> None:
        """Time the nodes of the space and the nets to fit, in passes over all of them, if the machine lets them be told apart."""
        self._floor = quiet(self.runtime.steady()[:-1], rng)
        wanted, patterns = survey(self.space, self.runtime, self.encode, rng)
        self.table.note("patterns", patterns.to_json())
        self.table.declare(wanted)
        anchors = {json.dumps(p.to_json(), sort_keys=True): p for p in unique(mixed(self.space, rng, 2 * ANCHORS))[:ANCHORS]}
        every = [self.table.missing(wanted, number + 1) for number in range(PASSES)]
        nodes = [keys[turn::TURNS] for keys in every for turn in range(TURNS)]
        nets = [[name for name in anchors if self.table.turns(name) <= number] for number in range(PASSES * TURNS)]
        done, total = 0, sum(len(part) for part in nodes) + sum(len(part) for part in nets)
        log.info("timing %d nodes of %d families %d times, and %d nets %d times",
                 len(every[-1]), len(wanted), PASSES, len(nets[-1]), PASSES * TURNS)  # fmt: skip
        with self.runtime.keeping([self.space.dense, *anchors.values()]):
            for keys, names in zip(nodes, nets, strict=True):
                whole = self._time_nets({name: anchors[name] for name in names}, rng)
                for chunk in chain(whole, self._time(keys, rng, self.runtime.apart)):
                    done += chunk
                    if progress is not None:
                        progress(done, total)
        watts = power_of(self.runtime.net(self.space.dense))
        if watts is not None:
            self.table.note("power", {"watts": watts})
        self.table.finish()

    def _time(self, keys: Sequence[Key], rng: np.random.Generator, run: Run) -> Iterator[int]:
        """Time nodes in a random order and add them to the table, in chunks that `run` does; gives the number of each."""
        left = [keys[i] for i in rng.permutation(len(keys)).tolist()]
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

    def _time_nets(self, policies: Mapping[str, Policy], rng: np.random.Generator) -> Iterator[int]:
        """The same for whole nets, by their policies' JSON, all of them apart."""
        dense = [(self.space.dense, 1.0)] * DENSE_TURNS
        for chosen, whole, samples, reference, empty in self._apart([*policies.values()], dense, rng):
            self.table.add_nets([[*policies][i] for i in chosen], samples, reference, empty, whole)
            yield len(chosen)

    def _apart(self, policies: Sequence[Policy], references: Sequence[Reference], rng: np.random.Generator) -> list[Beside]:
        """`_beside`, away from what this process has in memory."""
        own = rng.spawn(1)[0]
        return self.runtime.apart(lambda: [*self._beside(policies, references, own)])

    def _beside(
        self, policies: Sequence[Policy], references: Sequence[Reference], rng: np.random.Generator
    ) -> Iterator[Beside]:  # fmt: skip
        """Time nets in chunks of random order, each beside nets whose ratios to the dense one are known: they tell what that takes,
        by their geometric mean. One that is there several times counts as one."""
        order = rng.permutation(len(policies)).tolist()
        known, ratios = [p for p, _ in references], np.array([ratio for _, ratio in references])
        heavy = np.array([1 / known.count(p) for p in known])
        for start in range(0, len(order), CHUNK_NETS):
            chosen = order[start : start + CHUNK_NETS]
            nets = {p: self.runtime.net(p) for p in dict.fromkeys(known + [policies[i] for i in chosen])}
            runners = [nets[p] for p in known] + [nets[policies[i]] for i in chosen]
            samples, reference, empty = rounds_of(runners, NET_ROUNDS, rng, self.runtime.steady())
            alone = np.maximum(low_quartile(samples[:, : len(known)]) - empty, TINY)
            whole = empty + float(np.exp(np.average(np.log(alone / ratios), weights=heavy)))
            yield chosen, whole, samples[:, len(known) :], reference, empty

    def _references(self) -> list[Reference]:
        """The dense net and nets of the fit, evenly from the shortest to the longest; the dense one as often among those that are
        timed as in the fit, since nets that mix integers and floating point take longer the more often it runs in between."""
        nets = sorted(self.table.nets.items(), key=lambda net: net[1])
        spread = [nets[i] for i in np.linspace(0, len(nets) - 1, REFERENCES - 1).round().astype(int).tolist()]
        dense = round(DENSE_TURNS * (len(spread) + CHUNK_NETS) / CHUNK_NETS)
        return [(self.space.dense, 1.0)] * dense + [(Policy.from_json(json.loads(name)), ratio) for name, ratio in spread]

    @one_blas_thread()
    def timed(self, policies: Sequence[Policy], *, seed: int = 0) -> tuple[Float, float]:
        """Build the nets of policies and time them, in passes over all of them.

        They are timed beside the dense net and others that the fit is by, from the shortest to the longest: what the host's memory
        has done to the dense one alone since the table was made would be in each of them. Passes in which the machine was slower
        do not count, as in the table.

        Returns:
            Milliseconds on the table's scale, and the noise floor: how far the first and the last third of the passes are apart on
            average.
        """
        rng, ratios = np.random.default_rng(seed), [list[Pass]() for _ in policies]
        references = self._references()
        with self.runtime.keeping([*(policy for policy, _ in references), *policies]):
            for _ in range(CARE * PASSES * TURNS):
                for chosen, whole, samples, reference, empty in self._apart(policies, references, rng):
                    own = (samples - empty) / (whole - empty)
                    for index, column in zip(chosen, own.T.tolist(), strict=True):
                        ratios[index].append((reference, column))
        first, last, times = (
            np.array([typical(passes[part]) for passes in ratios])
            for part in (slice(CARE * TURNS), slice(-CARE * TURNS, None), slice(None))
        )  # fmt: skip
        return self.table.dense_ms * times, float(np.mean(np.abs(first / last - 1)))

    def _fit(self) -> None:
        """The weights of `columns` that bring sums nearest to the nets that were built, and the error when each is left out: as
        noted when the table was made, unless nets were lost or added since.

        The dense net counts as much as a quarter of the others, since budgets are ratios to it.
        """
        pairs = [(Policy.from_json(json.loads(name)), time) for name, time in self.table.nets.items()]
        if len(pairs) < LEAST_NETS:
            raise DeviceError(
                f"fitting needs at least {LEAST_NETS} timed nets, the table has {len(pairs)}; move it away to measure anew"
            )
        policies = [self.space.dense, *(p.normal(self.network) for p, _ in pairs)]
        features = columns(self.features(policies, self.encode(policies)))
        rows = features / np.array([1.0, *(ratio for _, ratio in pairs)])[:, None] / self.table.dense_ms
        dense, rows = np.repeat(rows[:1], len(pairs) // 4, axis=0), rows[1:]
        self.weights = nearest_sum(np.concatenate([rows, dense]))
        noted = self.table.notes.get("fit")
        errors = noted.take("left_out", list) if noted is not None else []
        if len(errors) != len(rows) or {*map(type, errors)} != {float}:
            others = ((rows[i], np.delete(rows, i, 0)) for i in range(len(rows)))
            errors = [float(row @ nearest_sum(np.concatenate([rest, dense]))) - 1 for row, rest in others]
        self.errors = tuple(errors)
        self.spread = surely(self.errors)
        learned = [*self.table.learned().values()]
        self.learned = f", {len(learned)} kinds of nodes learned to {100 * float(np.mean(learned)):.1f} %" if learned else ""
        log.info("latency of %d nets left out one by one is predicted to %.1f %%%s",
                 len(rows), 100 * np.mean(np.abs(self.errors)), self.learned)  # fmt: skip

    def held_errors(self) -> list[float]:
        """Relative errors of the predicted latency of nets that the fit never saw."""
        policies = [Policy.from_json(json.loads(name)).normal(self.network) for name in self.table.held]
        if not policies:
            return []
        found = self.latency(policies, self.encode(policies))
        return [float(ms / self.table.dense_ms / ratio - 1) for ms, ratio in zip(found, self.table.held.values(), strict=True)]

    def latency(self, policies: Sequence[Policy], batch: Batch) -> Float:
        """Milliseconds of policies, `b`-dim; `batch` has them as arrays."""
        found: Float = (columns(self.features(policies, batch)) * self.weights).sum(axis=1)
        return found

    def shares(self, policy: Policy) -> list[float]:
        """Milliseconds of each node of a policy as it is lowered, which add up to its latency."""
        times = np.array(self.times(policy))
        nodes = [traits(family, np.array([sizes], np.int64))[:, 0] for (family, sizes), _ in self.lowered(policy)]
        kind, weights, made = np.array(nodes).T
        floats, integers = np.isin(kind, (WIDE_FLOATS, FLOATS)), float(times[kind == INTEGERS].sum())
        mixing = self.weights[MIXING] * integers / max(integers + float(times[floats].sum()), TINY)
        fetching = self.weights[FETCHING] * max(0.0, 1 - CACHE / max(float((weights + made).sum()), TINY)) / MIB
        found: list[float] = (times * (self.weights[kind] + mixing * floats) + fetching * weights + self.weights[EACH]).tolist()
        return found

    def features(self, policies: Sequence[Policy], batch: Batch) -> Float:
        """The sum of times in milliseconds of each kind of nodes, bytes of all weights and of all that is made, and the number of
        nodes, `b x (KINDS + 3)`.

        Nodes of the space that the probes did not enclose are timed now.

        Raises:
            DeviceError: a node is outside of what was timed, and the policy outside of the space.
        """
        if self.patterns is None:
            found = np.full((len(batch), KINDS + 3), np.nan)
        else:
            found = self._few(self.patterns, batch) if len(batch) <= FEW else self._many(self.patterns, batch)
        unsure = np.flatnonzero(np.isnan(found).any(axis=1)).tolist()  # who show what no probe did, or have nodes not timed yet
        self._enclose([policies[i] for i in unsure])
        for i in unsure:
            found[i] = self._sum([key for key, _ in self.lowered(policies[i])])
        return found / [*[PER_MS] * KINDS, 1.0, 1.0, 1.0]

    def _many(self, patterns: Patterns, batch: Batch) -> Float:
        """Picoseconds, bytes and number of nodes, NaN where they cannot be told."""
        sights, sizes = patterns.sights(batch), patterns.columns(batch)
        ends = patterns.ends(sights)

        def sums(at: Ints) -> Float:
            return self._sums(patterns.flat(ends.ravel()[at][None], sizes[:, at % len(batch)]), len(at))

        found = np.zeros((len(batch), KINDS + 3))
        for of_owner in self._leaves.look(patterns.marks(ends, sizes), sums):
            found += self._leaves.rows.take(of_owner, axis=0)
        found[~patterns.tells(sights)] = np.nan
        return found

    def _sums(self, flat: Flat, count: int) -> Float:
        """Picoseconds, bytes and number of nodes of what has them, `count x (KINDS + 3)`; NaN where none enclose a node."""
        nodes = [(np.zeros(0, np.int64), np.zeros((3, 0), np.int64), np.zeros(0))]  # who has each, its traits, its time
        for family, who, sizes in flat.families():
            nodes.append((who, traits(family, sizes), np.rint(self.table.times(family, sizes) * PER_MS)))
        whose, (kind, *flows), times = (np.concatenate(parts, axis=-1) for parts in zip(*nodes, strict=True))
        found = np.empty((count, KINDS + 3))
        found[:, :KINDS] = np.bincount(whose * KINDS + kind, times, count * KINDS).reshape(count, KINDS)
        found[:, KINDS:-1] = np.stack([np.bincount(whose, flow, count) for flow in flows], axis=1)
        found[:, -1] = np.bincount(whose, minlength=count)
        return found

    def _forget(self) -> None:
        """Drop what was worked out from the table's times."""
        self._seen: dict[Key, tuple[int, int, int, float]] = {}
        self._leaves = Marked((KINDS + 3,))  # sums of patterns' leaves at sizes

    def _few(self, patterns: Patterns, batch: Batch) -> Float:
        """The same, quicker for single policies."""
        sights = patterns.sights(batch)
        told, sizes = patterns.tells(sights), patterns.columns(batch).T.tolist()
        found = np.full((len(batch), KINDS + 3), np.nan)
        for i in np.flatnonzero(told).tolist():
            row = sizes[i]
            found[i] = self._sum([(f, tuple([row[c] for c in columns])) for f, columns in patterns.of(sights[:, i].tolist())])
        return found

    def _sum(self, keys: Sequence[Key]) -> list[float]:
        """Picoseconds of each kind of nodes, bytes of weights and of what is made, and the number of nodes."""
        found = [0.0] * (KINDS + 2) + [float(len(keys))]
        for key in keys:
            if key not in self._seen:
                sizes = np.array([key[1]], np.int64)
                time = float(np.rint(self.table.times(key[0], sizes)[0] * PER_MS))
                self._seen[key] = *traits(key[0], sizes)[:, 0].tolist(), time
            kind, weights, made, time = self._seen[key]
            found[kind] += time
            found[KINDS] += weights
            found[KINDS + 1] += made
        return found

    def lowered(self, policy: Policy) -> list[tuple[Key, str]]:
        """The nodes of a policy, each with the layer or operator that it belongs to."""
        if policy not in self._known:
            if len(self._known) > REMEMBERED:
                self._known.clear()
            self._known[policy] = self.runtime.lowered(policy)
        return self._known[policy]

    def times(self, policy: Policy) -> list[float]:
        """Milliseconds of a policy's nodes as it is lowered, alone; nodes that the probes did not enclose are timed now."""
        self._enclose([policy])
        return [self.table.time(key) for key, _ in self.lowered(policy)]

    def _enclose(self, policies: Sequence[Policy]) -> None:
        """Time the nodes of policies that no timed ones enclose, if there are any."""
        keys = dict.fromkeys(key for policy in policies for key, _ in self.lowered(policy))
        missing = [key for key in keys if not self.table.knows(key)]
        if not missing:
            return
        if not self._here or not all(map(self.space.contains, policies)):
            raise DeviceError(
                f"the latency table must enclose every node of a policy, but {len(missing)} are outside of what was timed, "
                f"{missing[0][0]} at {list(missing[0][1])} among them; prepare the device with the space that the policy is from"
            )
        log.info("timing %d nodes that no probe enclosed, %s among them", len(missing), missing[0])
        self.table.declare({family: design(family, [sizes]) for family, sizes in missing})
        for _ in self._time(missing, np.random.default_rng(0), inline):
            pass
        self._forget()


def inline(work: Callable[[], T]) -> T:
    """Do work in this process."""
    return work()


def survey(
    space: Space, runtime: Runtime, encode: Encoder, rng: np.random.Generator
) -> tuple[dict[str, Design], Patterns]:  # fmt: skip
    """The nodes of a space to time, and the patterns that its policies come to.

    Few policies are lowered, since that takes a millisecond or more, and few show the largest and the smallest nodes of a family.
    So the patterns tell those of many more, and of these the ones with such nodes are lowered too.
    """
    policies = probes(space, rng, MET) + mixed(space, rng, PLAIN)
    met: dict[str, set[tuple[int, ...]]] = {}
    shown: list[Told] = []

    def meet(nodes: Sequence[tuple[Key, str]]) -> None:
        for (family, sizes), _ in nodes:
            met.setdefault(family, set()).add(sizes)

    for index, policy in enumerate(policies):
        nodes, told = runtime.told(policy)
        shown.append(told)
        if index < len(policies) - PLAIN:
            meet(nodes)
    patterns = learn(space.network, encode(policies), shown, runtime.block)
    drawn = [space.sample(rng) for _ in range(REACHED)]
    for i in beyond(patterns(encode(drawn)), met):
        meet(runtime.lowered(drawn[i]))
    return designs(met, runtime.block), patterns


def beyond(flat: Flat, met: Mapping[str, set[tuple[int, ...]]]) -> list[int]:
    """The policies that are told to have nodes larger or smaller than all that were met of their family: one for each end."""
    found: set[int] = set()
    for family, who, sizes in flat.families():
        if family not in met:
            found.add(int(who[0]))
        for sign in (-1, 1) if sizes.size else ():
            known = (sign * np.array([*met.get(family, sizes[:1].tolist())])).max(axis=0)
            ends = (sign * sizes).argmax(axis=0)
            found |= {*who[ends[(sign * sizes).max(axis=0) > known]].tolist()}
    return sorted(found)


def quiet(steady: Sequence[Timed], rng: np.random.Generator) -> float:
    """The noise floor of the machine, by calls that are always the same.

    Raises:
        DeviceError: it is too high each time that it is looked at.
    """
    floors = []
    for _ in range(TRIES):
        floors.append(noise_floor(time_rounds(steady, 40, rng)))
        if floors[-1] <= MOST_NOISE:
            return floors[-1]
    raise DeviceError(
        f"the noise floor must be at most {100 * MOST_NOISE:.0f} % for anything to be timed, but the same calls differed by "
        f"{', '.join(f'{100 * x:.0f}' for x in floors)} % between even and odd rounds; stop what else runs and start again"
    )


def power_of(net: Timed) -> float | None:
    """Watts of the processor for each second of CPU time of a net, while it runs alone; None where no counter tells."""
    spent = 0.0

    def run() -> None:
        nonlocal spent
        start = time.thread_time()
        while spent < POWER_SECONDS:
            net.visit()
            spent = time.thread_time() - start

    found = rapl.joules(run) if rapl.counters() else None
    return None if found is None else found / spent


def surely(errors: Sequence[float]) -> float:
    """What the size of one more error stays below in 90 % of cases, where it comes from where these did.

    Sizes are taken as exponential: one more over the mean of `n` then has the F-distribution of 2 and 2n degrees of freedom, whose
    quantile `q` is `n ((1 - q)^(-1/n) - 1)` (Lawless, Technometrics 13, 1971). The errors seen have lighter tails, which leaves
    room for what they share: a table is made at one time, and a net timed at another.
    """
    count = len(errors)
    return float(np.mean(np.abs(errors)) * count * ((1 - SURE) ** (-1 / count) - 1))


def traits(family: str, sizes: Ints) -> Ints:
    """The kind of each node of a family at `n x k` sizes, and bytes of its weights and of what it makes, `3 x n`.

    Kinds: nodes that multiply in floating point and those that do not are apart where their tensors take more bytes than a core's
    own caches; of others, those that multiply in floating point, that multiply integers, that only change layout or precision, and
    the rest (0). Of each kind a node alone takes another share of its time in a net.
    """
    floats = PRODUCT.match(family) is not None
    small = FLOATS if floats else MOVES if MOVING.match(family) else INTEGERS if INTEGER.match(family) else 0
    each = bytes_of(family, sizes)
    kind = np.where(each.sum(axis=0) > SPILL, WIDE_FLOATS if floats else WIDE, small)
    return np.stack([kind, each[CONSTANT], each[MADE]])


def columns(features: Float) -> Float:
    """What the fit's weights are of, `n x (KINDS + 3)`: milliseconds by kind, and then (`Fitted`) milliseconds of integers and
    floating point that are mixed, MiB of weights that are fetched anew, and the number of nodes."""
    integers, floats = features[:, INTEGERS], features[:, FLOATS] + features[:, WIDE_FLOATS]
    weights, made = features[:, KINDS:-1].T
    mixed = integers * floats / np.maximum(integers + floats, TINY)
    fetched = weights / MIB * np.maximum(0.0, 1 - CACHE / np.maximum(weights + made, TINY))
    return np.column_stack([features[:, :KINDS], mixed, fetched, features[:, -1]])


def nearest_sum(rows: np.ndarray, rounds: int = 30) -> np.ndarray:
    """Weights, none below zero, that bring `rows @ weights` nearest to one by the mean absolute error.

    Least squares, repeated with each row weighed by the inverse of its error, so that single nets do not pull the rest. The scales
    of kinds are drawn to the first, so that they are one where the nets do not tell them apart.
    """
    heavy, count = np.ones(len(rows)), rows.shape[1]
    alike = ALIKE * (np.eye(count)[1:KINDS] - np.eye(count)[0])
    for _ in range(rounds):
        weights, _ = nnls(np.concatenate([rows * heavy[:, None], alike]), np.append(heavy, np.zeros(len(alike))))
        heavy = 1 / np.sqrt(np.maximum(np.abs(rows @ weights - 1), 1e-3))
    return np.asarray(weights)
