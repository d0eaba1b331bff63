"""Devices that are elsewhere: ONNX Runtime on another machine, costed from a table whose nodes were timed there."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tightrope.estimators.cache import store
from tightrope.estimators.measured import job as jobs
from tightrope.estimators.measured.base import alone, digest, mark_of
from tightrope.estimators.measured.fitted import Progress
from tightrope.estimators.measured.layouts import BLOCKS
from tightrope.estimators.measured.ort import OrtCpu, Source
from tightrope.estimators.measured.table import Table
from tightrope.spaces.errors import DeviceError, FormatError
from tightrope.spaces.fields import parse
from tightrope.spaces.network import Network
from tightrope.spaces.space import Space

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Report:
    """What an imported table is worth: relative errors of nets left out of their fit, and of nets that no fit saw."""

    where: str
    nodes: int
    left_out: tuple[float, ...]
    held_out: tuple[float, ...]


class Imported(OrtCpu):
    """ONNX Runtime on another machine; `prepare` opens the table that `import_results` made for the network and space."""

    def __init__(self, name: str, batch: int = 1) -> None:
        super().__init__(batch)
        self.name, self._isa = name, ""
        self.notes = (f"times are from the tables in {store() / name}; nothing is measured here", *OrtCpu.notes)

    def prepare(
        self, network: Network, space: Space, source: Source, *, cache: Path | None = None, progress: Progress | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Open the table.

        Raises:
            DeviceError: the device has none for this network, space and batch size.
        """
        marks = [mark_of(network, space, self.batch, {**self.versions, "isa": isa}) for isa in BLOCKS]
        paths = [path for mark in marks if (path := store() / self.name / f"{digest(mark)}.jsonl").exists()]
        if not paths:
            raise DeviceError(
                f"device {self.name!r} has no table for network {network.fingerprint} in this space at batch {self.batch}; write a "
                f"job with `tightrope devices probe`, run it there, and add it with `tightrope devices import {self.name}`"
            )
        of = _fingerprint(paths[0])
        self._isa = of["isa"]
        self.open(network, space, source, paths[0], of, here=False)

    @property
    def isa(self) -> str:
        """The instruction set of the device."""
        return self._isa


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        first = file.readline().decode("utf-8", errors="replace")
    try:
        found: dict[str, Any] = parse(first, f"{path} line 1").take("fingerprint", dict)
    except FormatError as error:
        raise DeviceError(f"{error}; the table is damaged: move it away and import the results again") from None
    return found


def keep_job(data: str) -> Path:
    """Keep a job that was written, for when its results come back."""
    path = store() / "jobs" / (jobs.read(data.encode(), "job").digest + ".job")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data, encoding="utf-8")
    return path


def import_results(name: str, results: Path, job: Path | None = None) -> Report:
    """Make a table of device `name` from what `runner.py` wrote.

    Args:
        job: the job that was run; without it, the one that `tightrope devices probe` kept.

    Raises:
        DeviceError: results that cannot be believed, or a table that is there already. Nothing is then stored or changed.
    """
    if not _NAME.fullmatch(name):
        raise DeviceError(f"a device's name must be letters, digits, points, dashes and underscores, got {name!r}")
    found = _job(results, job)
    machine, rows = jobs.results(results, found)
    if machine["onnxruntime"] != found.mark["onnxruntime"]:
        raise DeviceError(
            f"{results} is from onnxruntime {machine['onnxruntime']}, and the job has the graphs of "
            f"{found.mark['onnxruntime']}: install that version on the device and run the job again"
        )
    path = store() / name / f"{digest(found.mark)}.jsonl"
    with alone(path):
        if path.exists():
            raise DeviceError(f"device {name!r} already has this table, {path}; take another name, or move it away")
        beside = path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        jobs.fill(Table(beside, machine | found.mark), found, rows)
        report = _report(found.network, int(found.mark["batch"]), name, beside)
        beside.replace(path)
    return report


def _job(results: Path, job: Path | None) -> jobs.Job:
    if job is None:
        try:
            first = results.open("rb").readline().decode("utf-8", errors="replace")
            job = store() / "jobs" / (parse(first.removeprefix("#"), f"{results} line 1").take("job", str) + ".job")
        except OSError as error:
            raise DeviceError(f"{results} cannot be read: {error.strerror}") from None
        except FormatError as error:
            raise DeviceError(f"{error}; the file must begin as runner.py writes it") from None
        if not job.exists():
            raise DeviceError(f"the job of {results} was not written here; pass it with --job")
    try:
        return jobs.read(job.read_bytes(), str(job))
    except OSError as error:
        raise DeviceError(f"{job} cannot be read: {error.strerror}") from None


def _report(network: Network, batch: int, name: str, path: Path) -> Report:
    of = _fingerprint(path)
    device = Imported(name, batch)
    fitted = device.open(network, Space.build(network, device.pairs), None, path, of, here=False)
    nodes = sum(len(family.exact) for family in fitted.table.families.values())
    return Report(f"{of['processor']}, onnxruntime {of['onnxruntime']}", nodes, fitted.errors, tuple(fitted.held_errors()))


def reports(name: str) -> Iterator[Report]:
    """What each table of a device is worth. Its network is read from the job that is kept in the table."""
    for path in sorted((store() / name).glob("*.jsonl")):
        of = _fingerprint(path)
        table = Table(path, of)
        yield _report(Network.from_json(table.notes["network"], str(path)), int(of["batch"]), name, path)


def mape(errors: Sequence[float]) -> float:
    """Mean absolute error in percent."""
    return 100 * float(np.mean(np.abs(errors))) if errors else 0.0


def within(errors: Sequence[float]) -> float:
    """Percent of the errors that are at most 10 %."""
    return 100 * float(np.mean(np.abs(errors) <= 0.1)) if errors else 0.0
