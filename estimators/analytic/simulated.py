"""A device made of a model and its profile: it costs policies without a clock, and says so."""

from collections.abc import Iterator, Sequence

import numpy as np

from tightrope.estimators.analytic.block import FloatArray
from tightrope.estimators.analytic.model import Model
from tightrope.estimators.analytic.operators import uncosted
from tightrope.estimators.analytic.profile import VERSION, Profile
from tightrope.estimators.analytic.table import COLUMNS, Table
from tightrope.spaces.batch import FORMS, Batch, IntArray
from tightrope.spaces.cost import METRICS, Cost, UnitCost
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Layer, Network
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import PARTS

_CHUNK = 4096  # policies at once
_TABLES = 8  # networks remembered
_TIMES, _ENERGY, _SIZE, _MACS = slice(0, 4), 4, 5, 6


class Simulated:
    """A `Device` whose costs a model makes, deterministic, for one batch at a time.

    Attributes:
        limits: what a policy may cost at most to run on the device at all (flash and RAM of a microcontroller). A policy
            beyond them is costed all the same; `limits.met(cost)` and the provenance tell.
    """

    simulated = True
    metrics = frozenset(METRICS)

    def __init__(self, profile: Profile, model: Model, batch: int = 1) -> None:
        if batch < 1:
            raise DeviceError(f"the batch must be at least 1, got {batch}")
        self.name, self.batch, self.profile, self.model = profile.name, batch, profile, model
        self.limits = model.limits
        self.notes = ("costs are simulated: a model made them and no clock", *profile.notes)
        if not profile.calibrated:
            self.notes += ("uncalibrated: the profile is from datasheets and was compared with no device",)
        self._tables: dict[str, Table] = {}

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        """Pairs of weight and activation bits that it executes for a layer."""
        if layer.kind not in ("conv", "depthwise", "linear"):
            raise DeviceError(f"layer {layer.name!r} is of kind {layer.kind!r}, which device {self.name!r} does not know")
        return self.model.pairs(layer.kind)

    def estimate(self, network: Network, policy: Policy) -> Cost:
        """What a policy costs, by unit too.

        Raises:
            DeviceError: an operator that the model does not know, or bits that it does not execute.
            PolicyError: the policy is for another network.
        """
        policy.check(network)
        table = self._table(network)
        found = table.encode([policy])
        rows, between = table.rows(found), table.between_rows(found)
        cost = next(self._costs(table, found, rows, between))
        units = tuple(self._units(table, found, rows, between))
        return Cost(
            cost.latency_ms, cost.size_bytes, cost.macs, cost.energy_mj, cost.peak_ram_bytes, cost.interval_ms,
            cost.simulated, cost.extrapolated, cost.provenance, units,
        )  # fmt: skip

    def estimate_many(self, network: Network, policies: Sequence[Policy]) -> list[Cost]:
        """The same for many policies at once, without the breakdown by unit."""
        table = self._table(network)
        costs: list[Cost] = []
        for start in range(0, len(policies), _CHUNK):
            found = table.encode(policies[start : start + _CHUNK])
            costs.extend(self._costs(table, found, table.rows(found), table.between_rows(found)))
        return costs

    def _table(self, network: Network) -> Table:
        key = network.fingerprint
        if key not in self._tables:
            for layer in network.layers:
                self.pairs(layer)
            if len(self._tables) >= _TABLES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = Table(network, self.name, self.model, self.batch)
        return self._tables[key]

    def _costs(self, table: Table, found: Batch, rows: list[FloatArray], between: list[FloatArray]) -> Iterator[Cost]:
        total = np.zeros((len(found.widths), len(COLUMNS)))
        for row in rows:
            total += row[:, 0] + row[:, 1] + row[:, 2]
        for row in between:
            total += row
        sizes = total[:, _SIZE].astype(np.int64) + table.rest_bytes(found)
        ram = table.peak_ram_bytes(found)
        extra_ms, extra_mj = self.model.whole(sizes.astype(np.float64))
        times = total[:, _TIMES].sum(axis=1) + extra_ms
        energy = total[:, _ENERGY] + extra_mj
        provenance = self._provenance(table)
        for text, latency, size, macs, mj, peak in zip(
            self._fit(provenance, sizes, ram), times.tolist(), sizes.tolist(), total[:, _MACS].astype(np.int64).tolist(),
            energy.tolist(), ram.tolist(), strict=True,
        ):  # fmt: skip
            yield Cost(latency, size, macs, mj, peak, (latency, latency), True, False, text)

    def _fit(self, provenance: str, sizes: IntArray, ram: IntArray) -> list[str]:
        texts = [provenance] * len(sizes)
        for metric, most in self.limits.top:
            values = {"size_bytes": sizes, "peak_ram_bytes": ram}[metric]
            for i in np.flatnonzero(values > most).tolist():
                texts[i] += f"; does not fit: {metric} {values[i]} > {most:.0f}"
        return texts

    def _provenance(self, table: Table) -> str:
        trust = "" if self.profile.calibrated else ", uncalibrated"
        text = f"simulated: {self.profile.title} (profile {self.name} version {VERSION}, batch {self.batch}{trust})"
        left = "" if self.model.costs_operators else uncosted(table.network)
        return text + (f"; operators not costed: {left}" if left else "")

    def _units(self, table: Table, found: Batch, rows: list[FloatArray], between: list[FloatArray]) -> Iterator[UnitCost]:
        layers = table.network.layers
        for at, row in enumerate(rows):
            if at >= len(layers):
                yield _unit_cost(table.products[at - len(layers)].op, "", "matmul", row[0, 0])
                continue
            layer, parts = layers[at], PARTS[FORMS[int(found.forms[0, at])]]
            for part in range(parts):
                name = layer.name if parts == 1 else f"{layer.name}.{part}"
                yield _unit_cost(name, layer.name, layer.kind, row[0, part])
        for op, row in zip(table.between, between, strict=False):
            yield _unit_cost(op.name, "", op.kind, row[0])


def _unit_cost(name: str, layer: str, kind: str, row: FloatArray) -> UnitCost:
    compute, memory, stall, overhead, energy = row[:5].tolist()
    return UnitCost(name, layer, kind, compute + memory + stall + overhead, energy, compute, memory, stall, overhead)
