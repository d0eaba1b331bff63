"""A cost by unit: a table and a bar picture."""

from typing import TYPE_CHECKING

from tightrope.search.report.front import amount
from tightrope.spaces.cost import METRICS, Cost, UnitCost
from tightrope.spaces.network import Network

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 30
PARTS = {"compute": "█", "memory": "▓", "stall": "▒", "overhead": "░"}
BETWEEN = "between the layers"


def breakdown(network: Network, cost: Cost, dense: Cost) -> "Table":
    """The latency of each layer and of all that stands between, what it is made of, and every cost of the whole below."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(cost.provenance), title_justify="left", show_footer=True)
    names = [layer.name for layer in network.layers]
    units: dict[str, list[UnitCost]] = {}
    for unit in cost.units:
        units.setdefault(unit.layer if unit.layer in names else BETWEEN, []).append(unit)
    times = {name: sum(u.latency_ms for u in found) for name, found in units.items()}
    energies = {name: [u.energy_mj for u in found] for name, found in units.items()}
    told = all(energy is not None for found in energies.values() for energy in found)
    scale = WIDTH / (max(times.values(), default=0.0) or 1.0)
    table.add_column("layer", footer="whole")
    table.add_column("units")
    table.add_column("ms", justify="right", footer=f"{cost.latency_ms:.4g}")
    if told:
        table.add_column("energy", justify="right", footer=amount("energy_mj", cost.energy_mj))
    table.add_column("", footer=f"{cost.latency_ms / dense.latency_ms:.3f}x of dense")
    for name in sorted(units, key=lambda n: names.index(n) if n in names else len(names)):
        kinds = dict.fromkeys(unit.kind.rpartition(":")[2] for unit in units[name])
        shown: list[Text | str] = [Text(", ".join([*kinds][:3]) + (", ..." if len(kinds) > 3 else "")), f"{times[name]:.4g}"]
        if told:
            shown.append(amount("energy_mj", sum(e or 0.0 for e in energies[name])))
        table.add_row(Text(name), *shown, bar(units[name], scale))
    parts = [f"{metric} {amount(metric, cost.metric(metric))}" for metric in METRICS if cost.metric(metric) is not None]
    if cost.interval_ms is not None and cost.interval_ms[0] < cost.interval_ms[1]:
        parts.insert(1, f"90 % interval {cost.interval_ms[0]:.4g}-{cost.interval_ms[1]:.4g} ms")
    flags = [word for word, on in (("simulated", cost.simulated), ("extrapolated", cost.extrapolated)) if on]
    legend = [f"{sign} {part}" for part, sign in PARTS.items()] if any(u.stall_ms is not None for u in cost.units) else []
    table.caption = Text("; ".join([*parts, *flags, *legend]))
    return table


def bar(units: list[UnitCost], scale: float) -> str:
    """A bar of `scale` signs a millisecond, a sign for each part; what is not told apart counts as compute."""
    lengths, drawn, total = "", 0, 0.0
    for part, sign in PARTS.items():
        for unit in units:
            value = getattr(unit, f"{part}_ms")
            if part == "compute" and value is None:
                value = unit.latency_ms - (unit.overhead_ms or 0.0)
            total += value or 0.0
        lengths += sign * (round(scale * total) - drawn)
        drawn = len(lengths)
    return lengths
