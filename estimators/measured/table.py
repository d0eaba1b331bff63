"""The table of one network's nodes on one machine: raw samples on disk, append-only, and the times read from them.

The file is JSON, one object a line: first the fingerprint, then families with their axes, timed nodes and timed whole nets.
Lines that cannot be read (torn by a crash, not a number, below zero) are left out with a warning, and nothing else is lost.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np

from tightrope.estimators.measured.clock import QUARTILE, uncollected
from tightrope.estimators.measured.grid import MOST_AXES, Axis, Design, Floats, Grid, Ints, Rule, Sizes, design
from tightrope.estimators.measured.learned import Learned
from tightrope.estimators.measured.nodes import Key
from tightrope.spaces.errors import DeviceError, FormatError
from tightrope.spaces.fields import Fields, parse

VERSION = 3
NODES_SLOWER, NETS_SLOWER = 1.15, 1.3
"""Of a node's or a net's passes, those count in which the reference took at most so many times what it took in the fastest."""
Pass = tuple[float, list[float]]
"""Milliseconds of the reference as they were, and the samples on the table's scale."""
LEFT_OUT = "left out of the latency table: %s"
log = logging.getLogger(__name__)


class Untimed(Exception):
    """A node that was not timed, and that no timed ones enclose."""


def identity(family: str) -> str:
    """What stands for a family in the file's lines."""
    return hashlib.sha256(family.encode()).hexdigest()[:12]


@dataclass
class _Family:
    """The timed nodes of a family; `learn` makes ready what tells the others."""

    axes: tuple[Axis, ...]
    samples: dict[Sizes, list[Pass]] = field(default_factory=dict)
    error: float = 0.0  # of learned times, each left out
    _exact: dict[Sizes, float] | None = None
    _read: Callable[[Ints], Floats] | None = None
    _apart: dict[Sizes, float] = field(default_factory=dict)

    @property
    def exact(self) -> dict[Sizes, float]:
        """The times of the nodes that were timed."""
        if self._exact is None:
            self._exact = {sizes: pooled(undisturbed(passes, NODES_SLOWER)) for sizes, passes in self.samples.items()}
        return self._exact

    def add(self, sizes: Sizes, timed: Pass) -> None:
        """Add one more pass."""
        self.samples.setdefault(sizes, []).append(timed)
        self._exact = self._read = None

    def at(self, sizes: Ints) -> Floats:
        """Times at `n x k` sizes: those timed, and others between them."""
        self.learn()
        assert self._read is not None
        found = self._read(sizes)
        for timed, time in self._apart.items():
            found[np.all(sizes == timed, axis=1)] = time
        return found

    def learn(self) -> None:
        """Make ready what tells the times."""
        if self._read is not None:
            return
        exact = self.exact
        if len(self.axes) > MOST_AXES:
            learned = Learned(self.axes, exact)
            self._read, self._apart, self.error = learned.at, exact, learned.error
            return
        grid: dict[Sizes, float] = {}
        points = {sizes: tuple([axis.at(sizes) for axis in self.axes]) for sizes in exact}
        for sizes, point in points.items():
            if all(p in axis.values for p, axis in zip(point, self.axes, strict=True)):
                grid[point] = min(exact[sizes], grid.get(point, math.inf))
        self._read = Grid(self.axes, grid).at
        self._apart = {s: exact[s] for s, point in points.items() if grid.get(point) != exact[s]}


def pooled(passes: Sequence[Sequence[float]]) -> float:
    """The low quartile of the samples of all passes, as `clock.low_quartile` has it; quicker for a few."""
    samples = sorted(chain.from_iterable(passes))
    low, share = divmod((len(samples) - 1) * QUARTILE / 100, 1)
    below, above = samples[int(low)], samples[min(int(low) + 1, len(samples) - 1)]
    return below + share * (above - below)


def undisturbed(passes: Sequence[Pass], slower: float) -> list[list[float]]:
    """The samples of the passes in which the machine was about as fast as in the fastest.

    One that is shared can be half as fast for seconds (a neighbour on the same core), and not for all nodes alike: on the scale of
    the reference, what computes then looks too dear, and what waits for memory too cheap.
    """
    most = slower * min(reference for reference, _ in passes)
    return [samples for reference, samples in passes if reference <= most]


def typical(passes: Sequence[Pass]) -> float:
    """The median over undisturbed passes of the low quartile of each."""
    return median(pooled([samples]) for samples in undisturbed(passes, NETS_SLOWER))


class Table:
    """Times of nodes in milliseconds; `nets` are whole nets that were timed, by their policy's JSON, as ratios to the
    dense one, and `held` ones that no fit may see.

    What is timed in several passes, some time apart, has a line for each: a neighbour that takes the shared cache for some seconds
    falls on one of them. Passes in which the reference shows that the machine was slower do not count (`undisturbed`). A node's
    time is the low quartile over all others. A net's ratio is the median of the passes', since the dense
    net's noise is in it too, and a low quartile is the lower the more noise there is. `fingerprint` says for what the table holds;
    another one never matches in silence.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.families: dict[str, _Family] = {}
        self._ratios: dict[str, dict[str, list[Pass]]] = {"net": {}, "held": {}}
        self._dense: list[float] = []
        self.base = math.nan  # the reference's time when the table was begun; later times are scaled to it
        self.complete = False  # whether all that a space needs was timed
        self.notes: dict[str, Fields] = {}  # what else is kept of the network
        self._names: dict[str, str] = {}
        self._memo: dict[Key, float] = {}
        if path is not None and path.exists():
            self._read(path)
        else:
            self._append([{"tightrope": "node table", "version": VERSION, "fingerprint": self.fingerprint}])

    # --- asking ---------------------------------------------------------------------------------------------------

    def times(self, family: str, sizes: Ints) -> Floats:
        """Milliseconds of nodes of a family at `n x k` sizes: as timed, or between timed ones; NaN where none enclose them."""
        known = self.families.get(family)
        return np.full(len(sizes), np.nan) if known is None else known.at(sizes)

    def time(self, key: Key) -> float:
        """Milliseconds of one node, as `times` has them.

        Raises:
            Untimed: no node of this family was timed, or none that enclose these sizes.
        """
        if key not in self._memo:
            found = float(self.times(key[0], np.array([key[1]], np.int64).reshape(1, -1))[0])
            if math.isnan(found):
                raise Untimed(f"no nodes that enclose {key[0]} at {list(key[1])} were timed")
            self._memo[key] = found
        return self._memo[key]

    def knows(self, key: Key) -> bool:
        """Whether `time` answers."""
        try:
            self.time(key)
        except Untimed:
            return False
        return True

    def learned(self) -> dict[str, float]:
        """The families whose times are learned, and the mean relative error of their timed nodes, each left out."""
        many = {name: family for name, family in self.families.items() if len(family.axes) > MOST_AXES and family.exact}
        for family in many.values():
            family.learn()
        return {name: family.error for name, family in many.items()}

    def missing(self, designs: Mapping[str, Design], passes: int = 1) -> list[Key]:
        """Nodes of the designs that were not timed in so many passes yet."""
        return [
            (family, sizes)
            for family, wanted in designs.items()
            for sizes in wanted.keys
            if family not in self.families or len(self.families[family].samples.get(sizes, ())) < passes
        ]

    # --- adding ---------------------------------------------------------------------------------------------------

    def declare(self, designs: Mapping[str, Design]) -> None:
        """Make families known."""
        self.declare_axes({f: [[a.column, a.rule, [*a.values]] for a in wanted.axes] for f, wanted in designs.items()})

    def declare_axes(self, families: Mapping[str, Any]) -> None:
        """The same, by the lists of column, rule and values of their axes."""
        lines = [{"family": family, "axes": axes} for family, axes in families.items() if family not in self.families]
        for line in lines:
            self._declared(Fields(line, "family"))
        self._append(lines)

    def note(self, what: str, value: Mapping[str, Any]) -> None:
        """Keep something else that was worked out for the network."""
        self._append([{"note": what, "value": value}])
        self.notes[what] = parse(json.dumps(value), what)

    def finish(self) -> None:
        """Note that all that a space needs is there."""
        self.complete = True
        self._append([{"complete": True}])

    def add(self, keys: Sequence[Key], samples: np.ndarray, reference: float, empty: float) -> None:
        """Add timed nodes: milliseconds, `rounds x nodes`; those of the reference and of an empty call in the same rounds."""
        lines = [
            {"node": identity(f), "sizes": [*sizes], "ms": [round(x, 6) for x in column.tolist()],
             "reference_ms": round(reference, 6), "empty_ms": round(empty, 6)}
            for (f, sizes), column in zip(keys, samples.T, strict=True)
        ]  # fmt: skip
        self._append(lines)
        self._nodes([Fields(line, "sample") for line in lines])

    def add_nets(
        self, policies: Iterable[str], samples: np.ndarray, reference: float, empty: float, dense: float, *, held: bool = False
    ) -> None:  # fmt: skip
        """Add timed whole nets, by their policies' JSON: milliseconds, `rounds x nets`; `held` out of the fit, or not.

        Args:
            dense: milliseconds of the dense net in the same rounds, to which the others are told as ratios.
        """
        lines = [
            {"held" if held else "net": policy, "ms": [round(x, 6) for x in column.tolist()],
             "reference_ms": round(reference, 6), "empty_ms": round(empty, 6), "dense_ms": round(dense, 6)}
            for policy, column in zip(policies, samples.T, strict=True)
        ]  # fmt: skip
        self._append(lines)
        self._nets([Fields(line, "sample") for line in lines])

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        if self.path is None or not data:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last writer was killed
                    data = "\n" + data
            file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())

    # --- reading --------------------------------------------------------------------------------------------------

    @uncollected()
    def _read(self, path: Path) -> None:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
        try:
            head = parse(lines[0] if lines else "", f"{path} line 1")
            head.version(VERSION)
            found = head.take("fingerprint", dict)
        except FormatError as error:
            raise DeviceError(f"{error}; this is not a latency table of ours: move the file away to measure anew") from None
        if found != self.fingerprint:
            other = sorted(k for k in {*found, *self.fingerprint} if found.get(k) != self.fingerprint.get(k))
            raise DeviceError(f"{path} is a table for another {', '.join(other)}; move the file away to measure anew")
        parsed: list[Fields] = []
        for number, text in enumerate(lines[1:], start=2):
            try:
                parsed.append(parse(text, f"{path} line {number}"))
            except FormatError as error:
                log.warning(LEFT_OUT, error)
        for read, alike in groupby(parsed, self._reader):
            self._lines(read, [*alike])

    def _reader(self, fields: Fields) -> Callable[[Sequence[Fields]], None]:
        """What reads a line and those like it."""
        return self._nodes if "node" in fields else self._nets if "net" in fields or "held" in fields else self._others

    def _lines(self, read: Callable[[Sequence[Fields]], None], lines: Sequence[Fields]) -> None:
        """Read lines all at once or, if anything is wrong with them, one by one."""
        try:
            read(lines)
        except FormatError as error:
            if len(lines) == 1:
                log.warning(LEFT_OUT, error)
                return
            for fields in lines:
                self._lines(read, [fields])

    def _others(self, lines: Sequence[Fields]) -> None:
        for fields in lines:
            self._other(fields)

    def _other(self, fields: Fields) -> None:
        if fields.take("family", str, ""):
            self._declared(fields)
        elif note := fields.take("note", str, ""):
            self.notes[note] = Fields(fields.take("value", dict), f"{fields.where}.value")
        elif fields.take("complete", bool, False):
            self.complete = True
        else:
            raise FormatError(f"{fields.where}.node is missing")

    def _declared(self, fields: Fields) -> None:
        family, axes = fields.take("family", str), []
        for axis in fields.take("axes", list):
            if not (isinstance(axis, list) and len(axis) == 3 and isinstance(axis[2], list) and axis[2]):
                raise FormatError(f"{fields.where}.axes must be lists of column, rule and values, got {axis!r}")
            if axis[1] not in get_args(Rule):
                raise FormatError(f"{fields.where}.axes must have rules of {get_args(Rule)}, got {axis[1]!r}")
            axes.append(Axis(int(axis[0]), axis[1], tuple(int(v) for v in axis[2])))
        self._names[identity(family)] = family
        self.families.setdefault(family, _Family(tuple(axes)))

    def _figures(self, lines: Sequence[Fields], *others: str) -> tuple[list[Pass], list[list[float]]]:
        """The samples of each line without an empty call's time, and each of `others` likewise, on the table's scale."""
        samples, where = [fields.take("ms", list) for fields in lines], lines[0].where
        counts, numbers = [*map(len, samples)], [*chain.from_iterable(samples)]
        if 0 in counts or not {*map(type, numbers)} <= {int, float}:
            raise FormatError(f"{where}.ms must be a list of numbers, got {samples[0]!r}")
        ms = np.array(numbers, np.float64)
        more = np.array([[fields.take(name, float) for name in ("reference_ms", "empty_ms", *others)] for fields in lines])
        reference, empty = more.T[:2]
        if not (np.isfinite(ms).all() and np.isfinite(more).all()) or ms.min() < 0 or reference.min() <= 0:
            raise FormatError(f"{where} must have finite times, none below zero, got {samples[0]!r}")
        if math.isnan(self.base):
            self.base = float(reference[0])
        scale = self.base / reference
        scaled = (np.maximum(ms - np.repeat(empty, counts), 0) * np.repeat(scale, counts)).tolist()
        ends = zip(reference.tolist(), counts, np.cumsum(counts).tolist(), strict=True)
        passes = [(took, scaled[end - count : end]) for took, count, end in ends]
        return passes, (np.maximum(more.T[2:] - empty, 0) * scale).tolist()

    def _nodes(self, lines: Sequence[Fields]) -> None:
        names = [fields.take("node", str) for fields in lines]
        if unknown := {*names} - {*self._names}:
            raise FormatError(f"{lines[0].where}.node must be a family that stands before it, got {unknown.pop()!r}")
        sizes, (passes, _) = [fields.ints("sizes") for fields in lines], self._figures(lines)
        for name, size, timed in zip(names, sizes, passes, strict=True):
            self.families[self._names[name]].add(size, timed)
        self._memo.clear()

    def _nets(self, lines: Sequence[Fields]) -> None:
        kinds = ["held" if "held" in fields else "net" for fields in lines]
        policies = [fields.take(kind, str) for fields, kind in zip(lines, kinds, strict=True)]
        passes, (dense,) = self._figures(lines, "dense_ms")
        if min(dense) <= 0:
            raise FormatError(f"{lines[0].where}.dense_ms must be more than an empty call's time")
        for kind, policy, (reference, samples), whole in zip(kinds, policies, passes, dense, strict=True):
            self._ratios[kind].setdefault(policy, []).append((reference, [x / whole for x in samples]))
        self._dense += dense

    @property
    def nets(self) -> dict[str, float]:
        """Whole nets that were timed, by their policy's JSON, as ratios to the dense one."""
        return {policy: typical(passes) for policy, passes in self._ratios["net"].items()}

    @property
    def held(self) -> dict[str, float]:
        """The same of those that no fit may see."""
        return {policy: typical(passes) for policy, passes in self._ratios["held"].items()}

    def turns(self, policy: str) -> int:
        """How often a net was timed for the fit."""
        return len(self._ratios["net"].get(policy, ()))

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the dense net: the median of the runs that it was timed in."""
        return float(np.median(self._dense)) if self._dense else math.nan


def designs(met: Mapping[str, set[Sizes]], block: int) -> dict[str, Design]:
    """A design for every family that policies were seen to lower to."""
    return {family: design(family, sizes, block) for family, sizes in met.items()}
