"""Budgets as text: what a policy may cost, or an accuracy that it must keep."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tightrope.spaces.cost import Cost
from tightrope.spaces.errors import BudgetError
from tightrope.spaces.fields import nearest

NAMES = {"latency": "latency_ms", "energy": "energy_mj", "size": "size_bytes", "ram": "peak_ram_bytes", "macs": "macs"}
_UNITS: dict[str, dict[str, float]] = {
    "latency_ms": {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6},
    "energy_mj": {"j": 1e3, "mj": 1.0, "uj": 1e-3, "nj": 1e-6},
    "size_bytes": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "peak_ram_bytes": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
}
_TEXT = re.compile(r"\s*([a-z]+)\s*(<=|>=|<|>|=)\s*(-?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_HOW = "write it as latency<=0.25x, latency<=2ms, size<=100KB, energy<=1mJ, ram<=256KiB, macs<=0.5x or accuracy>=-1.0"


@dataclass(frozen=True, slots=True)
class Limit:
    """`metric` of a policy must not exceed `value`, which counts the dense model's where `relative`."""

    metric: str
    value: float
    relative: bool
    text: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that hold together; and `floor`, the points of accuracy (below dense: negative) that must be kept.

    With a floor, the aim is the least latency among the policies that keep it; without, the best score within the limits.
    """

    limits: tuple[Limit, ...] = ()
    floor: float | None = None

    @staticmethod
    def parse(text: str | Sequence[str]) -> "Budget":
        """Read a budget such as `latency<=0.25x`; several in a list or with commas between them."""
        parts = [p for t in ([text] if isinstance(text, str) else text) for p in str(t).split(",") if p.strip()]
        if not parts:
            raise BudgetError(f"a budget must say what a policy may cost, got {text!r}; {_HOW}")
        limits: dict[str, Limit] = {}
        floor: float | None = None
        for part in parts:
            match = _TEXT.fullmatch(part)
            if match is None:
                raise BudgetError(f"cannot read the budget {part.strip()!r}; {_HOW}")
            name, sign, number, unit = match[1], match[2], float(match[3]), match[4].lower()
            if name == "accuracy":
                if sign != ">=" or unit or number > 0 or floor is not None:
                    raise BudgetError(f"accuracy must be given once, as points below dense (accuracy>=-1.0), got {part.strip()!r}")
                floor = number
                continue
            if name not in NAMES:
                raise BudgetError(f"{name!r} is no cost{nearest(name, [*NAMES, 'accuracy'])}; {_HOW}")
            metric = NAMES[name]
            if sign != "<=":
                raise BudgetError(f"{name} is bounded from above, so `<=` must stand in {part.strip()!r}")
            if unit != "x" and unit not in _UNITS[metric]:
                raise BudgetError(f"unit of {part.strip()!r} must be x or one of {[*_UNITS[metric]]}, got {unit!r}")
            if number <= 0:
                raise BudgetError(f"a limit must be greater than 0, got {part.strip()!r}")
            if metric in limits:
                raise BudgetError(f"{name} must be bounded once, got {limits[metric].text!r} and {part.strip()!r}")
            limits[metric] = Limit(metric, number * (1 if unit == "x" else _UNITS[metric][unit]), unit == "x", part.strip())
        return Budget(tuple(limits.values()), floor)

    @property
    def text(self) -> tuple[str, ...]:
        """The budget as `parse` reads it."""
        floor = () if self.floor is None else (f"accuracy>={self.floor:g}",)
        return tuple(limit.text for limit in self.limits) + floor

    def resolve(self, dense: Cost, metrics: Iterable[str], device: str) -> "Limits":
        """Turn ratios into absolute numbers, against the dense model's cost under the same estimator."""
        known = set(metrics)
        top: dict[str, float] = {}
        for limit in self.limits:
            reference = dense.metric(limit.metric)
            if limit.metric not in known or reference is None:
                names = sorted(name for name, metric in NAMES.items() if metric in known)
                raise BudgetError(f"device {device!r} cannot tell the cost in {limit.text!r}; it tells {', '.join(names)}")
            top[limit.metric] = limit.value * reference if limit.relative else limit.value
        return Limits(tuple(top.items()))


@dataclass(frozen=True, slots=True)
class Limits:
    """A budget in absolute numbers: pairs of a metric and the most that it may be."""

    top: tuple[tuple[str, float], ...] = ()

    def within(self, other: "Limits") -> "Limits":
        """Both limits at once: the lower one of each metric."""
        top = dict(self.top)
        for metric, most in other.top:
            top[metric] = min(most, top.get(metric, most))
        return Limits(tuple(top.items()))

    def use(self, cost: Cost) -> float:
        """Cost over budget, the largest over all limits; 1 is just within, 0 where there is no limit."""
        shares = []
        for metric, most in self.top:
            value = cost.metric(metric)
            if value is None:
                raise BudgetError(f"the cost has no {metric}, which the budget bounds")
            shares.append(value / most)
        return max(shares, default=0.0)

    def met(self, cost: Cost) -> bool:
        """Whether the cost lies within every limit."""
        return self.use(cost) <= 1.0
