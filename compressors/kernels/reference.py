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
