"""The table of one network's nodes on one machine: raw samples on disk, append-only, and the times read from them.

The file is JSON, one object a line: first the fingerprint, then families with their axes, timed nodes and timed whole nets.
Lines that cannot be read (torn by a crash, not a number, below zero) are left out with a warning, and nothing else is lost.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tightrope.estimators.measured.clock import low_quartile
from tightrope.estimators.measured.grid import Axis, Design, Sizes, Untimed, design, evaluate, fit_sum, interpolate
from tightrope.estimators.measured.nodes import Key
from tightrope.spaces.errors import DeviceError, FormatError
from tightrope.spaces.fields import Fields, parse

VERSION = 1
log = logging.getLogger(__name__)


def identity(family: str) -> str:
    """What stands for a family in the file's lines."""
    return hashlib.sha256(family.encode()).hexdigest()[:12]


@dataclass
class _Family:
    axes: tuple[Axis, ...]
    exact: dict[Sizes, float] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None

    @property
    def on_grid(self) -> dict[Sizes, float]:
        found: dict[Sizes, float] = {}
        for sizes, time in self.exact.items():
            point = tuple(axis.at(sizes) for axis in self.axes)
            if all(p in axis.values for p, axis in zip(point, self.axes, strict=True)):
                found[point] = min(time, found.get(point, math.inf))
        return found


class Table:
    """Times of nodes in milliseconds; `nets` are whole nets that were timed, by their policy's JSON.

    `fingerprint` says for what the table holds; another one never matches in silence.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.families: dict[str, _Family] = {}
        self.nets: dict[str, float] = {}
        self.base = math.nan  # the reference's time when the table was begun; later times are scaled to it
        self.complete = False  # whether all that a space needs was timed
        self._names: dict[str, str] = {}
        self._grids: dict[str, dict[Sizes, float]] = {}
        self._memo: dict[Key, float] = {}
        if path is not None and path.exists():
            self._read(path)
        else:
            self._append([{"tightrope": "node table", "version": VERSION, "fingerprint": self.fingerprint}])

    # --- asking ---------------------------------------------------------------------------------------------------

    def time(self, key: Key) -> float:
        """Milliseconds of a node: as timed, or between timed ones.

        Raises:
            Untimed: no node of this family was timed, or none that enclose these sizes.
        """
        if key not in self._memo:
            family, sizes = key
            if family not in self.families:
                raise Untimed(f"no node {family} was timed")
            known = self.families[family]
            self._memo[key] = known.exact[sizes] if sizes in known.exact else self._between(family, known, sizes)
        return self._memo[key]

    def _between(self, family: str, known: _Family, sizes: Sizes) -> float:
        if len(known.axes) > 2:
            if known.weights is None:
                known.weights = fit_sum(known.exact)
            return evaluate(known.weights, sizes)
        if family not in self._grids:
            self._grids[family] = known.on_grid
        return interpolate(known.axes, self._grids[family], sizes)

    def knows(self, key: Key) -> bool:
        """Whether `time` answers."""
        try:
            self.time(key)
        except Untimed:
            return False
        return True

    def missing(self, designs: Mapping[str, Design]) -> list[Key]:
        """Nodes of the designs that are not timed yet."""
        return [
            (family, sizes)
            for family, wanted in designs.items()
            for sizes in wanted.keys
            if family not in self.families or sizes not in self.families[family].exact
        ]

    # --- adding ---------------------------------------------------------------------------------------------------

    def declare(self, designs: Mapping[str, Design]) -> None:
        """Make families known."""
        lines = []
        for family, wanted in designs.items():
            if family not in self.families:
                axes = [[a.column, a.steps, [*a.values]] for a in wanted.axes]
                lines.append({"family": family, "axes": axes})
                self._declared(Fields(lines[-1], "family"))
        self._append(lines)

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
        for line in lines:
            self._node(Fields(line, "sample"))

    def add_nets(self, policies: Iterable[str], samples: np.ndarray, reference: float, empty: float) -> None:
        """Add timed whole nets, by their policies' JSON: milliseconds, `rounds x nets`."""
        lines = [
            {"net": policy, "ms": [round(x, 6) for x in column.tolist()],
             "reference_ms": round(reference, 6), "empty_ms": round(empty, 6)}
            for policy, column in zip(policies, samples.T, strict=True)
        ]  # fmt: skip
        self._append(lines)
        for line in lines:
            self._net(Fields(line, "sample"))

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
        for number, text in enumerate(lines[1:], start=2):
            try:
                self._line(parse(text, f"{path} line {number}"))
            except FormatError as error:
                log.warning("left out of the latency table: %s", error)

    def _line(self, fields: Fields) -> None:
        if fields.take("family", str, ""):
            self._declared(fields)
        elif fields.take("net", str, ""):
            self._net(fields)
        elif fields.take("complete", bool, False):
            self.complete = True
        else:
            self._node(fields)

    def _declared(self, fields: Fields) -> None:
        family, axes = fields.take("family", str), []
        for axis in fields.take("axes", list):
            if not (isinstance(axis, list) and len(axis) == 3 and isinstance(axis[2], list) and axis[2]):
                raise FormatError(f"{fields.where}.axes must be lists of column, steps and values, got {axis!r}")
            axes.append(Axis(int(axis[0]), bool(axis[1]), tuple(int(v) for v in axis[2])))
        self._names[identity(family)] = family
        self.families.setdefault(family, _Family(tuple(axes)))

    def _figure(self, fields: Fields) -> float:
        samples, reference = fields.take("ms", list), fields.take("reference_ms", float)
        empty = fields.take("empty_ms", float)
        numbers = [*samples, reference, empty]
        if not samples or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
            raise FormatError(f"{fields.where}.ms must be a list of numbers, got {samples!r}")
        if not all(math.isfinite(x) for x in numbers) or min(samples) < 0 or reference <= 0:
            raise FormatError(f"{fields.where} must have finite times, none below zero, got {samples!r}")
        if math.isnan(self.base):
            self.base = reference
        figure = float(low_quartile(np.array(samples)[:, None])[0])
        return float(max(figure - empty, 0.0) * self.base / reference)

    def _node(self, fields: Fields) -> None:
        family = fields.take("node", str)
        if family not in self._names:
            raise FormatError(f"{fields.where}.node must be a family that stands before it, got {family!r}")
        name, sizes = self._names[family], fields.ints("sizes")
        self.families[name].exact[sizes] = self._figure(fields)
        self._grids.pop(name, None)
        self.families[name].weights = None
        self._memo.clear()

    def _net(self, fields: Fields) -> None:
        self.nets[fields.take("net", str)] = self._figure(fields)


def designs(met: Mapping[str, set[Sizes]]) -> dict[str, Design]:
    """A design for every family that policies were seen to lower to."""
    return {family: design(family, sizes) for family, sizes in met.items()}
