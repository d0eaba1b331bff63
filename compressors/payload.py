"""What a compressed model consists of, as arrays: the same payload becomes a torch module, an ONNX graph or a packed file."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit

Float = NDArray[np.float32]
Range = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One unit of a layer (low-rank layers have two or three) with its tensors.

    `weight` is float32, `out x in/groups x kh x kw` for convolutions and `out x in` for linear layers; below 32 weight bits it
    equals `codes * scales` along the output channel. `codes` are int8 and symmetric. `act_range` is the range `(low, high)`
    of the part's own input at its activation bits, None where it reads floating point.
    """

    unit: Unit
    weight: Float
    bias: Float | None = None
    codes: NDArray[np.int8] | None = None
    scales: Float | None = None
    act_range: Range | None = None


@dataclass(frozen=True)
class Payload:
    """All layers' parts, the ranges of all points (`spaces/points.py`) and the parameters outside the layers."""

    policy: Policy
    parts: Mapping[str, tuple[Part, ...]]
    ranges: Mapping[str, Range]
    parameters: Mapping[str, Float]


def affine(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of unsigned codes in [0, 2^bits) that span `[min(low, 0), max(high, 0)]`; zero is exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = float(np.float32(max(high - low, 1e-12) / levels))
    return scale, int(min(max(round(-low / scale), 0), levels))
