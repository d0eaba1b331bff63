"""Packed files that run: `save` puts graph and ranges beside the packed weights, `load` makes the module of them."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from tightrope.compressors.export.packed import read_tensors, write_packed
from tightrope.compressors.kernels import unpack_bits
from tightrope.compressors.payload import Part, Payload, Range
from tightrope.compressors.prepare import Prepared
from tightrope.compressors.runtime.build import executable
from tightrope.compressors.runtime.graph import Graph
from tightrope.compressors.runtime.lower import Lowering
from tightrope.spaces.errors import ExportError, FormatError
from tightrope.spaces.fields import parse
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit, units_of

CONSTANT = "constant:"


def save(prepared: Prepared, payload: Payload, path: Path) -> None:
    """Write a payload so that `load` can run it.

    Raises:
        ExportError: the policy has bits that do not run in torch, or the model an operator that cannot be written down.
    """
    if prepared.traced is None:
        raise ExportError("these prepared arrays carry no graph; prepare the model again to export it")
    graph = Graph.of(prepared.traced)
    Lowering(graph).lower(payload.policy)
    inner = {f"{n}.{p.unit.part}": p.act_range for n, parts in payload.parts.items() for p in parts[1:] if p.act_range is not None}
    more = {"graph": json.dumps(graph.to_json()), "ranges": json.dumps({**payload.ranges, **inner})}
    constants = {CONSTANT + name: np.ascontiguousarray(value.numpy()) for name, value in graph.constants.items()}
    write_packed(payload, path, more, constants)


def load(path: str | Path, *, batch: int = 1) -> fx.GraphModule:
    """The module of a file that was exported for `torch-cpu`; nothing that the file says is executed but operators of torch's.

    Args:
        batch: the batch size that it is built to be fast at; it runs at any.

    Raises:
        FormatError: the file is none of these, or what it says of itself does not fit its tensors.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if "graph" not in metadata:
        raise FormatError(f'{path} holds weights but no graph; export it with device="torch-cpu" to load it')
    constants = {k.removeprefix(CONSTANT): torch.from_numpy(v) for k, v in tensors.items() if k.startswith(CONSTANT)}
    graph = Graph.from_json(metadata["graph"], constants, f"{path}: graph")
    policy = Policy.from_json(parse(metadata.get("policy", ""), f"{path}: policy"))
    policy.check(graph.network)
    ranges = _ranges(metadata.get("ranges", ""), f"{path}: ranges")
    widths = policy.all_widths(graph.network)
    parts = {}
    for layer in graph.network.layers:
        units = units_of(layer, policy.choice(layer.name), widths)
        parts[layer.name] = tuple(_part(unit, tensors, ranges, str(path)) for unit in units)
    parameters = {}
    for known in graph.network.parameters:
        shape = tuple(extent.at(widths) for extent in known.shape)
        parameters[known.name] = _tensor(tensors, known.name, shape, str(path))
    payload = Payload(policy, parts, ranges, parameters)
    lowering = Lowering(graph)
    missing = {name for step in lowering.lower(policy).steps for name in (step.x, step.y) if name} - ranges.keys()
    if missing:
        raise FormatError(f"{path}: ranges must have {sorted(missing)[0]!r}, which is held in 8 bits")
    return executable(graph, payload, batch=batch, lowering=lowering)


def _part(unit: Unit, tensors: Mapping[str, NDArray[Any]], ranges: Mapping[str, Range], where: str) -> Part:
    key, out = f"{unit.layer}.{unit.part}", unit.out_channels
    each = unit.in_channels // unit.groups
    shape = (out, each) if unit.kind == "linear" else (out, each, *unit.kernel)
    bias = _tensor(tensors, f"{key}.bias", (out,), where) if unit.bias else None
    if unit.weight_bits == 32:
        return Part(unit, _tensor(tensors, f"{key}.weight", shape, where), bias)
    count, bits = prod(shape), unit.weight_bits
    stream = _tensor(tensors, f"{key}.codes", (-(-count * bits // 8),), where, np.uint8)
    codes = (unpack_bits(stream, bits, count).astype(np.int16) - 2 ** (bits - 1)).astype(np.int8).reshape(shape)
    scales = _tensor(tensors, f"{key}.scales", (out,), where)
    weight = codes * scales.reshape(-1, *[1] * (len(shape) - 1))
    return Part(unit, weight.astype(np.float32), bias, codes, scales, ranges.get(key))


def _tensor(
    tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], where: str, kind: type[np.generic] = np.float32
) -> NDArray[Any]:
    found = tensors.get(name)
    if found is None:
        raise FormatError(f"{where}: tensor {name!r} is missing")
    if found.shape != shape or found.dtype != kind:
        raise FormatError(
            f"{where}: {name} must be {np.dtype(kind).name} {list(shape)}, got {found.dtype.name} {list(found.shape)}"
        )
    return found


def _ranges(text: str, where: str) -> dict[str, Range]:
    found = {}
    top = parse(text, where)
    for name in top:
        value = top.take(name, list)
        if len(value) != 2 or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in value):
            raise FormatError(f"{where}.{name} must be two finite numbers, got {value!r}")
        found[name] = float(value[0]), float(value[1])
    return found
