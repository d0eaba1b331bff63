"""A latency table for a device that is elsewhere: the job that is sent there, and the results that come back.

A job is JSON, one object a line: a head, the network, the patterns of its space, the families of nodes, then models to time. A
model is ONNX, compressed: its constants are all alike, so that a few hundred bytes hold it. `runner.py` times them.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tightrope.estimators.encode import Encoder
from tightrope.estimators.measured import nodes as one_node
from tightrope.estimators.measured.fitted import Progress, survey
from tightrope.estimators.measured.ort import OrtRuntime, Source
from tightrope.estimators.measured.runner import COLUMNS, STEADY, VERSION
from tightrope.estimators.measured.sampling import EMPTY, REFERENCE, mixed
from tightrope.estimators.measured.table import Table, identity
from tightrope.estimators.threads import one_blas_thread
from tightrope.spaces.errors import DeviceError, FormatError
from tightrope.spaces.fields import Fields, parse
from tightrope.spaces.network import Network
from tightrope.spaces.policy import unique
from tightrope.spaces.space import Space

NETS, HELD = 24, 12  # mixed nets to fit, and to say how good the fit is


@one_blas_thread()
def write(
    network: Network, space: Space, source: Source, encode: Encoder, mark: Mapping[str, Any], progress: Progress | None = None,
    *, seed: int = 0,
) -> list[str]:  # fmt: skip
    """The lines of the job that covers a space, at the batch size and for the instruction set of `mark`, which tells the table from
    others of a device; `progress` is called with the models written and those to write."""
    rng = np.random.default_rng(seed)
    designs, patterns = survey(space, OrtRuntime(network, source, int(mark["batch"]), mark["isa"]), encode, rng)
    policies = unique(mixed(space, rng, 2 * (NETS + HELD)))[: NETS + HELD]
    steady = [("reference", one_node.model(*key)) for key in REFERENCE] + [("empty", one_node.model(*EMPTY))]
    whole = len(steady) + 1 + sum(len(design.keys) for design in designs.values()) + len(policies)
    models: list[dict[str, Any]] = []

    def add(role: str, model: onnx.ModelProto, **more: Any) -> None:
        packed = pack(model.SerializeToString())
        models.append({"id": len(models), "role": role, "optimise": role in ("net", "held", "dense"), "model": packed, **more})
        if progress is not None:
            progress(len(models), whole)

    for role, model in steady:
        add(role, model)
    add("dense", blank(source.model(space.dense, int(mark["batch"]))))
    for family, design in designs.items():
        for sizes in design.keys:
            add("node", one_node.model(family, sizes), node=identity(family), sizes=[*sizes])
    for index, policy in enumerate(policies):
        model = blank(source.model(policy, int(mark["batch"])))
        add("net" if index < NETS else "held", model, policy=json.dumps(policy.to_json(), sort_keys=True))
    lines: list[Mapping[str, Any]] = [
        {"tightrope": "probe job", "version": VERSION, "mark": dict(mark), "models": len(models)},
        {"network": network.to_json()}, {"patterns": patterns.to_json()},
        *({"family": f, "axes": [[a.column, a.rule, [*a.values]] for a in d.axes]} for f, d in designs.items()), *models,
    ]  # fmt: skip
    return [json.dumps(line, separators=(",", ":")) + "\n" for line in lines]


def pack(model: bytes) -> str:
    """A serialised model as text. Compressed twice: deflate makes a thousandth of a constant, which then repeats itself."""
    return base64.b64encode(zlib.compress(zlib.compress(model), 9)).decode()


def blank(model: onnx.ModelProto | bytes) -> onnx.ModelProto:
    """A model whose large floating-point and 8-bit constants are all alike, which compress to nothing and take the same time."""
    copy = onnx.ModelProto.FromString(model if isinstance(model, bytes) else model.SerializeToString())
    for tensor in copy.graph.initializer:
        if len(tensor.raw_data) > 64 and tensor.data_type != onnx.TensorProto.INT64:
            array = onnx.numpy_helper.to_array(tensor)
            value = 0 if array.dtype.kind in "iu" else float(np.median(np.abs(array))) or 1.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(array, value), tensor.name))
    return copy


@dataclass(frozen=True, eq=False)
class Job:
    """A job as it was read: `digest` tells it from any other; `models` are by number, without the models themselves."""

    digest: str
    mark: dict[str, Any]
    network: Network
    patterns: Mapping[str, Any]
    families: tuple[dict[str, Any], ...]
    models: dict[int, Fields]


def read(data: bytes, where: str) -> Job:
    """Read a job.

    Raises:
        DeviceError: it is none, or torn.
    """
    try:
        lines = [parse(text, f"{where} line {i}") for i, text in enumerate(data.decode().splitlines(), start=1)]
        if len(lines) < 3 or lines[0].take("tightrope", str, "") != "probe job":
            raise FormatError(f"{where} is no probe job")
        lines[0].version(VERSION)
        models = {f.take("id", int): f for f in lines[3:] if f.take("role", str, "")}
        if len(models) != lines[0].take("models", int):
            raise FormatError(f"{where} must have {lines[0].take('models', int)} models, got {len(models)}: it was cut short")
        families = tuple(
            {"family": f.take("family", str), "axes": f.take("axes", list)} for f in lines[3:] if f.take("family", str, "")
        )  # fmt: skip
        return Job(
            hashlib.sha256(data).hexdigest()[:16], lines[0].take("mark", dict),
            Network.from_json(lines[1].take("network", dict), f"{where}: network"), lines[2].take("patterns", dict),
            families, models,
        )  # fmt: skip
    except (FormatError, UnicodeDecodeError) as error:
        raise DeviceError(f"{error}; write the job again with `tightrope devices probe`") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One timed model: its number, samples in milliseconds, and beside them the reference's, an empty call's, the dense net's."""

    model: int
    samples: tuple[float, ...]
    reference_ms: float
    empty_ms: float
    dense_ms: float


def results(path: Path, job: Job) -> tuple[dict[str, Any], list[Row]]:
    """Read what the runner wrote: where it ran, and a row for every model of the job.

    Raises:
        DeviceError: the results are of another job, torn, incomplete, doubled, or no times; the message names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from None
    lines = data.decode("utf-8", errors="replace").splitlines()
    try:
        head = parse(lines[0].removeprefix("#") if lines and lines[0].startswith("#") else "", f"{path} line 1")
        head.version(VERSION)
        of = head.take("job", str)
        machine = {key: head.take(key, (str, int)) for key in ("processor", "onnxruntime", "system", "threads")}
    except FormatError as error:
        raise DeviceError(f"{error}; the file must begin as runner.py writes it") from None
    if of != job.digest:
        raise DeviceError(f"{path} has the results of job {of}, not of {job.digest}; pass the job that was run with --job")
    if lines[1:2] != [COLUMNS]:
        raise DeviceError(f"{path} line 2 must be {COLUMNS!r}, got {lines[1] if len(lines) > 1 else ''!r}")
    if not data.endswith(b"\n"):
        raise DeviceError(f"{path} line {len(lines)} is torn: the runner was stopped; start it again and it goes on")
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines[2:], start=3):
        row = _row(line, f"{path} line {number}")
        if row.model not in job.models or job.models[row.model].take("role", str) in STEADY:
            raise DeviceError(f"{path} line {number}: id must be that of a model to time, got {row.model}")
        if row.model in rows:
            raise DeviceError(f"{path} line {number}: model {row.model} is there twice; keep one of its lines")
        rows[row.model] = row
    wanted = [i for i, f in job.models.items() if f.take("role", str) not in STEADY]
    missing = [i for i in wanted if i not in rows]
    if missing:
        raise DeviceError(
            f"{path} must have a line for each of {len(wanted)} models, but {len(missing)} are missing, {missing[0]} first; "
            "start the runner again and it goes on"
        )
    return machine, [rows[i] for i in wanted]


def _row(line: str, where: str) -> Row:
    parts = line.split(",")
    try:
        if len(parts) != len(COLUMNS.split(",")):
            raise ValueError
        model, (reference, empty, dense) = int(parts[0]), map(float, parts[1:4])
        samples = tuple(map(float, parts[4].split()))
    except ValueError:
        raise DeviceError(f"{where} must be {COLUMNS} with numbers, got {line[:80]!r}") from None
    times = (*samples, reference, empty, dense)
    if not samples or not all(math.isfinite(x) for x in times) or min(times) < 0 or reference == 0 or dense <= empty:
        raise DeviceError(f"{where}: times must be finite and not below zero, got {line[:80]!r}")
    return Row(model, samples, reference, empty, dense)


def fill(table: Table, job: Job, rows: Sequence[Row]) -> None:
    """Put the results of a job into a new table."""
    names = {identity(f["family"]): f["family"] for f in job.families}
    table.declare_axes({f["family"]: f["axes"] for f in job.families})
    for row in rows:
        entry, samples = job.models[row.model], np.array(row.samples)[:, None]
        role = entry.take("role", str)
        if role == "node":
            table.add([(names[entry.take("node", str)], entry.ints("sizes"))], samples, row.reference_ms, row.empty_ms)
        else:
            name = entry.take("policy", str)
            table.add_nets([name], samples, row.reference_ms, row.empty_ms, row.dense_ms, held=role == "held")
    table.note("network", job.network.to_json())
    table.note("patterns", job.patterns)
    table.finish()
