"""The front in the terminal: a table and a plot."""

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tightrope.search.report.axis import Axis
from tightrope.search.report.front import WORDS, Front, amount
from tightrope.search.report.runs import export_format
from tightrope.spaces.cost import METRICS, Cost, Score

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


_ROOMY = 96  # characters in which all costs have a place


def front_table(run: Path, *, width: int = _ROOMY) -> "Table":
    """The front from cheapest to best, and the controls below it. In little room, no costs but the traded one, latency and size."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    front = Front.load(run)
    header = front.record.header
    wanted = METRICS if width >= _ROOMY else (front.metric, "latency_ms", "size_bytes")
    told = [name for name in METRICS if name in wanted and header.dense_cost.metric(name) is not None]
    simulated = ", simulated" if header.simulated else ""
    title = f"{header.name}: front of {len(front.trials)} among {len(front.record.trials)} trials on {header.device}{simulated}"
    table = Table(
        title=Text(title), title_justify="left", caption_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0
    )
    parts = len(front.record.trials) - len(front.complete)
    part = f"; {parts} trials were given up early and stand on no front" if parts else ""
    words = f"● best, + beyond the budget; dense: points to it; ×: {WORDS[front.metric]} as a share of it{part}"
    tuned = "; fine-tuned score and measured share" if front.finals else ""
    table.caption = Text(f"budget {', '.join(header.budget) or 'none'}; {words}{tuned}")
    table.add_column("trial", justify="right")
    table.add_column("top-1 %" if header.metric == "top1" else header.metric, justify="right")
    table.add_column("dense", justify="right")
    for name in told:
        table.add_column(WORDS[name], justify="right")
    table.add_column("×", justify="right")
    if front.finals:
        table.add_column("tuned", justify="right")
        table.add_column("meas.", justify="right")
    for trial in front.trials:
        assert trial.score is not None
        cells = [*_cells(front, trial.score, trial.cost, told), *_final(front, trial.number)]
        mark = "● " if trial == front.best else "" if trial.feasible else "+ "
        style = "bold green" if trial == front.best else "" if trial.feasible else "dim"
        table.add_row(f"{mark}{trial.number}", *cells, style=style)
    table.add_section()
    for control in front.controls:
        cells = _cells(front, control.score, control.cost, told) + ["", ""] * bool(front.finals)
        table.add_row(Text(control.name), *cells, style="cyan")
    return table


def _cells(front: Front, score: Score, cost: Cost, told: list[str]) -> list[str]:
    difference = score.value - front.record.header.dense_score.value
    price = front.price(cost)
    return [
        f"{score.value:.2f}±{score.stderr:.2f}", f"{difference:+.2f}", *(amount(name, cost.metric(name)) for name in told),
        f"{price:.3f}" if math.isfinite(price) else "–",
    ]  # fmt: skip


def _final(front: Front, number: int) -> list[str]:
    if not front.finals:
        return []
    final = front.finals.get(number)
    if final is None:
        return ["", ""]
    measured = "" if final.measured is None else f"{final.measured[0]:.3f}"
    return [f"{final.score.value:.2f}±{final.score.stderr:.2f}", measured]


def front_plot(run: Path, *, width: int = 76, height: int = 18) -> "Text":
    """All trials, the front, the budget and the controls as characters."""
    from rich.text import Text

    front = Front.load(run)
    scored = [(t, front.price(t.cost), t.score.value) for t in front.record.trials if t.score is not None]
    scored = [row for row in scored if math.isfinite(row[1])]
    controls = [(c.name, front.price(c.cost), c.score.value) for c in front.controls if math.isfinite(front.price(c.cost))]
    prices = [p for _, p, _ in scored] + [p for _, p, _ in controls]
    values = sorted(v for _, _, v in scored)
    # The lowest tenth of the trials may lie below the plot.
    shown = values[len(values) // 10 :] + [v for _, _, v in controls] + [t.score.value for t in front.trials if t.score]
    log = bool(prices) and max(prices) > 4 * min(prices)
    columns, rows = max(20, width - 9), max(6, height - 3)
    x, y = Axis.around(prices, 0, columns - 1, log=log), Axis.around(shown, rows - 1, 0)
    grid: dict[tuple[int, int], tuple[str, str]] = {}
    put = _putter(grid, x, y, rows)
    if front.limit is not None and x.low <= front.limit <= x.high:
        for row in range(rows):
            grid[row, round(x.at(front.limit))] = ("│", "red")
    for trial, price, value in scored:
        put(price, value, "·", "blue" if trial.feasible else "bright_black")
    for trial in front.trials:
        assert trial.score is not None
        put(front.price(trial.cost), trial.score.value, "●", "bold green" if trial == front.best else "bold blue")
    for name, price, value in controls:
        put(price, value, _letter(name), "bold cyan")
    text = Text(f"{front.score_name}\n")
    labels = {round(y.at(value)): f"{value:7.4g} " for value in y.ticks(max(2, rows // 4))}
    for row in range(rows):
        text.append(labels.get(row, " " * 8)).append("│")
        for column in range(columns):
            character, style = grid.get((row, column), (" ", ""))
            text.append(character, style)
        text.append("\n")
    text.append(" " * 8 + "└" + "─" * columns + "\n")
    text.append(_scale(x, columns) + "\n")
    names = ", ".join(f"{_letter(name)} {name}" for name, _, _ in controls)
    text.append(f"{WORDS[front.metric]} as a share of dense   ● front   · trial   │ budget   {names}")
    return text


def export_hint(run: Path) -> str:
    """The command that exports the best trial; empty where there is none yet."""
    front = Front.load(run)
    if front.best is None:
        return ""
    return (
        f"tightrope export {shlex.quote(str(run))} --trial {front.best.number} --format {export_format(front.record.header.device)}"
    )


def _letter(control: str) -> str:
    return "X" if control == "random" else control[:1].upper() or "?"


def _putter(grid: dict[tuple[int, int], tuple[str, str]], x: Axis, y: Axis, rows: int) -> Callable[[float, float, str, str], None]:
    def put(price: float, value: float, character: str, style: str) -> None:
        row = round(y.at(value))
        if 0 <= row < rows:
            grid[row, round(x.at(price))] = (character, style)

    return put


def _scale(x: Axis, columns: int) -> str:
    line = [" "] * (columns + 14)
    end = 0
    for value in x.ticks(7):
        label = f"{value:.3g}×"
        start = 9 + round(x.at(value)) - len(label) // 2
        if start > end and start + len(label) <= len(line):
            line[start : start + len(label)] = label
            end = start + len(label)
    return "".join(line).rstrip()
