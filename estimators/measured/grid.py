"""Which nodes of a family to time, and the times of the others from theirs.

Many of a family's sizes follow each other; those that do not are its axes. With one or two axes a product grid is timed and read
multilinearly; with more, some of the nodes that were met are timed and the others learned from them (`learned.py`). ONNX
Runtime's kernels work on output channels in steps of 16 and larger blocks, so along that axis every step is timed and sizes count
as the next one; integer ones do so where 4 divides them, with AVX2 where 8 does (`step_of`), and take the rest one by one (15
channels cost more than 64, with AVX2 36 more than 48). Convolutions in blocked layout come in whole blocks of channels, 16 or, with
AVX2, 8, and each block counts; blocks of 8 are worked on four at a time, so the first and the last of each four are timed.
Elsewhere sizes that 16 or 8 or 4 divides run faster than others. So sizes are read among their like.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

STEP = 16
MOST_AXES = 2  # of a product grid
MOST_STEPS, PAIRED, ALONE, RESTS, SCATTERED = 9, 3, 12, 6, 24
"""Most values of an axis: of whole steps or blocks, of each like beside another axis, of each like alone, of each rest; nodes of
other families."""
Rule = Literal["", "blocks", "steps", "fours", "eights", "rests"]
"""How a size counts: as it is; so too, all sizes being alike; up to whole steps of output channels; so only where 4 divides it, or
8; as it is, its like being the sizes with the same rest of 16."""
WHOLE: dict[Rule, int] = {"steps": 1, "fours": 4, "eights": 8}  # what sizes have to be divided by that count up to whole steps
Sizes = tuple[int, ...]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def output_column(family: str) -> int | None:
    """The place among a family's sizes of the output channels of its weights, if they follow the policy."""
    before = 0
    for part in family.partition("}(")[2].partition(")->")[0].split(";"):
        shape = part.partition(":")[2]
        if part[:1] == "=" and part[1:2] in "fsu" and part[2:3] == ":" and shape.count(",") and shape.startswith("*"):
            return family.partition("}(")[0].count("*") + before
        before += part.count("*")
    return None


def counted(size: int, rule: Rule) -> int:
    """A size as the kernels count it."""
    return -(-size // STEP) * STEP if size >= STEP and size % WHOLE.get(rule, size + 1) == 0 else size


def like(size: int, rule: Rule) -> int:
    """What sizes have in common that take alike: the largest of 16, 8, 4, 2 and 1 that divides them, or a rest."""
    if rule in ("blocks", "steps"):
        return 0
    if rule in ("fours", "eights"):
        return STEP if size >= STEP and size % STEP == 0 else size % WHOLE[rule]
    return size % STEP if rule == "rests" else min(size & -size, STEP)


@dataclass(frozen=True)
class Axis:
    """One free size: its place, how it counts, and the values that are timed."""

    column: int
    rule: Rule
    values: tuple[int, ...]

    def at(self, sizes: Sizes) -> int:
        """The size of a node along the axis, as it counts."""
        return counted(sizes[self.column], self.rule)

    @cached_property
    def _alike(self) -> dict[int, tuple[int, ...]]:
        kinds = [like(v, self.rule) for v in self.values]
        return {kind: tuple(v for v, own in zip(self.values, kinds, strict=True) if own == kind) for kind in kinds}

    def around(self, size: int) -> tuple[int, ...]:
        """The timed values among which a size is read: those like it where they enclose it, else all."""
        near = self._alike.get(like(size, self.rule), ())
        return near if near and near[0] <= size <= near[-1] else self.values


@dataclass(frozen=True)
class Design:
    """The nodes of one family that are timed: `keys`, on a product grid of `axes` or, with more than two, scattered."""

    axes: tuple[Axis, ...]
    keys: tuple[Sizes, ...]


def step_of(block: int) -> int:
    """What has to divide the output channels of an integer convolution that works in steps, by the channels in a block."""
    return 8 if block == 8 else 4


def design(family: str, met: Iterable[Sizes], block: int = STEP) -> Design:
    """Choose the nodes of a family to time, from sizes that policies of the space lower to; `block` as `layouts.BLOCKS` has it."""
    seen = sorted(set(met))
    columns = list(zip(*seen, strict=True))
    out = None if "group=*" in family else output_column(family)
    free: list[int] = []
    for column in sorted(range(len(columns)), key=lambda c: (-len(set(columns[c])), c != out)):
        if len(set(columns[column])) > 1 and not any(_follows(columns[column], columns[f]) for f in free):
            free.append(column)
    axes = tuple(_axis(family, c, _rule(family, c == out, block), columns[c], len(free)) for c in sorted(free))
    if len(axes) > MOST_AXES:
        return Design(axes, _scattered(axes, seen))
    values = [_column(columns, c, axes, seen) for c in range(len(columns))]
    points = product(*(axis.values for axis in axes))
    return Design(axes, tuple(tuple(value(point) for value in values) for point in points))


def _column(columns: Sequence[Sizes], column: int, axes: tuple[Axis, ...], seen: Sequence[Sizes]) -> Callable[[Sizes], int]:
    """A column's value at a point of the axes: an axis's own value, one that follows an axis, or a fixed one."""
    for index, axis in enumerate(axes):
        if columns[column] == columns[axis.column]:
            return lambda point, i=index: point[i]  # type: ignore[misc]
    for index, axis in enumerate(axes):
        if _follows(columns[column], columns[axis.column]):
            known = dict(zip(columns[axis.column], columns[column], strict=True))
            return lambda point, i=index, known=known: known[_nearest(known, point[i])]  # type: ignore[misc]
    return lambda point: seen[0][column]


def _nearest(known: Mapping[int, int], value: int) -> int:
    """The value, or the known one next below it, where a step stands for smaller sizes."""
    return value if value in known else max((k for k in known if k <= value), default=min(known))


def _follows(column: Sizes, leader: Sizes) -> bool:
    """Whether each value of `leader` comes with one value of `column` only."""
    return len(set(zip(leader, column, strict=True))) == len(set(leader))


def _rule(family: str, out: bool, block: int) -> Rule:
    """How a size counts in a family; `out` for its output channels."""
    convolution = family.startswith("com.microsoft:QLinearConv")
    if not out:
        return "rests" if convolution and "group=*" in family else ""
    if convolution and step_of(block) == 8:
        return "eights"
    if convolution or family.startswith("com.microsoft:QGemm"):
        return "fours"
    return "blocks" if "nchwc:Conv" in family else "steps"


def _axis(family: str, column: int, rule: Rule, met: Sizes, axes: int) -> Axis:
    values = sorted({counted(v, rule) for v in met})
    direct = [v for v in values if v < STEP and "nchwc:Conv" in family and not rule]  # read in another way below a block
    found = {*direct, values[0], values[-1]}
    for kind in {like(v, rule) for v in values}:
        alike = [v for v in values if like(v, rule) == kind]
        whole = rule in ("blocks", "steps") or (rule in ("fours", "eights") and kind == STEP)
        if rule == "blocks" and any(v % STEP for v in alike):
            alike = [v for v in alike if v % 32 in (0, 8)]
        found |= set(_spread(alike, MOST_STEPS if whole else RESTS if rule == "rests" else PAIRED if axes > 1 else ALONE))
    return Axis(column, rule, tuple(sorted(found)))


def _scattered(axes: Sequence[Axis], met: Sequence[Sizes]) -> tuple[Sizes, ...]:
    """The least and the largest of the nodes met, and others, each the farthest from those before it in log sizes."""
    places = np.log([[axis.at(sizes) for axis in axes] for sizes in met])
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-9)
    whole, away = places.sum(axis=1), np.full(len(met), np.inf)
    chosen: list[int] = []
    while len(chosen) < SCATTERED and away.max() > 0:
        chosen.append(int([whole.argmin(), whole.argmax(), away.argmax()][min(len(chosen), 2)]))
        away = np.minimum(away, ((places - places[chosen[-1]]) ** 2).sum(axis=1))
    return tuple(sorted(met[i] for i in chosen))


def _spread(values: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of the values, first and last among them, evenly by rank."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[i] for i in sorted(set(np.linspace(0, len(values) - 1, most).round().astype(int).tolist())))


class Grid:
    """Times on a product grid, read between its points multilinearly.

    Args:
        known: times by the values at the axes.
    """

    def __init__(self, axes: tuple[Axis, ...], known: Mapping[Sizes, float]) -> None:
        self.axes = axes
        self._times = np.full([len(axis.values) for axis in axes], np.nan)
        for point, time in known.items():
            self._times[tuple(axis.values.index(v) for axis, v in zip(axes, point, strict=True))] = time
        self._places = [_Places(axis) for axis in axes]

    def at(self, sizes: Ints) -> Floats:
        """The times at `n x k` sizes; NaN beyond the grid, or where points of it were not timed."""
        corners: list[list[tuple[Ints, Floats]]] = []
        for axis, places in zip(self.axes, self._places, strict=True):
            low, high, share = places(sizes[:, axis.column])
            corners.append([(low, 1 - share), (high, share)])
        total = np.zeros(len(sizes))
        for corner in product(*corners):
            share = np.ones(len(sizes))
            for _, s in corner:
                share = share * s
            time = self._times[tuple(place for place, _ in corner)] if corner else self._times[()]
            total = total + np.where(share == 0, 0.0, share * time)
        return total


class _Places:
    """Places of the timed values of an axis around sizes, and the share of the upper one: looked up when a size is first met."""

    def __init__(self, axis: Axis) -> None:
        self._axis, count = axis, axis.values[-1] + 2  # the last stands for all beyond
        self._low, self._high, self._share = np.full(count, -1), np.zeros(count, np.int64), np.empty(count)

    def __call__(self, sizes: Ints) -> tuple[Ints, Ints, Floats]:
        sizes = np.minimum(sizes, len(self._low) - 1)
        for size in np.unique(sizes[self._low[sizes] < 0]).tolist():
            self._low[size], self._high[size], self._share[size] = _between(self._axis, size)
        return self._low[sizes], self._high[sizes], self._share[sizes]


def _between(axis: Axis, size: int) -> tuple[int, int, float]:
    """Places of the timed values around a size, and the share of the upper one; beyond the axis, NaN."""
    at = counted(size, axis.rule)
    if not axis.values[0] <= at <= axis.values[-1]:
        return 0, 0, math.nan
    values = axis.around(at)
    above = bisect_left(values, at)
    high = axis.values.index(values[above])
    if values[above] == at:
        return high, high, 0.0
    low = values[above - 1]
    return axis.values.index(low), high, (at - low) / (values[above] - low)
