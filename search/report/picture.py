"""The front as a static SVG: all trials, the front in steps, the budget, the controls and what became of the best."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from tightrope.search.report.axis import Axis
from tightrope.search.report.front import WORDS, Front
from tightrope.spaces.policy import write_atomically

WIDTH, HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 58, 48
_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #5a6675 }
.title { font-size: 15px; font-weight: 600; fill: #1d2430 } .axis-title { fill: #1d2430 }
.page { fill: #ffffff } .grid { stroke: #e9ecf0 } .axis { stroke: #c5ccd6 }
.trial { fill: #0072b2; fill-opacity: .38 } .infeasible { fill: #a9b1bc; fill-opacity: .5 }
.on-front { fill: #0072b2; stroke: #ffffff; stroke-width: 1 } .front { fill: none; stroke: #0072b2; stroke-width: 1.8 }
.error { stroke: #0072b2; stroke-width: 1; opacity: .6 } .best { fill: none; stroke: #d55e00; stroke-width: 2.2 }
.budget { stroke: #b3261e; stroke-dasharray: 5 4; stroke-width: 1.2 } .budget-text { fill: #b3261e }
.control { fill: #1d2430; stroke: #ffffff } .final { stroke: #d55e00; stroke-width: 2.2; fill: none }
.label { fill: #1d2430; font-weight: 500; paint-order: stroke; stroke: #ffffff; stroke-width: 3px; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
  text { fill: #a3adba } .title, .axis-title { fill: #e7eaee } .page { fill: #1c1e22 }
  .grid { stroke: #2d3137 } .axis { stroke: #4a505a } .trial { fill: #5aaee6 } .infeasible { fill: #666e79 }
  .on-front { fill: #5aaee6; stroke: #1c1e22 } .front, .error { stroke: #5aaee6 } .best, .final { stroke: #ff8a4c }
  .budget { stroke: #ff8f85 } .budget-text { fill: #ff8f85 } .control { fill: #f2f4f7; stroke: #1c1e22 }
  .label { fill: #e7eaee; stroke: #1c1e22 }
}
"""
_MARKS = {
    "dense": "M-5,-5H5V5H-5z",
    "uniform": "M0,-6.2L6,4.4H-6z",
    "random": "M0,6.2L6,-4.4H-6z",
    "recipe": "M0,-7L1.9,-2.4L6.8,-2.1L3,1L4.2,5.8L0,3.2L-4.2,5.8L-3,1L-6.8,-2.1L-1.9,-2.4z",
}
_OTHER = "M0,-6L6,0L0,6L-6,0z"


def write_svg(run: Path, file: Path) -> None:
    """Write a picture of the front of a run, readable on light and dark pages."""
    write_atomically(file, draw(Front.load(run)))


def draw(front: Front) -> str:
    """The picture, as SVG. What a run says becomes text, never markup."""
    header = front.record.header
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"})
    svg.set("width", str(WIDTH))
    svg.set("height", str(HEIGHT))
    ET.SubElement(svg, "title").text = f"Trials and front of {header.name}"
    ET.SubElement(svg, "style").text = _STYLE
    _add(svg, "rect", "page", width=WIDTH, height=HEIGHT, rx=8)
    simulated = " (simulated)" if header.simulated else ""
    _text(svg, _LEFT, 26, f"{header.name}: {len(front.record.trials)} trials of {header.agent}", "title")
    x, y = _axes(front)
    below = sum(t.score is not None and t.score.value < y.low for t in front.record.trials)
    beyond = f"; {below} trials lie below the plot" if below else ""
    _text(svg, _LEFT, 44, f"on {header.device}{simulated}, budget {', '.join(header.budget) or 'none'}{beyond}", "")
    _grid(svg, front, x, y)
    scored = [(t, front.price(t.cost), t.score.value) for t in front.record.trials if t.score is not None]
    kept = {t.number for t in front.trials}
    for trial, price, value in scored:
        if trial.number not in kept and math.isfinite(price) and value >= y.low:
            _add(svg, "circle", "trial" if trial.feasible else "infeasible", cx=x.at(price), cy=y.at(value), r=3)
    _steps(svg, front, x, y)
    _limit(svg, front, x, y)
    labels = [*_controls(svg, front, x, y), *_best(svg, front, x, y)]
    _place(svg, labels)
    return ET.tostring(svg, encoding="unicode") + "\n"


Label = tuple[float, float, str]


def _axes(front: Front) -> tuple[Axis, Axis]:
    scored = [t for t in front.record.trials if t.score is not None]
    prices = [*(front.price(t.cost) for t in scored), *(front.price(c.cost) for c in front.controls)]
    prices = [p for p in prices if math.isfinite(p)]
    # Trials far below the others would squeeze the rest: the lowest tenth may lie below the axis, the front never.
    scores = sorted(t.score.value for t in scored if t.score)
    shown = scores[len(scores) // 10 :] + [t.score.value for t in front.trials if t.score] + [c.score.value for c in front.controls]
    shown += [final.score.value for final in front.record.finals]
    log = bool(prices) and max(prices) > 4 * min(prices)
    return (
        Axis.around(prices, _LEFT, WIDTH - _RIGHT, log=log),
        Axis.around(shown, HEIGHT - _BOTTOM, _TOP, pad=0.06),
    )


def _grid(svg: ET.Element, front: Front, x: Axis, y: Axis) -> None:
    for value in x.ticks(7):
        _add(svg, "line", "grid", x1=x.at(value), x2=x.at(value), y1=_TOP, y2=HEIGHT - _BOTTOM)
        _text(svg, x.at(value), HEIGHT - _BOTTOM + 17, f"{value:.3g}×", "", "middle")
    for value in y.ticks(6):
        _add(svg, "line", "grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y.at(value), y2=y.at(value))
        _text(svg, _LEFT - 8, y.at(value) + 4, f"{value:.4g}", "", "end")
    _add(svg, "line", "axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=HEIGHT - _BOTTOM, y2=HEIGHT - _BOTTOM)
    _add(svg, "line", "axis", x1=_LEFT, x2=_LEFT, y1=_TOP, y2=HEIGHT - _BOTTOM)
    _text(svg, (WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 10, f"{WORDS[front.metric]} (share of dense)", "axis-title", "middle")
    title = _text(svg, -(HEIGHT + _TOP - _BOTTOM) / 2, 16, front.score_name, "axis-title", "middle")
    title.set("transform", "rotate(-90)")


def _steps(svg: ET.Element, front: Front, x: Axis, y: Axis) -> None:
    points = [(x.at(front.price(t.cost)), y.at(t.score.value), t) for t in front.trials if t.score]
    if not points:
        return
    (first_x, first_y, _), *rest = points
    path = f"M{first_x:.1f},{HEIGHT - _BOTTOM}V{first_y:.1f}" + "".join(f"H{px:.1f}V{py:.1f}" for px, py, _ in rest)
    _add(svg, "path", "front", d=f"{path}H{WIDTH - _RIGHT}")
    for px, py, trial in points:
        assert trial.score is not None
        reach = abs(y.at(trial.score.value + trial.score.stderr) - py)
        _add(svg, "line", "error", x1=px, x2=px, y1=max(_TOP, py - reach), y2=min(HEIGHT - _BOTTOM, py + reach))
    for px, py, trial in points:
        _add(svg, "circle", "on-front" if trial.feasible else "infeasible", cx=px, cy=py, r=4.5)


def _limit(svg: ET.Element, front: Front, x: Axis, y: Axis) -> None:
    limit, floor = front.limit, front.record.header.floor
    if limit is not None and x.low <= limit <= x.high:
        at = x.at(limit)
        _add(svg, "line", "budget", x1=at, x2=at, y1=_TOP, y2=HEIGHT - _BOTTOM)
        _text(svg, at + 5, HEIGHT - _BOTTOM - 8, "budget", "budget-text label")
    if floor is not None:
        at = y.at(front.record.header.dense_score.value + floor)
        _add(svg, "line", "budget", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at)
        _text(svg, WIDTH - _RIGHT - 5, at - 5, f"accuracy>={floor:g}", "budget-text label", "end")


def _controls(svg: ET.Element, front: Front, x: Axis, y: Axis) -> list[Label]:
    labels = []
    for control in front.controls:
        price = front.price(control.cost)
        if not math.isfinite(price):
            continue
        px, py = x.at(price), y.at(control.score.value)
        _add(svg, "path", "control", d=_MARKS.get(control.name, _OTHER), transform=f"translate({px:.1f},{py:.1f})")
        labels.append((px, py, control.name))
    return labels


def _best(svg: ET.Element, front: Front, x: Axis, y: Axis) -> list[Label]:
    labels: list[Label] = []
    best = front.best
    if best is not None and best.score is not None:
        px, py = x.at(front.price(best.cost)), y.at(best.score.value)
        _add(svg, "circle", "best", cx=px, cy=py, r=8.5)
        labels.append((px, py - 14, f"best: trial {best.number}"))
    for number, final in front.finals.items():
        px, py = x.at(front.price(final.cost)), y.at(final.score.value)
        _add(svg, "path", "final", d="M-5,0H5M0,-5V5", transform=f"translate({px:.1f},{py:.1f})")
        if best is not None and number == best.number:
            labels.append((px, py - 6, "fine-tuned"))
    return labels


def _place(svg: ET.Element, labels: Sequence[Label]) -> None:
    """Write labels beside their marks, one below the other where they would overlap."""
    taken: list[tuple[float, float, float]] = []
    for px, py, text in sorted(labels, key=lambda label: label[1]):
        width = 6.8 * len(text)
        left = px + 10 if px + 10 + width < WIDTH - 4 else px - 10 - width
        top = py + 4
        while any(abs(top - y) < 14 and left < end and start < left + width for start, end, y in taken):
            top += 14
        taken.append((left, left + width, top))
        _text(svg, left, top, text, "label")


def _add(parent: ET.Element, tag: str, kind: str, **attributes: float | str) -> ET.Element:
    values = {name: value if isinstance(value, str) else f"{value:.5g}" for name, value in attributes.items()}
    return ET.SubElement(parent, tag, {"class": kind, **values})


def _text(parent: ET.Element, x: float, y: float, text: str, kind: str, anchor: str = "start") -> ET.Element:
    node = _add(parent, "text", kind, x=x, y=y)
    node.set("text-anchor", anchor)
    node.text = "".join(c if c.isprintable() else "�" for c in text.encode("utf-8", "replace").decode())
    return node
