"""Run folders below one log folder, read as they grow.

A reader keeps the numbers of every record in columns and, of everything else, only where its line stands in the file:
policies are read from there when they are asked for. A poll costs one `stat` for each run and the new lines.
"""

import hashlib
import json
import math
import os
import shlex
import stat
import struct
import sys
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tightrope.spaces.errors import RunError, TightropeError
from tightrope.spaces.network import Network, full_rank
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import units_of

JOURNAL = "trials.jsonl"
SHARES = "layers.jsonl"  # of the policies of the front: {"policy": key, "latency_ms": {layer: milliseconds, "": the rest}}
KINDS = ("trial", "control", "final", "dense")
COSTS = ("latency_ms", "energy_mj", "size_bytes", "peak_ram_bytes", "macs")
# Of `label`, `failed` and `provenance` the column holds an index into the run's strings; a missing number is NaN.
COLUMNS = (
    "kind", "number", "label", "score", "stderr", "count", *COSTS, "low_ms", "high_ms", "feasible", "failed", "cpu_seconds", "time",
    "simulated", "extrapolated", "provenance", "ratio", "ratio_low", "ratio_high",
)  # fmt: skip
_CHUNK = 4 << 20
_LONGEST = 64 << 20  # a line longer than this is not read
_RESCAN_SECONDS = 2.0
_MOST_STRINGS, _MOST_TEXT = 1000, 400  # different texts that are kept of a run, and characters of each
_NAN = math.nan


class Run:
    """One run folder. `epoch` changes when its journal is not the file that was read before."""

    def __init__(self, folder: Path, root: Path, shown: str, group: str = "") -> None:
        """`folder` is the run's real path, `root` the real path it must stay below, `shown` the path that users know.

        `group` is the name that the user gave to `root`, if any.
        """
        self.folder, self._root, self.shown = folder, root, shown
        inside = folder.relative_to(root)
        self.name = _text("/".join(filter(None, (group, *inside.parts))) or folder.name)
        self.id = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        self._lock = threading.Lock()
        self._network: tuple[tuple[int, int], Network] | None = None
        self._by_layer: tuple[tuple[int, int], dict[str, dict[str, float]]] | None = None
        self._forget(None, b"")

    def _forget(self, identity: tuple[int, int] | None, head: bytes) -> None:
        self._identity, self._head = identity, head
        self.end = 0
        self.epoch = hashlib.sha256(repr((identity, head, time.monotonic())).encode()).hexdigest()[:12]
        self.study: dict[str, Any] = {}
        self.columns = {name: array("d") for name in COLUMNS}
        self.strings: list[str] = []
        self.bad_lines = 0
        self.more = False
        self._string_index: dict[str, int] = {}
        self._starts = array("q")
        self._by_number: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def refresh(self, limit: int | None = None) -> None:
        """Read the lines that were added since the last time, at most about `limit` bytes of them.

        A last line that is not ended yet is left for later. A journal that was replaced or cut is read anew.
        """
        with self._lock:
            try:
                with _open_inside(self.folder / JOURNAL, self._root) as file:
                    self._read(file, limit)
            except FileNotFoundError:
                self._forget(None, b"")

    def _read(self, file: BinaryIO, limit: int | None) -> None:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        if identity != self._identity or status.st_size < self.end:
            self._forget(identity, b"")
        if status.st_size == self.end:
            self.more = False
            return
        head = file.read(256)
        if not head.startswith(self._head):
            self._forget(identity, b"")
        self._head = head if b"\n" not in head else head[: head.index(b"\n")]
        stop = status.st_size if limit is None else min(status.st_size, self.end + limit)
        chunk = _CHUNK
        while self.end < stop:
            file.seek(self.end)
            block = file.read(min(chunk, status.st_size - self.end))
            cut = block.rfind(b"\n") + 1
            if cut == 0:
                if len(block) < chunk or chunk >= _LONGEST:
                    break  # a line that is not ended yet, or endless
                chunk *= 4
                continue
            self._take(block[:cut])
            chunk = _CHUNK
        self.more = stop < status.st_size and self.end < status.st_size

    def _take(self, block: bytes) -> None:
        """Keep the numbers of whole lines."""
        at = self.end
        for line in block.splitlines(keepends=True):
            try:
                record = json.loads(line) if line.strip() else None
                if record is not None:
                    self._keep(record, at)
            except (ValueError, LookupError, RecursionError, AttributeError, TypeError):
                self.bad_lines += 1
            at += len(line)
        self.end = at

    def _keep(self, record: dict[str, Any], at: int) -> None:
        kind = record.get("kind")
        if kind == "study":
            dense = record.get("dense")
            self.study = _study(record)
            if isinstance(dense, dict):
                self._append("dense", -1, "dense", dense, at, feasible=False)
        elif kind in ("trial", "final"):
            number = record["number"]
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"number must be whole, got {number!r}")
            if kind == "trial":
                self._by_number[number] = len(self)
            self._append(kind, number, record.get("agent", ""), record, at, feasible=record.get("feasible") is True)
        elif kind == "control":
            self._append(kind, -1, record.get("name", ""), record, at, feasible=False)

    def _append(self, kind: str, number: int, label: object, record: dict[str, Any], at: int, *, feasible: bool) -> None:
        cost, score = record.get("cost") or {}, record.get("score") or {}
        interval, measured, failed = cost.get("interval_ms") or (None, None), record.get("measured") or {}, record.get("failed")
        low, high = interval
        row = (
            KINDS.index(kind), number, self._string(label), _number(score.get("value")), _number(score.get("stderr")),
            _number(score.get("count")), *(_number(cost.get(name)) for name in COSTS), _number(low), _number(high), feasible,
            self._string(failed) if failed else _NAN, _number(record.get("cpu_seconds")), _number(record.get("time")),
            cost.get("simulated") is True, cost.get("extrapolated") is True, self._string(cost.get("provenance", "")),
            _number(measured.get("ratio")), _number(measured.get("low")), _number(measured.get("high")),
        )  # fmt: skip
        for name, value in zip(COLUMNS, row, strict=True):
            self.columns[name].append(value)
        self._starts.append(at)

    def _string(self, value: object) -> int:
        text = _text(str(value))
        text = text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"
        if text not in self._string_index and len(self.strings) >= _MOST_STRINGS:
            text = "… (see the journal)"
        if text not in self._string_index:
            self._string_index[text] = len(self.strings)
            self.strings.append(text)
        return self._string_index[text]

    def summary(self) -> dict[str, Any]:
        """What stands in the list of runs."""
        return {
            "id": self.id, "name": self.name, "epoch": self.epoch, "count": len(self), "more": self.more,
            "bad_lines": self.bad_lines, "study": self.study, "command": f"tightrope export {shlex.quote(_text(self.shown))}",
            "format": export_format(self.study.get("device", "")),
        }  # fmt: skip

    def part(self, start: int, most: int) -> tuple[dict[str, Any], bytes]:
        """Records `start` onwards, at most so many: a header, and the columns one after the other as little-endian doubles."""
        with self._lock:
            stop = min(len(self), start + most)
            header = {
                "run": self.id, "epoch": self.epoch, "from": start, "count": stop - start,
                "more": self.more or stop < len(self), "strings": self.strings, "columns": COLUMNS,
            }  # fmt: skip
            return header, b"".join(_little(self.columns[name][start:stop]) for name in COLUMNS)

    def detail(self, index: int) -> dict[str, Any]:
        """One record as the journal has it, and its policy layer by layer. A `final` record has the policy of its trial."""
        if not 0 <= index < len(self):
            raise RunError(f"run {self.name!r} has records 0 to {len(self) - 1}, got {index}")
        found = self.line(index)
        record = found.get("dense", {}) if found.get("kind") == "study" else found
        policy = record.get("policy")
        if record.get("kind") == "final" and policy is None:
            trial = self._by_number.get(record["number"])
            policy = None if trial is None else self.line(trial).get("policy")
        answer = {
            "index": index,
            "policy": policy,
            "cost": record.get("cost"),
            "score": record.get("score"),
            "layers": None,
            "problem": "",
        }
        answer["latency"] = self._shares().get(policy_key(policy))
        try:
            answer["layers"] = layers(self.network(), Policy.from_json(policy))
        except TightropeError as error:
            answer["problem"] = _text(str(error))
        except OSError as error:
            answer["problem"] = f"network.json cannot be read ({error.strerror}), so the policy stands here without its layers"
        return answer

    def _shares(self) -> dict[str, dict[str, float]]:
        """Latencies by layer, by the key of their policy; empty where the search kept none."""
        try:
            with _open_inside(self.folder / SHARES, self._root) as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_size)
                if self._by_layer is None or self._by_layer[0] != stamp:
                    found = {}
                    for line in file.read(_LONGEST).splitlines():
                        try:
                            record = json.loads(line)
                            shares = {_text(name): _number(value) for name, value in record["latency_ms"].items()}
                        except (ValueError, LookupError, RecursionError, AttributeError, TypeError):
                            continue
                        found[str(record["policy"])] = {name: value for name, value in shares.items() if value >= 0}
                    self._by_layer = (stamp, found)
                return self._by_layer[1]
        except OSError:
            return {}

    def line(self, index: int) -> dict[str, Any]:
        """The journal's line of a record."""
        with _open_inside(self.folder / JOURNAL, self._root) as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            value = json.loads(line, parse_constant=lambda _: None)  # a browser reads no NaN
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RunError(f"the journal of run {self.name!r} has changed under its reader; reload")
        return value

    def network(self) -> Network:
        """The network of the run, read once as long as the file stays the same."""
        with _open_inside(self.folder / "network.json", self._root) as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_mtime_ns, status.st_size)
            if self._network is None or self._network[0] != stamp:
                try:
                    value = json.loads(file.read())
                except ValueError as error:
                    raise RunError(f"network.json of run {self.name!r} is not JSON: {error}") from None
                self._network = (stamp, Network.from_json(value, "network.json"))
            return self._network[1]


class LogFolder:
    """All runs below one log folder or several. A run is asked for by its id, so no path ever comes from a request."""

    def __init__(self, roots: Iterable[tuple[str, Path]]) -> None:
        """Each root with the name that its runs' names begin with; it may be empty."""
        self._roots = list(roots)
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._next_scan = 0.0

    def runs(self) -> list[Run]:
        """The runs in the order of their names. Folders are looked for anew every other second; links are not followed."""
        with self._lock:
            if time.monotonic() >= self._next_scan:
                start = time.monotonic()
                self._scan()
                end = time.monotonic()
                self._next_scan = end + max(_RESCAN_SECONDS, 10 * (end - start))  # a large tree is walked less often
            return sorted(self._runs.values(), key=lambda run: run.name)

    def run(self, identifier: str) -> Run:
        """The run of this id."""
        for run in self.runs():
            if run.id == identifier:
                return run
        raise RunError("no such run in the log folder")

    def _scan(self) -> None:
        found: dict[str, Run] = {}
        for group, given in self._roots:
            root = Path(os.path.realpath(given))
            for folder in _journal_folders(root):
                run = Run(folder, root, _shown(given, folder.relative_to(root)), group)
                found.setdefault(run.id, self._runs.get(run.id, run))
        self._runs = found


def open_run(folder: Path) -> Run:
    """The run in this folder, read to its end."""
    real = Path(os.path.realpath(folder))
    run = Run(real, real, _shown(folder, Path()))
    if not (real / JOURNAL).is_file():
        raise RunError(f"{folder} is no run folder: it holds no {JOURNAL}; name the folder that `tightrope search` wrote")
    run.refresh()
    if not run.study:
        raise RunError(f"{folder / JOURNAL} has no study line to begin with; it is torn or was not written by Tightrope")
    return run


def pack(parts: Iterable[tuple[dict[str, Any], bytes]]) -> bytes:
    """Parts of runs as one message: length of a JSON list (uint32), the list padded to eight bytes, the columns."""
    parts = list(parts)
    text = json.dumps([header for header, _ in parts]).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return struct.pack("<I", len(text)) + text + b"".join(block for _, block in parts)


def layers(network: Network, policy: Policy) -> list[dict[str, Any]]:
    """A policy layer by layer, with what each costs and would cost dense."""
    policy.check(network)
    widths = policy.all_widths(network)
    rows = []
    for layer in network.layers:
        choice = policy.choice(layer.name)
        now, dense = units_of(layer, choice, widths), units_of(layer, Policy(policy.network).choice(layer.name), network.widths)
        rows.append(
            {
                "name": layer.name, "kind": layer.kind, "kernel": layer.kernel,
                "channels": layer.outputs.at(widths), "of_channels": layer.outputs.at(network.widths),
                "inputs": layer.inputs.at(widths), "of_inputs": layer.inputs.at(network.widths), "groups": layer.outputs.groups,
                "rank": choice.rank, "of_rank": full_rank(layer, choice.form, widths) if choice.rank else None, "form": choice.form,
                "weight_bits": choice.weight_bits, "act_bits": choice.act_bits,
                "macs": sum(u.macs for u in now), "of_macs": sum(u.macs for u in dense),
                "size_bytes": sum(u.size_bytes for u in now), "of_size_bytes": sum(u.size_bytes for u in dense),
            }
        )  # fmt: skip
    return rows


def export_format(device: str) -> str:
    """What `tightrope export --format` takes for a policy of this device."""
    return "onnx" if device == "ort-cpu" else "packed"


def policy_key(policy: object) -> str:
    """Sixteen hexadecimal digits that tell a policy, as JSON, from any other."""
    return hashlib.sha256(json.dumps(policy, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _study(record: dict[str, Any]) -> dict[str, Any]:
    """The study line's fields that are shown, each of the type that it must have."""
    budget = record.get("budget") if isinstance(record.get("budget"), dict) else {}
    assert isinstance(budget, dict)
    limits = budget.get("limits") if isinstance(budget.get("limits"), dict) else {}
    assert isinstance(limits, dict)
    text = budget.get("text") if isinstance(budget.get("text"), list) else [budget.get("text", "")]
    floor, started = _number(budget.get("floor")), _number(record.get("started"))
    return {
        **{key: _text(str(record.get(key, ""))) for key in ("name", "network", "device", "agent", "seed", "metric")},
        "simulated": record.get("simulated") is True,
        "started": None if math.isnan(started) else started,
        "budget": [_text(str(part)) for part in text or []],
        "limits": {name: _number(limits[name]) for name in COSTS if name in limits and math.isfinite(_number(limits[name]))},
        "floor": None if math.isnan(floor) else floor,
    }


def _number(value: object) -> float:
    """A finite number as it is; anything else is missing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _NAN
    try:
        number = float(value)
    except OverflowError:
        return _NAN
    return number if math.isfinite(number) else _NAN


def _text(value: str) -> str:
    """Text without lone surrogates (names of files that are not UTF-8)."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _little(column: Sequence[float]) -> bytes:
    values = array("d", column)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _shown(given: Path, inside: Path) -> str:
    """A run's path as a user would type it."""
    text = str(given / inside)
    return f"./{text}" if text.startswith("-") else text


def _journal_folders(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        if JOURNAL in files and not (Path(folder) / JOURNAL).is_symlink():
            yield Path(folder)


def _open_inside(path: Path, root: Path) -> BinaryIO:
    """Open a regular file whose real path lies below `root` and has no link in it; anything else is not found."""
    real = Path(os.path.realpath(path))
    if real != path or not real.is_relative_to(root):
        raise FileNotFoundError(2, "not inside the log folder", str(path))
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(2, "not a file", str(path))
    return os.fdopen(descriptor, "rb")
