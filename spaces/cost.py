"""What a policy costs on a device, with its spread and where the figures come from."""

from dataclasses import dataclass, field
from typing import Any

from tightrope.spaces.errors import FormatError
from tightrope.spaces.fields import Fields

METRICS = ("latency_ms", "energy_mj", "size_bytes", "peak_ram_bytes", "macs")


@dataclass(frozen=True, slots=True)
class UnitCost:
    """The share of one unit: a node of a runtime's graph or a layer of an accelerator; times in milliseconds.

    `latency_ms` is the sum of the four parts where a device tells them apart.
    """

    name: str
    layer: str
    kind: str
    latency_ms: float
    energy_mj: float | None = None
    compute_ms: float | None = None
    memory_ms: float | None = None
    stall_ms: float | None = None
    overhead_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """latency_ms, energy_mj, size_bytes, peak_ram_bytes and macs of a policy on a device, for one batch.

    A metric that the device cannot tell is None. `interval_ms` is a 90 % interval of the latency (equal ends for a
    deterministic model). `simulated` says that a model and no clock made the latency; `extrapolated` that a table was
    asked outside of what was measured. `provenance` names the device, its version and clock.
    """

    latency_ms: float
    size_bytes: int
    macs: int
    energy_mj: float | None = None
    peak_ram_bytes: int | None = None
    interval_ms: tuple[float, float] | None = None
    simulated: bool = False
    extrapolated: bool = False
    provenance: str = ""
    units: tuple[UnitCost, ...] = field(default=(), compare=False)

    def metric(self, name: str) -> float | None:
        """The value of one of `METRICS`."""
        value: float | None = getattr(self, name)
        return value

    def to_json(self) -> dict[str, Any]:
        """The cost without the breakdown by unit, which follows from the policy."""
        return {
            "latency_ms": self.latency_ms, "size_bytes": self.size_bytes, "macs": self.macs, "energy_mj": self.energy_mj,
            "peak_ram_bytes": self.peak_ram_bytes, "interval_ms": None if self.interval_ms is None else [*self.interval_ms],
            "simulated": self.simulated, "extrapolated": self.extrapolated, "provenance": self.provenance,
        }  # fmt: skip

    @staticmethod
    def from_json(value: object, where: str = "cost") -> "Cost":
        f = value if isinstance(value, Fields) else Fields(value, where)
        none = type(None)
        interval = f.take("interval_ms", (list, none), None)
        if interval is not None and (len(interval) != 2 or not all(isinstance(x, (int, float)) for x in interval)):
            raise FormatError(f"{f.where}.interval_ms must be two numbers, got {interval!r}")
        return Cost(
            f.take("latency_ms", float), f.take("size_bytes", int), f.take("macs", int), f.take("energy_mj", (float, none), None),
            f.take("peak_ram_bytes", (int, none), None), None if interval is None else (float(interval[0]), float(interval[1])),
            f.take("simulated", bool, False), f.take("extrapolated", bool, False), f.take("provenance", str, ""),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """Quality of a model on a split, higher is better; `stderr` is its standard error over `count` examples.

    For `top1` the value is in percent.
    """

    value: float
    stderr: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr, "count": self.count}

    @staticmethod
    def from_json(value: object, where: str = "score") -> "Score":
        f = value if isinstance(value, Fields) else Fields(value, where)
        return Score(f.take("value", float), f.take("stderr", float), f.take("count", int))
