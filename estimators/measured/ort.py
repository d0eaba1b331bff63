"""The device `ort-cpu`: ONNX Runtime on one thread of this machine, costed from a table of the nodes that it runs."""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
from scipy.optimize import nnls

from tightrope.estimators.measured import nodes as one_node
from tightrope.estimators.measured.clock import CHUNK, Float, Runner, low_quartile, noise_floor, time_rounds
from tightrope.estimators.measured.grid import Untimed, design
from tightrope.estimators.measured.lowering import Lowering
from tightrope.estimators.measured.nodes import Key, Node, key
from tightrope.estimators.measured.plan import make
from tightrope.estimators.measured.table import Table, designs
from tightrope.spaces.cost import Cost, UnitCost
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space
from tightrope.spaces.unit import macs, size_bytes

MET, ANCHORS = 1000, 32  # policies that are lowered to find the nodes to time, and nets that are built to fit the sum
NODE_ROUNDS, NET_ROUNDS, LEAST_ROUNDS = 20, 40, 6
CHUNK_SECONDS = 4.0  # about what a chunk may take; longer nodes are timed in fewer rounds
CHUNK_NETS, CHUNK_BYTES = 8, 64 << 20
REFERENCE = (
    ("com.microsoft.nchwc:Conv{kernel_shape=[3,3];pads=[1,1,1,1]}(f:1,32,28,28;=f:32,32,3,3;=f:32)->f:1,32,28,28", ()),
    ("com.microsoft:QLinearConv{channels_last=1;kernel_shape=[3,3];pads=[1,1,1,1]}"
     "(u:1,14,14,64;=f:;=u:;=s:64,64,3,3;=f:64;=s:64;=f:;=u:;=i:64)->u:1,14,14,64", ()),
    ("Gemm{transB=1}(f:64,256;=f:256,256;=f:256)->f:64,256", ()),
    ("QuantizeLinear{}(f:1,32,28,28;=f:;=u:)->u:1,32,28,28", ()),
    ("Transpose{perm=[0,2,3,1]}(u:1,64,28,28)->u:1,28,28,64", ()),
)  # fmt: skip
"""Nodes whose times tell how fast the machine is while others are timed; the same for every table."""
EMPTY = ("Identity{}(f:1)->f:1", ())
Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)


class Source(Protocol):
    """What only an exporter can build, handed over by whoever has one."""

    def skeleton(self, widths: Mapping[str, int], batch: int) -> onnx.ModelProto:
        """The graph without layer weights (`compressors/export/skeleton.py`) at the widths of all groups."""
        ...

    def model(self, policy: Policy, batch: int) -> onnx.ModelProto | bytes:
        """The file that would be exported for a policy; its weights do not matter."""
        ...


class OrtCpu:
    """ONNX Runtime's CPU provider, one thread, measured.

    `prepare` has to be called once before costs can be asked. Latency is the CPU time of one thread for the second
    of two calls back to back, low quartile over rounds.

    Attributes:
        errors: relative errors of the predicted latency of the nets that were built to fit it, each left out of its fit.
        spread: what 90 % of them stay below.
    """

    name = "ort-cpu"
    simulated = False
    metrics = frozenset({"latency_ms", "size_bytes", "macs"})
    notes = (
        "2-, 3-, 5-, 6- and 7-bit weights are dropped: ONNX Runtime runs 8-bit integers, or 4-bit weights of linear layers",
        "activations below 8 bits are dropped: they run as 8-bit integers and save nothing",
        "4-bit weights of convolutions are dropped: there is no operator for them",
    )

    def __init__(self, batch: int = 1) -> None:
        if batch < 1:
            raise DeviceError(f"the batch must be at least 1, got {batch}")
        self.batch = batch
        self.errors: tuple[float, ...] = ()
        self.spread = float("nan")
        self._network: Network | None = None
        self._known: dict[Policy, list[tuple[Key, str]]] = {}

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        """Floating point, 8-bit integers, and for linear layers 4-bit weights with floating-point activations."""
        return ((32, 32), (8, 8), (4, 32)) if layer.kind == "linear" else ((32, 32), (8, 8))

    # --- preparing ------------------------------------------------------------------------------------------------

    def prepare(
        self, network: Network, space: Space, source: Source, *, cache: Path | None = None, progress: Progress | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Time what policies of the space lower to, or read it from the cache, and fit the sum to whole nets.

        Args:
            cache: folder of the tables; `$TIGHTROPE_CACHE` or `~/.cache/tightrope` unless given.
            progress: called with the nodes and nets timed and those to time.

        Raises:
            DeviceError: ONNX Runtime cannot run the network, or the cached table is damaged.
        """
        mark = fingerprint(network, space, self.batch)
        digest = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache if cache is not None else cache_folder()
        self._network, self._space, self._source = network, space, source
        self._lowering = Lowering(network, make(network, source.skeleton, self.batch))
        self._known.clear()
        self.table = Table(folder / "ort-cpu" / f"{digest}.jsonl", mark)
        if not self.table.complete:
            self._fill(np.random.default_rng(seed), progress)
        self._fit()

    def _fill(self, rng: np.random.Generator, progress: Progress | None) -> None:
        """Time the nodes of the space and the nets to fit."""
        met: dict[str, set[tuple[int, ...]]] = {}
        for policy in probes(self._space, rng, MET):
            for (family, sizes), _ in self._lower(policy):
                met.setdefault(family, set()).add(sizes)
        self._known.clear()
        wanted = designs(met)
        self.table.declare(wanted)
        missing = self.table.missing(wanted)
        anchors = mixed(self._space, rng, ANCHORS)
        total = len(missing) + len(anchors)
        log.info("timing %d nodes of %d families, and %d nets", len(missing), len(wanted), len(anchors))
        done = 0
        for chunk in self._time(missing, rng):
            done += chunk
            if progress is not None:
                progress(done, total)
        names = [json.dumps(p.to_json(), sort_keys=True) for p in anchors]
        fresh = [i for i, name in enumerate(names) if name not in self.table.nets]
        for start in range(0, len(fresh), CHUNK_NETS):
            chosen = fresh[start : start + CHUNK_NETS]
            runners = [Runner(self._source.model(anchors[i], self.batch), optimise=True) for i in chosen]
            self.table.add_nets([names[i] for i in chosen], *rounds_of(runners, NET_ROUNDS, rng))
            if progress is not None:
                progress(done + start + len(chosen), total)
        self.table.finish()

    def _time(self, keys: Sequence[Key], rng: np.random.Generator) -> Iterator[int]:
        """Time nodes and add them to the table, in chunks; gives the number of each."""
        waiting, size = list(reversed(keys)), 0
        while waiting:
            chosen: list[Key] = []
            runners: list[Runner] = []
            while waiting and len(chosen) < CHUNK and (size < CHUNK_BYTES or not chosen):
                chosen.append(waiting.pop())
                data = one_node.model(*chosen[-1]).SerializeToString()
                size += len(data)
                runners.append(Runner(data, optimise=False))
            self.table.add(chosen, *rounds_of(runners, NODE_ROUNDS, rng))
            size = 0
            yield len(chosen)

    def timed(self, policies: Sequence[Policy], *, rounds: int = NET_ROUNDS, seed: int = 0) -> tuple[Float, float]:
        """Build the graphs of policies and time them: milliseconds on the table's scale, and the noise floor of the run."""
        rng, times, floors = np.random.default_rng(seed), [], []
        for start in range(0, len(policies), CHUNK_NETS):
            models = [self._source.model(p, self.batch) for p in policies[start : start + CHUNK_NETS]]
            samples, reference, empty = rounds_of([Runner(m, optimise=True) for m in models], rounds, rng)
            times.append((low_quartile(samples) - empty) * self.table.base / reference)
            floors.append(noise_floor(samples))
        return np.concatenate(times), float(np.mean(floors))

    def _fit(self) -> None:
        """One scale and one cost per node, nearest to the nets that were built, and the error when each is left out."""
        pairs = [(Policy.from_json(json.loads(name)), time) for name, time in self.table.nets.items()]
        if len(pairs) < 8:
            raise DeviceError(f"fitting needs at least 8 timed nets, the table has {len(pairs)}; move it away to measure anew")
        features = np.array([self._features(p.normal(self._network)) for p, _ in pairs])  # type: ignore[arg-type]
        times = np.array([time for _, time in pairs])
        rows = features / times[:, None]
        self._weights = nearest_sum(rows)
        self.errors = tuple(float(rows[i] @ nearest_sum(np.delete(rows, i, 0)) - 1) for i in range(len(rows)))
        self.spread = float(np.quantile(np.abs(self.errors), 0.9))
        log.info("latency of %d nets left out one by one is predicted to %.1f %%", len(rows), 100 * np.mean(np.abs(self.errors)))

    def _features(self, policy: Policy) -> list[float]:
        times = self._times(policy)
        return [sum(times), float(len(times))]

    # --- asking ---------------------------------------------------------------------------------------------------

    def nodes(self, policy: Policy) -> list[Node]:
        """The nodes that ONNX Runtime is predicted to run for a policy."""
        self._prepared(policy)
        return self._lowering.nodes(policy)

    def estimate(self, network: Network, policy: Policy) -> Cost:
        """What a policy costs, with the share of each node."""
        self._prepared(policy)
        units = self._units(policy)
        return self._cost(network, policy, sum(u.latency_ms for u in units), tuple(units))

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        """The same for many policies at once, without the breakdown by node."""
        costs = []
        for policy in policies:
            self._prepared(policy)
            costs.append(self._cost(network, policy, float(np.dot(self._weights, self._features(policy))), ()))
        return costs

    def _cost(self, network: Network, policy: Policy, latency: float, units: tuple[UnitCost, ...]) -> Cost:
        spread, error = min(self.spread, 0.9), float(np.mean(np.abs(self.errors)))
        return Cost(
            latency, size_bytes(network, policy), macs(network, policy) * self.batch, units=units,
            interval_ms=(latency * (1 - spread), latency * (1 + spread)),
            provenance=f"{self.name}: onnxruntime {onnxruntime.__version__}, {processor()}, one thread, batch {self.batch}, "
            f"CPU time, node table with {len(self.errors)} nets fitted to {100 * error:.1f} %",
        )  # fmt: skip

    def _units(self, policy: Policy) -> list[UnitCost]:
        scale, each = self._weights.tolist()
        pairs = zip(self._lower(policy), self._times(policy), strict=True)
        return [
            UnitCost(f"{family.partition('{')[0]}_{i}", layer, family.partition("{")[0], scale * time + each, overhead_ms=each)
            for i, (((family, _), layer), time) in enumerate(pairs)
        ]

    def _prepared(self, policy: Policy) -> None:
        if self._network is None:
            raise DeviceError(
                "the device must be prepared for a network and a space before it can cost policies: call prepare first"
            )
        if policy.network != self._network.fingerprint:
            raise DeviceError(
                f"the device is prepared for network {self._network.fingerprint}, but the policy is for {policy.network}; "
                "prepare it for that one"
            )

    def _lower(self, policy: Policy) -> list[tuple[Key, str]]:
        if policy not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[policy] = [(key(node), node.layer) for node in self._lowering.nodes(policy)]
        return self._known[policy]

    def _times(self, policy: Policy) -> list[float]:
        """Milliseconds of a policy's nodes, alone; nodes of the space that the probes did not enclose are timed now."""
        keys = [k for k, _ in self._lower(policy)]
        try:
            return [self.table.time(k) for k in keys]
        except Untimed:
            missing = [k for k in dict.fromkeys(keys) if not self.table.knows(k)]
        if not self._space.contains(policy):
            raise DeviceError(
                f"the latency table must enclose every node of a policy, but {len(missing)} are outside of what was timed, "
                f"{missing[0][0]} at {list(missing[0][1])} among them; prepare the device with the space that the policy is from"
            )
        log.info("timing %d nodes that no probe enclosed, %s among them", len(missing), missing[0])
        self.table.declare({family: design(family, [sizes]) for family, sizes in missing})
        for _ in self._time(missing, np.random.default_rng(0)):
            pass
        return [self.table.time(k) for k in keys]


def probes(space: Space, rng: np.random.Generator, count: int) -> list[Policy]:
    """Policies that show what nodes a space comes to: its corners, random ones, and random ones of extreme widths and ranks."""
    variables, found = space.variables, []
    wide = np.array([v.kind in ("channels", "rank") for v in variables])
    for width in (0.0, 1.0):
        for rank in (0.0, 0.999 - 1 / 5, 1.0):
            for bits in (0.0, 0.5, 1.0):
                kinds = {"channels": width, "rank": rank}
                found.append(space.decode([kinds.get(v.kind, bits) for v in variables]))
    for index in range(count):
        point = rng.random(len(variables))
        if index % 4:
            point[wide] = np.where(rng.random(int(wide.sum())) < 0.5, 0.0, 1.0)
        found.append(space.decode(point))
    return found


def rounds_of(runners: Sequence[Runner], rounds: int, rng: np.random.Generator) -> tuple[Float, float, float]:
    """Samples, `rounds x runners`, and the times of the reference nodes and of an empty call in the same rounds.

    There are fewer rounds where one of them takes long, and at least six.
    """
    steady = [Runner(one_node.model(*k), optimise=False) for k in (*REFERENCE, EMPTY)]
    first = time_rounds([*runners, *steady], 1, rng)
    rounds = max(LEAST_ROUNDS, min(rounds, int(CHUNK_SECONDS * 1e3 / (2 * first.sum()))))
    samples = time_rounds([*runners, *steady], rounds, rng)
    *reference, empty = low_quartile(samples[:, len(runners) :]).tolist()
    return samples[:, : len(runners)], sum(reference) - len(reference) * empty, empty


def mixed(space: Space, rng: np.random.Generator, count: int) -> list[Policy]:
    """Random policies, of which every other one leaves three in four layers whole."""
    found = []
    for index in range(count):
        point = rng.random(space.dimension)
        whole = np.array([v.kind == "rank" for v in space.variables]) & (rng.random(len(point)) < 0.75 * (index % 2))
        found.append(space.decode(np.where(whole, 1.0, point)))
    return found


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


def fingerprint(network: Network, space: Space, batch: int) -> dict[str, Any]:
    """All that a table depends on: machine, runtime, threads, batch, network and space."""
    choices = [
        {g: [*w] for g, w in space.widths.items()}, {x: [*r] for x, r in space.ranks.items()}, dict(space.forms),
        {x: [[*p] for p in pairs] for x, pairs in space.pairs.items()},
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "processor": processor(), "onnxruntime": onnxruntime.__version__, "threads": 1, "batch": batch,
        "network": network.fingerprint, "space": digest,
    }  # fmt: skip


def processor() -> str:
    """The model of this machine's CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    return " ".join(known.get(k, "") for k in ("model name", "cpu family", "model", "stepping")).strip() or platform.machine()


def cache_folder() -> Path:
    """Where tables are kept: `$TIGHTROPE_CACHE`, or `~/.cache/tightrope`."""
    return Path(os.environ.get("TIGHTROPE_CACHE") or Path.home() / ".cache" / "tightrope")
