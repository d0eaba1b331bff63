"""Compiled kernels on low-bit codes, over NumPy arrays; `linear` and `ops` put them behind torch.

Importing this loads no torch. Where the compiled module is missing, the NumPy twins in `reference` do the work, which
is said once in the log. `TIGHTROPE_ISA=portable|avx2|avxvnni|avx512|amx` forces one instruction set.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tightrope.compressors.kernels import reference

try:
    from tightrope.compressors import _kernels
except ImportError as error:
    _COMPILED = False
    logging.getLogger(__name__).warning("compiled kernels are missing (%s); the slow NumPy twins are used", error)
else:
    _COMPILED = True

T = TypeVar("T", bound=np.generic)

__all__ = [
    "clip_range",
    "clip_scales",
    "encode",
    "histogram",
    "isa",
    "isas",
    "pack_bits",
    "packed_size_bytes",
    "quantize_per_channel",
    "unpack_bits",
]


def isa() -> str:
    """The instruction set in use: "amx", "avx512", "avxvnni", "avx2", "portable", or "numpy" where nothing is compiled.

    Raises:
        RuntimeError: `TIGHTROPE_ISA` names an instruction set that is unknown or that this machine has not got.
    """
    return _kernels.isa() if _COMPILED else "numpy"


def isas() -> tuple[str, ...]:
    """Every instruction set that this machine runs, the fastest first."""
    return tuple(n for n in ("amx", "avx512", "avxvnni", "avx2", "portable") if _kernels.has_isa(n)) if _COMPILED else ()


def packed_size_bytes(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits take: `ceil(n * bits / 8)`."""
    return (n * _checked_bits(bits) + 7) // 8


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes into a little-endian bit stream, low bits first, exactly `bits` bits a code.

    Args:
        codes: `n` codes in `[0, 2**bits)`.
        bits: 2 to 8.
    Returns:
        `ceil(n * bits / 8)` bytes; unused bits of the last one are zero.
    Raises:
        ValueError: a wrong dtype, shape or width, or a code that does not fit.
    """
    codes = _checked("codes", codes, np.uint8, 1)
    if _checked_bits(bits) < 8 and codes.size and int(codes.max()) >> bits:
        raise ValueError(f"codes must lie in [0, {2**bits}) to be packed at {bits} bits, got {int(codes.max())}")
    if not _COMPILED:
        return reference.pack_bits(codes, bits)
    packed = np.empty(packed_size_bytes(codes.size, bits), np.uint8)
    _kernels.pack_bits(codes, bits, packed)
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.uint8]:
    """The inverse of `pack_bits`.

    Args:
        packed: exactly `ceil(n * bits / 8)` bytes.
        bits: 2 to 8.
        n: number of codes.
    Returns:
        `n` codes in `[0, 2**bits)`.
    """
    packed = _checked("packed", packed, np.uint8, 1)
    if n < 0 or packed.size != packed_size_bytes(n, bits):
        raise ValueError(f"packed must hold ceil(n * bits / 8) bytes, got {packed.size} for n={n}, bits={bits}")
    if not _COMPILED:
        return reference.unpack_bits(packed, bits, n)
    codes = np.empty(n, np.uint8)
    _kernels.unpack_bits(packed, bits, codes)
    return codes


def clip_scales(weight: NDArray[np.float32], bits: Sequence[int], ratios: int = 100, *, isa: str = "") -> NDArray[np.float32]:
    """Per channel and bit-width, the symmetric scale that quantises with the least squared error.

    Clip ratios `1/ratios, 2/ratios, ..., 1` of the channel's largest magnitude are tried; of equals the largest wins.
    The search is exhaustive over that grid (the "MSE" calibration of Nagel et al., arXiv:2106.08295, section 2.3);
    errors are summed in float32, so of two ratios that tie to about 1e-6 either may win.

    Args:
        weight: `channels x n`, finite.
        bits: widths, each 2 to 8; levels are `-(2**(b-1)-1) .. 2**(b-1)-1`.
        ratios: number of clip ratios, 1 to 10,000.
        isa: an instruction set of `isas()`; left empty, the one in use.
    Returns:
        `len(bits) x channels` scales; 1 for a channel of zeros (all magnitudes below 2**-100).
    Raises:
        ValueError: a wrong dtype or shape, or a weight that is NaN or infinite.
    """
    weight = _checked("weight", weight, np.float32, 2)
    widths = [_checked_bits(width) for width in bits]
    if not 1 <= ratios <= 10_000:
        raise ValueError(f"ratios must lie in [1, 10000], got {ratios}")
    if not _COMPILED:
        _refuse_not_finite(weight)
        return reference.clip_scales(weight, widths, ratios)
    scales = np.empty((len(widths), len(weight)), np.float32)
    if not _kernels.clip_scales(weight, np.array(widths, np.int64), ratios, scales, isa):
        _refuse_not_finite(weight)
    return scales


def encode(weight: NDArray[np.float32], scales: NDArray[np.float32], bits: int, *, isa: str = "") -> NDArray[np.int8]:
    """Symmetric codes of weights under given scales: `clamp(round_half_even(w * (1 / scale)))`.

    Args:
        weight: `channels x n`, finite.
        scales: one a channel, positive and finite.
        bits: 2 to 8.
    Returns:
        `channels x n` codes in `[-(2**(bits-1)-1), 2**(bits-1)-1]`.
    """
    weight = _checked("weight", weight, np.float32, 2)
    scales = _checked("scales", scales, np.float32, 1)
    _checked_bits(bits)
    if scales.size != len(weight):
        raise ValueError(f"scales must hold one scale a channel ({len(weight)}), got {scales.size}")
    if not (np.isfinite(scales).all() and (scales >= np.finfo(np.float32).tiny).all()):
        raise ValueError("scales must be positive, finite and not subnormal")
    _refuse_not_finite(weight)
    if not _COMPILED:
        return reference.encode(weight, scales, bits)
    codes = np.empty(weight.shape, np.int8)
    _kernels.encode(weight, scales, bits, codes, isa)
    return codes


def quantize_per_channel(weight: NDArray[np.float32], bits: int, ratios: int = 100) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric per-channel codes, clipped where the squared error is least.

    Args:
        weight: `channels x n`, finite.
        bits: 2 to 8.
        ratios: number of clip ratios tried, see `clip_scales`.
    Returns:
        `channels x n` codes in `[-(2**(bits-1)-1), 2**(bits-1)-1]`, and `channels` scales; a channel of zeros has
        scale 1. `codes * scales[:, None]` stands for the weight.
    Raises:
        ValueError: a wrong dtype or shape, or a weight that is NaN or infinite.
    """
    scales = clip_scales(weight, [bits], ratios)[0]
    return encode(weight, scales, bits), scales


def histogram(
    values: NDArray[np.float32], low: float, high: float, *, bins: int = 2048, into: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Count activations in equal bins of `[low, high]`; what lies outside goes to the end bins.

    Args:
        values: any shape, no NaN.
        low, high: the range, finite, `low < high`.
        bins: number of bins, where `into` is not given.
        into: counts of an earlier batch, added to in place.
    Returns:
        `bins` counts.
    """
    values = _checked("values", np.ravel(values), np.float32, 1)
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"low and high must be finite, low below high, got low={low}, high={high}")
    if into is None and bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    counts = np.zeros(bins, np.int64) if into is None else _checked("into", into, np.int64, 1)
    if into is not None and (counts is not into or not counts.size):
        raise ValueError("into must be contiguous and hold at least one bin")
    nan = (_kernels if _COMPILED else reference).histogram(values, low, high, counts)
    if nan:
        raise ValueError(f"values must hold no NaN, got {nan} of {values.size}")
    return counts


def clip_range(
    counts: NDArray[np.int64],
    low: float,
    high: float,
    method: Literal["percentile", "squared_error", "entropy"],
    *,
    bits: int = 8,
    percentile: float = 99.99,
    ratios: int = 100,
) -> tuple[float, float]:
    """The range to quantise activations in, chosen from their histogram.

    "percentile" leaves `(100 - percentile) / 2` percent out at either end (all of it at the top where nothing is
    negative). "squared_error" and "entropy" try the ranges `[r * low, r * high]` for `r = 1/ratios .. 1` and keep the one
    whose quantisation to `2**bits` levels has the least squared error, or the least Kullback-Leibler divergence from the
    clipped distribution (Migacz, GTC 2017; ranges of fewer bins than levels are not tried).

    Args:
        counts: `bins` counts over `[low, high]`, see `histogram`; not all zero.
        low, high: `low <= 0 <= high`, `low < high`.
    Returns:
        The clipped `(low, high)`, which holds 0.
    """
    counts = _checked("counts", counts, np.int64, 1)
    _checked_bits(bits)
    if not (np.isfinite([low, high]).all() and low <= 0 <= high and low < high):
        raise ValueError(f"low <= 0 <= high and low < high must hold, got low={low}, high={high}")
    if not counts.size or counts.min() < 0 or not counts.any():
        raise ValueError("counts must be non-negative and not all zero")
    if not 1 <= ratios <= 10_000:
        raise ValueError(f"ratios must lie in [1, 10000], got {ratios}")
    if method == "percentile":
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile must lie in [50, 100], got {percentile}")
        return _percentile_range(counts, low, high, 1 - percentile / 100)
    if method not in ("squared_error", "entropy"):
        raise ValueError(f"method must be percentile, squared_error or entropy, got {method!r}")
    twin = _kernels if _COMPILED else reference
    ratio = twin.histogram_ratio(counts, low, high, method == "entropy", bits, ratios) / ratios
    return ratio * low, ratio * high


def _percentile_range(counts: NDArray[np.int64], low: float, high: float, left_out: float) -> tuple[float, float]:
    """Bin edges that leave at most `left_out` of the counts outside, half at either end."""
    share = np.cumsum(counts) / counts.sum()
    edges = np.linspace(low, high, counts.size + 1)
    below = left_out / 2 if low < 0 else 0.0
    first = int(np.searchsorted(share, below, side="right"))
    last = int(np.searchsorted(share, 1 - (left_out - below) - 1e-12))
    return min(float(edges[first]), 0.0), max(float(edges[last + 1]), 0.0)


def _checked_bits(bits: int) -> int:
    if not isinstance(bits, int | np.integer) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number in [2, 8], got {bits!r}")
    return int(bits)


def _checked(name: str, array: NDArray[T], dtype: type[T], ndim: int) -> NDArray[T]:
    """`array` itself, C-contiguous (copied if it was not)."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(
            f"{name} must be a {ndim}-dimensional {np.dtype(dtype).name} array, got {array.ndim}-dimensional {array.dtype.name}"
        )
    return np.ascontiguousarray(array)


def _refuse_not_finite(weight: NDArray[np.float32]) -> None:
    bad = np.argwhere(~np.isfinite(weight))
    if len(bad):
        channel, index = bad[0]
        raise ValueError(f"weight must be finite, got {weight[channel, index]} at channel {channel}, index {index}")
