"""What measured devices share: a latency table for each network, filled at first use and kept under what it depends on."""

import fcntl
import hashlib
import json
import logging
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tightrope.estimators.cache import cache_folder
from tightrope.estimators.encode import Encoder
from tightrope.estimators.measured.clock import Float
from tightrope.estimators.measured.fitted import Fitted, Progress, Runtime
from tightrope.estimators.measured.weights import Weights
from tightrope.spaces.cost import Cost, UnitCost
from tightrope.spaces.errors import DeviceError, FormatError
from tightrope.spaces.fields import parse
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space

MOST = 4096  # policies at once
log = logging.getLogger(__name__)


class Measured:
    """A runtime on one thread of this machine, costed from a table of the units that it runs.

    `prepare` has to be called for a network before its policies can be costed. Latency is the CPU time of one thread, low
    quartile over rounds. Subclasses say which bits they execute (`pairs`), how they run (`runtime`) and of which version they are
    (`versions`).
    """

    name: str
    versions: ClassVar[Mapping[str, Any]]
    simulated = False
    metrics = frozenset({"latency_ms", "energy_mj", "size_bytes", "macs"})
    notes: tuple[str, ...] = ()

    def __init__(self, batch: int = 1) -> None:
        if batch < 1:
            raise DeviceError(f"the batch must be at least 1, got {batch}")
        self.batch = batch
        self._known: dict[str, Known] = {}
        self._budgeted: frozenset[str] = frozenset()

    def budgeted(self, metrics: Collection[str]) -> None:
        """Say what is budgeted, before the space is laid out and policies are costed."""
        self._budgeted = frozenset(metrics)

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        """Bits of weights and activations that a layer can have."""
        raise NotImplementedError

    def depends(self, source: Any) -> Mapping[str, Any]:
        """What a table depends on besides machine, batch, network and space."""
        return self.versions

    def runtime(self, network: Network, source: Any) -> Runtime:
        """What runs the network's policies, made of what only compressors can build."""
        raise NotImplementedError

    def prepare(
        self, network: Network, space: Space, source: Any, *, cache: Path | None = None, progress: Progress | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Time what policies of the space lower to, or read it from the cache, and fit the sum to whole nets.

        Args:
            cache: folder of the tables; `$TIGHTROPE_CACHE` or `~/.cache/tightrope` unless given.
            progress: called with the nodes and nets timed and those to time.

        Raises:
            DeviceError: the runtime cannot run the network, or the cached table is damaged.
        """
        mark = fingerprint(network, space, self.batch, self.depends(source))
        path = (cache if cache is not None else cache_folder()) / self.name / f"{digest(mark)}.jsonl"
        with alone(path):
            self.open(network, space, source, path, mark, progress, seed)

    def open(
        self, network: Network, space: Space, source: Any, path: Path, mark: Mapping[str, Any], progress: Progress | None = None,
        seed: int = 0, *, here: bool = True,
    ) -> Fitted:  # fmt: skip
        """Make the device ready with the table at `path`; `here` says that it is of this machine, which fills it where it must."""
        encode = self.encoder(network)
        fitted = Fitted(network, encode, space, lambda: self.runtime(network, source), path, mark, progress, seed, here=here)
        self._known[network.fingerprint] = Known(
            fitted, self.weigh(network), encode, f"one thread of {mark['processor']}, CPU time"
        )
        return fitted

    def encoder(self, network: Network) -> Encoder:
        """What turns policies of a network into arrays."""
        return Encoder(network, self.name, {layer.name: frozenset(self.pairs(layer)) for layer in network.layers})

    def weigh(self, network: Network) -> Weights:
        """What counts the bytes of what is exported."""
        return Weights(network, self.batch, onnx=False)

    def peak_ram_bytes(self, network: Network, policy: Policy) -> int | None:
        """The most memory that a call takes for activations and workspaces; None where the runtime's is not known."""
        return None

    def known(self, network: Network) -> "Known":
        """What is known of a network.

        Raises:
            DeviceError: a layer of it is unknown, or the device is not prepared for it.
        """
        found = self._known.get(network.fingerprint)
        if found is None:
            for layer in network.layers:
                self.pairs(layer)
            raise DeviceError(
                f"the device must be prepared for network {network.fingerprint} before it can cost its policies, and is prepared "
                f"for {len(self._known)} others; call prepare(network, space, source)"
            )
        return found

    def estimate(self, network: Network, policy: Policy) -> Cost:
        """What a policy costs, peak RAM too, with the share of each node."""
        policy.check(network)
        cost, fitted = self.estimate_many(network, [policy])[0], self.known(network).fitted
        units, each = [], float(fitted.weights[-1])
        for index, ((key, layer), time) in enumerate(zip(fitted.lowered(policy), fitted.shares(policy), strict=True)):
            kind = key[0].partition("{")[0]
            units.append(UnitCost(f"{kind}_{index}", layer, kind, time, overhead_ms=each))
        return replace(cost, units=tuple(units), peak_ram_bytes=self.peak_ram_bytes(network, policy))

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        """The same for many policies at once, without the breakdown by node.

        Peak RAM, which takes some milliseconds a policy, is told only where it is budgeted.

        Raises:
            PolicyError: a policy is for another network.
            DeviceError: the device is not prepared for the network or the policies' space, or does not execute a layer's bits.
        """
        known = self.known(network)
        costs: list[Cost] = []
        for start in range(0, len(policies), MOST):
            costs += self._costs(known, policies[start : start + MOST])
        if "peak_ram_bytes" in self._budgeted:
            return [replace(c, peak_ram_bytes=self.peak_ram_bytes(network, p)) for c, p in zip(costs, policies, strict=True)]
        return costs

    def _costs(self, known: "Known", policies: Sequence[Policy]) -> Iterator[Cost]:
        batch, fitted = known.encode(policies), known.fitted
        latency = fitted.latency(policies, batch)
        held = known.weights(batch)
        low, high = latency * (1 - min(fitted.spread, 0.9)), latency * (1 + fitted.spread)
        told = ", ".join(f"{name} {fitted.table.fingerprint.get(name)}" for name in self.versions)
        provenance = (
            f"{self.name}: {told}, {known.where}, batch {self.batch}, node table with {len(fitted.errors)} nets fitted to "
            f"{100 * float(np.mean(np.abs(fitted.errors))):.1f} %{fitted.learned}; "
        )
        energies = held.energy_pj * self.batch * 1e-9
        if fitted.watts is None:
            provenance += "energy modelled from multiply-accumulates and bytes"
        else:
            energies = fitted.watts * latency
            provenance += f"energy from RAPL: {fitted.watts:.1f} W of the processor while the dense net ran, times latency"
        rows = zip(
            latency.tolist(), held.size_bytes.tolist(), (held.macs * self.batch).tolist(),
            energies.tolist(), low.tolist(), high.tolist(), strict=True,
        )  # fmt: skip
        for ms, size, macs, energy, least, most in rows:
            yield Cost(ms, size, macs, energy, None, (least, most), False, False, provenance)

    def timed(self, network: Network, policies: Sequence[Policy]) -> tuple[Float, float]:
        """Build the graphs of policies and time them: milliseconds on the table's scale, and the noise floor of the run."""
        return self.known(network).fitted.timed(policies)


@dataclass(frozen=True, eq=False)
class Known:
    """What a device knows of a network that it is prepared for; `where` names the machine and the clock."""

    fitted: Fitted
    weights: Weights
    encode: Encoder
    where: str


def left_out(name: str) -> Iterator[tuple[str, list[float]]]:
    """What each table of a measured device is for, and its relative errors on the nets that it was fitted to, each left out."""
    for path in sorted((cache_folder() / name).glob("*.jsonl")):
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
        try:
            of = parse(lines[0] if lines else "", f"{path} line 1").take("fingerprint", dict)
            noted = [parse(line, str(path)) for line in lines if line.startswith('{"note":"fit"')]
            errors = [x for fields in noted for x in fields.take("value", dict).get("left_out", ())]
        except FormatError as error:
            log.warning("left out: %s", error)
            continue
        if errors:
            yield f"network {of.get('network')}, batch {of.get('batch')}", errors


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process fills the table at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mark_of(network: Network, space: Space, batch: int, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What a table depends on, but for the machine: runtime, threads, batch, network and space."""
    choices = [
        {g: [*w] for g, w in space.widths.items()}, {x: [*r] for x, r in space.ranks.items()}, dict(space.forms),
        {x: [[*p] for p in pairs] for x, pairs in space.pairs.items()},
    ]  # fmt: skip
    return {**versions, "threads": 1, "batch": batch, "network": network.fingerprint, "space": digest(choices)}


def fingerprint(network: Network, space: Space, batch: int, versions: Mapping[str, Any]) -> dict[str, Any]:
    """All that a table of this machine depends on."""
    return {"processor": processor()} | mark_of(network, space, batch, versions)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that tell a JSON value from any other."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def processor() -> str:
    """The model of this machine's CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    return " ".join(known.get(k, "") for k in ("model name", "cpu family", "model", "stepping")).strip() or platform.machine()
