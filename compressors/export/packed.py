"""Packed safetensors: every weight at its true bits, for what ONNX Runtime cannot run. This file is what "size" means.

Tensors, `L` a layer and `p` the number of its part:

    L.p.codes     uint8   codes of `weight_bits` bits each, offset by 2^(bits-1), little-endian bit stream
    L.p.scales    float32 one for each output channel
    L.p.weight    float32 in place of both, at 32 bits
    L.p.bias      float32 where the part has one
    L.p.input     float32 scale and zero point of what it reads, below 32 activation bits
    P             float32 every parameter outside of the layers

The metadata holds the policy and the shape and bits of every part as JSON; reading executes nothing. Where the file is to run
(`compressors/runtime/load.py`), it also holds the graph, and the ranges of points and of the inputs of parts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tightrope.compressors.kernels import pack_bits, unpack_bits
from tightrope.compressors.payload import Payload, affine
from tightrope.spaces.errors import FormatError
from tightrope.spaces.fields import parse
from tightrope.spaces.policy import Policy, write_atomically

VERSION = "1"


def write_packed(
    payload: Payload, path: Path, more: Mapping[str, str] | None = None, constants: Mapping[str, NDArray[Any]] | None = None
) -> int:
    """Write a payload, with `more` metadata and `constants` beside it.

    Returns:
        The bytes of the payload's tensors, which equal `spaces.unit.size_bytes` of the policy.
    """
    tensors: dict[str, NDArray[Any]] = {}
    shapes: dict[str, list[int]] = {}
    for layer, parts in payload.parts.items():
        for part in parts:
            key, bits = f"{layer}.{part.unit.part}", part.unit.weight_bits
            shapes[key] = [bits, *part.weight.shape]
            if part.codes is None or part.scales is None:
                tensors[f"{key}.weight"] = part.weight
            else:
                offset = (part.codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).reshape(-1)
                tensors[f"{key}.codes"], tensors[f"{key}.scales"] = pack_bits(offset, bits), part.scales
            if part.bias is not None:
                tensors[f"{key}.bias"] = part.bias
            if part.act_range is not None:
                scale, zero = affine(*part.act_range, part.unit.act_bits)
                tensors[f"{key}.input"] = np.array([scale, zero], np.float32)
    tensors |= dict(payload.parameters)
    metadata = {"tightrope": VERSION, "policy": json.dumps(payload.policy.to_json()), "parts": json.dumps(shapes), **(more or {})}
    write_atomically(path, save({k: np.ascontiguousarray(v) for k, v in {**tensors, **(constants or {})}.items()}, metadata))
    return sum(v.nbytes for v in tensors.values())


def read_packed(path: Path) -> tuple[Policy, dict[str, NDArray[np.float32]]]:
    """The policy and the weights of every part, decoded to float32, of a packed file; biases and parameters as they are.

    Raises:
        FormatError: the file is no packed model, or what it says of itself does not fit its tensors.
    """
    tensors, metadata = read_tensors(path)
    policy = Policy.from_json(parse(metadata.get("policy", ""), f"{path}: policy"))
    decoded: dict[str, NDArray[np.float32]] = {}
    for key, found in _pairs(metadata.get("parts", ""), str(path)):
        bits, *shape = found
        count = int(np.prod(shape))
        if f"{key}.codes" in tensors:
            packed = tensors.pop(f"{key}.codes")
            if packed.size != -(-count * bits // 8):
                raise FormatError(f"{path}: {key}.codes must hold {-(-count * bits // 8)} bytes, got {packed.size}")
            codes = unpack_bits(packed, bits, count).astype(np.float32) - 2 ** (bits - 1)
            scales = tensors.pop(f"{key}.scales")
            decoded[f"{key}.weight"] = codes.reshape(shape) * scales.reshape(-1, *[1] * (len(shape) - 1))
    return policy, {**tensors, **decoded}


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a packed file as they are, and its metadata.

    Raises:
        FormatError: the file is no packed model.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a safetensors file: {error}") from None
    if metadata.get("tightrope") != VERSION:
        raise FormatError(f"{path} must be a packed model of version {VERSION}, got {metadata.get('tightrope')!r}")
    return tensors, metadata


def _pairs(text: str, where: str) -> list[tuple[str, list[int]]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{where}: parts is not JSON: {error.msg}") from None
    pairs = []
    for key, value in found.items():
        if not isinstance(value, list) or len(value) < 3 or not all(isinstance(v, int) and v > 0 for v in value):
            raise FormatError(f"{where}: parts.{key} must be a list of bits and sizes, got {value!r}")
        pairs.append((key, value))
    return pairs
