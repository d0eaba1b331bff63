"""What the compiled kernels must equal, in NumPy: their fallback where they are not built, and their test.

Arguments are taken as checked; `tightrope.compressors.kernels` checks them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ZERO_CHANNEL = 2.0**-100  # a channel whose magnitudes all lie below this counts as zeros


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """`n` codes -> `ceil(n * bits / 8)` bytes."""
    stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(stream.reshape(-1), bitorder="little")


def unpack_bits(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.uint8]:
    """`ceil(n * bits / 8)` bytes -> `n` codes."""
    stream = np.unpackbits(packed, bitorder="little")[: n * bits].reshape(n, bits)
    return np.packbits(stream, axis=1, bitorder="little").reshape(n)


def clip_scales(weight: NDArray[np.float32], bits: Sequence[int], ratios: int) -> NDArray[np.float32]:
    """`channels x n` weights -> `len(bits) x channels` scales."""
    top = np.abs(weight).max(axis=1, initial=0.0)
    zero = top < ZERO_CHANNEL
    magnitude = np.abs(weight) / np.where(zero, 1.0, top)[:, None].astype(np.float64)
    scales = np.ones((len(bits), len(weight)), np.float32)
    for row, width in zip(scales, bits, strict=True):
        levels = 2 ** (width - 1) - 1
        best = np.full(len(weight), np.inf)
        for step in range(ratios, 0, -1):
            unit = step / ratios / levels
            error = ((magnitude - unit * np.minimum(np.rint(magnitude / unit), levels)) ** 2).sum(axis=1)
            better = (error < best) & ~zero
            row[better] = (np.float32(step) / np.float32(ratios) * top / np.float32(levels))[better]
            best = np.minimum(best, error)
    return scales


def encode(weight: NDArray[np.float32], scales: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """`channels x n` weights -> symmetric codes, rounded half to even."""
    levels = 2 ** (bits - 1) - 1
    with np.errstate(over="ignore"):  # infinity is clamped with the rest
        codes = np.rint(weight * (np.float32(1) / scales)[:, None])
    return np.clip(codes, -levels, levels).astype(np.int8)


def histogram(values: NDArray[np.float32], low: float, high: float, counts: NDArray[np.int64]) -> int:
    """Add values to `counts`, in place; returns how many were NaN."""
    nan = np.isnan(values)
    bins = len(counts)
    at = (values[~nan].astype(np.float64) - low) * (bins / (high - low))
    counts += np.bincount(np.clip(at, 0, bins - 1).astype(np.int64), minlength=bins)
    return int(nan.sum())


def histogram_ratio(counts: NDArray[np.int64], low: float, high: float, entropy: bool, bits: int, ratios: int) -> int:
    """The step, of `ratios`, whose range `[r * low, r * high]` loses least when quantised to `2**bits` levels."""
    bins, levels = len(counts), 2**bits
    width = (high - low) / bins
    centres = low + (np.arange(bins) + 0.5) * width
    losses = np.full(ratios + 1, np.inf)
    for step in range(ratios, 0, -1):
        first, last = step / ratios * low, step / ratios * high
        if not entropy:
            scale = (last - first) / (levels - 1)
            codes = np.clip(np.rint((centres - first) / scale), 0, levels - 1)
            losses[step] = (counts * (centres - first - codes * scale) ** 2).sum()
            continue
        begin, end = (int(np.clip(np.rint((edge - low) / width), 0, bins)) for edge in (first, last))
        if end - begin < levels and step < ratios:
            break
        losses[step] = _divergence(counts.astype(np.float64), begin, end, levels)
    return ratios - int(np.argmin(losses[:0:-1]))


def _divergence(counts: NDArray[np.float64], begin: int, end: int, levels: int) -> float:
    inside = counts[begin:end]
    if not inside.any():
        return np.inf
    level = np.arange(end - begin) * levels // (end - begin)
    sums, kept = np.bincount(level, inside, levels), np.bincount(level, inside > 0, levels)
    q = np.where(inside > 0, sums[level] / np.maximum(kept[level], 1) / inside.sum(), 1e-9)
    p = inside.copy()
    p[0] += counts[:begin].sum()
    p[-1] += counts[end:].sum()
    p /= p.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
