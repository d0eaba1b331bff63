"""What measured devices share: a latency table for each network, filled at first use and kept under what it depends on."""

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tightrope.estimators.measured.clock import Float
from tightrope.estimators.measured.fitted import Fitted, Progress, Runtime
from tightrope.spaces.cost import Cost, UnitCost
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.space import Space
from tightrope.spaces.unit import macs, size_bytes


class Measured:
    """A runtime on one thread of this machine, costed from a table of the units that it runs.

    `prepare` has to be called for a network before its policies can be costed. Latency is the CPU time of one thread, low
    quartile over rounds. Subclasses say which bits they execute (`pairs`), how they run (`runtime`) and of which version they are
    (`versions`).
    """

    name: ClassVar[str]
    versions: ClassVar[Mapping[str, Any]]
    simulated = False
    metrics = frozenset({"latency_ms", "size_bytes", "macs"})
    notes: tuple[str, ...] = ()

    def __init__(self, batch: int = 1) -> None:
        if batch < 1:
            raise DeviceError(f"the batch must be at least 1, got {batch}")
        self.batch = batch
        self._fitted: dict[str, Fitted] = {}

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
        digest = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:16]
        path = (cache if cache is not None else cache_folder()) / self.name / f"{digest}.jsonl"
        with alone(path):
            self._fitted[network.fingerprint] = Fitted(network, space, self.runtime(network, source), path, mark, progress, seed)

    def fitted(self, network: Network, policies: Sequence[Policy]) -> Fitted:
        """The table of a network, for policies that are checked to be of it and of bits that are executed.

        Raises:
            PolicyError: a policy is for another network.
            DeviceError: the device is not prepared for the network, or does not execute a layer's bits.
        """
        pairs = {layer.name: frozenset(self.pairs(layer)) for layer in network.layers}
        found = self._fitted.get(network.fingerprint)
        if found is None:
            raise DeviceError(
                f"the device must be prepared for network {network.fingerprint} before it can cost its policies, and is prepared "
                f"for {len(self._fitted)} others; call prepare(network, space, source)"
            )
        for policy in policies:
            policy.check(network)
            for name, choice in policy.choices:
                if (choice.weight_bits, choice.act_bits) not in pairs[name]:
                    raise DeviceError(
                        f"device {self.name!r} executes {sorted(pairs[name])} bits of weights and activations for layer {name!r}, "
                        f"got {(choice.weight_bits, choice.act_bits)}"
                    )
        return found

    def estimate(self, network: Network, policy: Policy) -> Cost:
        """What a policy costs, with the share of each node."""
        fitted = self.fitted(network, [policy])
        scale, each = fitted.weights.tolist()
        units = []
        for index, ((key, layer), time) in enumerate(zip(fitted.lowered(policy), fitted.times(policy), strict=True)):
            kind = key[0].partition("{")[0]
            units.append(UnitCost(f"{kind}_{index}", layer, kind, scale * time + each, overhead_ms=each))
        return self._cost(fitted, policy, tuple(units))

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        """The same for many policies at once, without the breakdown by node."""
        fitted = self.fitted(network, policies)
        return [self._cost(fitted, policy, ()) for policy in policies]

    def _cost(self, fitted: Fitted, policy: Policy, units: tuple[UnitCost, ...]) -> Cost:
        latency = float(np.dot(fitted.weights, fitted.features(policy)))
        told = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        spread, error = min(fitted.spread, 0.9), float(np.mean(np.abs(fitted.errors)))
        return Cost(
            latency, size_bytes(fitted.network, policy), macs(fitted.network, policy) * self.batch, units=units,
            interval_ms=(latency * (1 - spread), latency * (1 + spread)),
            provenance=f"{self.name}: {told}, {processor()}, one thread, batch {self.batch}, "
            f"CPU time, node table with {len(fitted.errors)} nets fitted to {100 * error:.1f} %",
        )  # fmt: skip

    def timed(self, network: Network, policies: Sequence[Policy]) -> tuple[Float, float]:
        """Build the graphs of policies and time them: milliseconds on the table's scale, and the noise floor of the run."""
        return self.fitted(network, policies).timed(policies)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process fills the table at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(network: Network, space: Space, batch: int, versions: Mapping[str, Any]) -> dict[str, Any]:
    """All that a table depends on: machine, runtime, threads, batch, network and space."""
    choices = [
        {g: [*w] for g, w in space.widths.items()}, {x: [*r] for x, r in space.ranks.items()}, dict(space.forms),
        {x: [[*p] for p in pairs] for x, pairs in space.pairs.items()},
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "processor": processor(), **versions, "threads": 1, "batch": batch, "network": network.fingerprint, "space": digest,
    }  # fmt: skip


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


def cache_folder() -> Path:
    """Where tables are kept: `$TIGHTROPE_CACHE`, or `~/.cache/tightrope`."""
    return Path(os.environ.get("TIGHTROPE_CACHE") or Path.home() / ".cache" / "tightrope")
