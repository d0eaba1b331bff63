"""The range that an activation's codes span."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["mse", "percentile", "minmax"]
METHODS: tuple[Method, ...] = ("mse", "percentile", "minmax")
PERCENTILE = 99.99
SHARES = np.geomspace(0.1, 1.0, 29)


def choose(samples: NDArray[np.float32], low_high: tuple[float, float], bits: int, method: Method) -> tuple[float, float]:
    """The range `(low, high)`, zero inside, for unsigned codes of this many bits.

    `minmax` takes the extremes seen; `percentile` cuts 0.01 % off each end; `mse` takes the share of the extremes that
    minimises the squared error on the samples, clipping included.
    """
    low, high = min(low_high[0], 0.0), max(low_high[1], 0.0)
    if method == "minmax" or high - low < 1e-12:
        return low, high
    if method == "percentile":
        return min(float(np.percentile(samples, 100 - PERCENTILE)), 0.0), max(float(np.percentile(samples, PERCENTILE)), 0.0)
    values, levels = samples[: 1 << 13].astype(np.float32), 2**bits - 1
    best, least = (low, high), np.inf
    for share in SHARES:
        scale = np.float32((high - low) * share / levels)
        zero = np.clip(np.round(-low * share / scale), 0, levels).astype(np.float32)
        codes = np.clip(np.round(values / scale) + zero, 0, levels)
        error = float(np.square((codes - zero) * scale - values).sum())
        if error < least:
            best, least = (low * float(share), high * float(share)), error
    return best
