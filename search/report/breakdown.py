"""A cost by unit: a table and a bar picture."""

from typing import TYPE_CHECKING

from tightrope.search.report.front import amount
from tightrope.spaces.cost import METRICS, Cost
from tightrope.spaces.network import Network

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 30


def breakdown(network: Network, cost: Cost, dense: Cost) -> "Table":
    """The latency of each layer and of all that stands between, and every cost of the whole below."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(cost.provenance), title_justify="left", show_footer=True)
    shares: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for unit in cost.units:
        name = unit.layer or "between the layers"
        shares[name] = shares.get(name, 0.0) + unit.latency_ms
        kinds.setdefault(name, unit.kind if unit.layer else "")
    most = max(shares.values(), default=0.0) or 1.0
    table.add_column("layer", footer="whole")
    table.add_column("unit")
    table.add_column("ms", justify="right", footer=f"{cost.latency_ms:.4g}")
    table.add_column("", footer=f"{cost.latency_ms / dense.latency_ms:.3f}x of dense")
    order = [layer.name for layer in network.layers]
    for name in sorted(shares, key=lambda n: order.index(n) if n in order else len(order)):
        table.add_row(Text(name), Text(kinds[name]), f"{shares[name]:.4g}", "█" * round(WIDTH * shares[name] / most))
    parts = [f"{metric} {amount(metric, cost.metric(metric))}" for metric in METRICS if cost.metric(metric) is not None]
    if cost.interval_ms is not None and cost.interval_ms[0] < cost.interval_ms[1]:
        parts.insert(1, f"90 % interval {cost.interval_ms[0]:.4g}-{cost.interval_ms[1]:.4g} ms")
    flags = [word for word, on in (("simulated", cost.simulated), ("extrapolated", cost.extrapolated)) if on]
    table.caption = Text("; ".join([*parts, *flags]))
    return table
