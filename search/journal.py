"""The one record of a search: `trials.jsonl`, one JSON object a line, only ever appended to."""

import errno
import fcntl
import json
import os
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tightrope.search.trial import Trial, bits
from tightrope.spaces.cost import Cost, Score
from tightrope.spaces.errors import FormatError, RunError
from tightrope.spaces.fields import Fields, parse
from tightrope.spaces.policy import Policy

VERSION = 1
NAME = "trials.jsonl"
_SYNC_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Header:
    """What a search is about; the first line of its journal.

    `network` is the network's fingerprint. `budget` is the budget's text, `limits` the same in absolute numbers and `floor` the
    points below dense that must be kept, if any. `workers` counts the trials that are under way at once. `started` is Unix time.
    `stopping` is the error rate at which trials are given up early (0: never), `right` what the dense model has right (see
    `Trial`).
    """

    name: str
    network: str
    device: str
    simulated: bool
    budget: tuple[str, ...]
    limits: tuple[tuple[str, float], ...]
    floor: float | None
    agent: str
    seed: int
    metric: str
    dense: Policy
    dense_score: Score
    dense_cost: Cost
    workers: int = 1
    trials: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    started: float = 0.0
    stopping: float = 0.0
    right: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "study", "version": VERSION, "name": self.name, "network": self.network, "device": self.device,
            "simulated": self.simulated,
            "budget": {"text": [*self.budget], "limits": dict(self.limits), "floor": self.floor},
            "agent": self.agent, "seed": self.seed, "metric": self.metric,
            "dense": {"policy": self.dense.to_json(), "score": self.dense_score.to_json(), "cost": self.dense_cost.to_json()},
            "workers": self.workers, "trials": self.trials, "settings": dict(self.settings), "started": self.started,
            "stopping": self.stopping, **({} if self.right is None else {"right": b64encode(self.right).decode()}),
        }  # fmt: skip

    @staticmethod
    def from_json(f: Fields) -> "Header":
        f.version(VERSION)
        budget, dense = Fields(f.take("budget", dict), f"{f.where}.budget"), Fields(f.take("dense", dict), f"{f.where}.dense")
        texts = budget.take("text", list)
        limits = Fields(budget.take("limits", dict), f"{budget.where}.limits")
        if not all(isinstance(text, str) for text in texts):
            raise FormatError(f"{budget.where}.text must be a list of texts, got {texts!r}")
        return Header(
            f.take("name", str), f.take("network", str), f.take("device", str), f.take("simulated", bool), tuple(texts),
            tuple((metric, limits.take(metric, float)) for metric, _ in budget.items("limits")),
            budget.take("floor", (float, type(None))), f.take("agent", str), f.take("seed", int), f.take("metric", str),
            Policy.from_json(dense.take("policy", dict), f"{dense.where}.policy"),
            Score.from_json(dense.take("score", dict), f"{dense.where}.score"),
            Cost.from_json(dense.take("cost", dict), f"{dense.where}.cost"),
            f.take("workers", int, 1), f.take("trials", int, 0), f.take("settings", dict, {}), f.take("started", float),
            f.take("stopping", float, 0.0), bits(f),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Control:
    """A policy that stands beside the search: `dense`, `uniform`, `random` or `recipe`."""

    name: str
    policy: Policy
    cost: Cost
    score: Score

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "control", "name": self.name, "policy": self.policy.to_json(), "cost": self.cost.to_json(),
            "score": self.score.to_json(),
        }  # fmt: skip

    @staticmethod
    def from_json(f: Fields) -> "Control":
        return Control(
            f.take("name", str), Policy.from_json(f.take("policy", dict), f"{f.where}.policy"),
            Cost.from_json(f.take("cost", dict), f"{f.where}.cost"), Score.from_json(f.take("score", dict), f"{f.where}.score"),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Final:
    """What became of a trial of the front: its score after fine-tuning and its measured cost as a ratio to dense.

    `measured` is the ratio with the ends of its interval, None where nothing was measured.
    """

    number: int
    score: Score
    cost: Cost
    measured: tuple[float, float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        measured = None if self.measured is None else dict(zip(("ratio", "low", "high"), self.measured, strict=True))
        return {
            "kind": "final", "number": self.number, "score": self.score.to_json(), "cost": self.cost.to_json(),
            "measured": measured,
        }  # fmt: skip

    @staticmethod
    def from_json(f: Fields) -> "Final":
        found = f.take("measured", (dict, type(None)))
        measured = None
        if found is not None:
            m = Fields(found, f"{f.where}.measured")
            measured = (m.take("ratio", float), m.take("low", float), m.take("high", float))
        return Final(
            f.take("number", int), Score.from_json(f.take("score", dict), f"{f.where}.score"),
            Cost.from_json(f.take("cost", dict), f"{f.where}.cost"), measured,
        )  # fmt: skip


Line = Trial | Control | Final
_KINDS = {"trial": Trial.from_json, "control": Control.from_json, "final": Final.from_json}


@dataclass(frozen=True)
class Record:
    """What a journal holds; trials in the order of their numbers. `torn` counts the bytes of an unfinished last line."""

    header: Header
    trials: tuple[Trial, ...] = ()
    controls: tuple[Control, ...] = ()
    finals: tuple[Final, ...] = ()
    torn: int = 0


def read(path: Path) -> Record:
    """Read a journal, or the one in a run folder.

    A last line without its end is what a killed writer leaves: it is left out and counted. Any other line that cannot be read
    raises `FormatError` with file, line and field; a journal that is missing or without its first line raises `RunError`.
    """
    path = path / NAME if path.is_dir() else path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"there is no search in {path.parent}: {path.name} is missing") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    *whole, torn = data.split(b"\n")
    if not whole:
        raise RunError(f"{path} holds no search: its first line was never finished; start the search again")
    header, lines = Header.from_json(_object(whole[0], path, 1, "study")), []
    for i, text in enumerate(whole[1:], 2):
        f = _object(text, path, i, *_KINDS)
        lines.append(_KINDS[f.take("kind", str)](f))
    trials = [line for line in lines if isinstance(line, Trial)]
    numbers = [t.number for t in trials]
    twice = sorted({k for k in numbers if numbers.count(k) > 1}) if len(set(numbers)) < len(numbers) else []
    if twice:
        raise FormatError(f"{path} holds trial {twice[0]} more than once")
    return Record(
        header,
        tuple(sorted(trials, key=lambda t: t.number)),
        tuple(line for line in lines if isinstance(line, Control)),
        tuple(line for line in lines if isinstance(line, Final)),
        len(torn),
    )


def _object(text: bytes, path: Path, line: int, *kinds: str) -> Fields:
    where = f"{path}:{line}"
    try:
        f = parse(text.decode(), where)
    except UnicodeDecodeError:
        raise FormatError(f"{where} is not UTF-8 text") from None
    if f.take("kind", str) not in kinds:
        raise FormatError(f"{where}.kind must be {' or '.join(kinds)}, got {f.take('kind', str)!r}")
    return f


class Journal:
    """The journal of a run folder, open for appending; one at a time.

    A line is handed to the system before `append` returns, so that killing this process loses nothing, and is forced to the
    disk within `_SYNC_SECONDS` of the next line, and at `close`.
    """

    def __init__(self, folder: Path) -> None:
        """Open, and create if need be, the journal of `folder`; `RunError` if another process has it open."""
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        # The lock belongs to the open file and not to a name, so a killed driver leaves none behind.
        self._file: IO[bytes] = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RunError(f"{folder} is in use by another search; wait for it or choose another folder") from None
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def empty(self) -> bool:
        """Whether the journal has no finished line."""
        return b"\n" not in self.path.read_bytes()

    def mend(self) -> int:
        """Cut off what a killed writer left of an unfinished last line; the number of bytes cut."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._file.fileno(), end)
        return len(data) - end

    def append(self, *lines: Header | Line) -> None:
        """Add lines. If the disk is full, `RunError`, and what was half written is taken back."""
        data = b"".join(json.dumps(line.to_json(), separators=(",", ":")).encode() + b"\n" for line in lines)
        before = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise self._undone(error, before) from error

    def sync(self) -> None:
        """Force what was appended to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Force everything to the disk and let others open the journal."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _undone(self, error: OSError, size: int) -> RunError:
        os.ftruncate(self._file.fileno(), size)
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        return RunError(f"{self.path} cannot be written: {what}; what was told before is kept, make room and resume")
