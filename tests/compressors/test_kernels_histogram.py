"""Histogram calibration against its NumPy twin, NumPy itself and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tightrope.compressors import _kernels, kernels
from tightrope.compressors.kernels import reference


@given(n=st.integers(0, 500), bins=st.integers(1, 300), seed=st.integers(0, 99), low=st.floats(-4, -0.5), high=st.floats(0, 4))
@settings(deadline=None)
def test_counts_equal_the_twin(n: int, bins: int, seed: int, low: float, high: float) -> None:
    values = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    low, high = float(np.float32(low)), float(np.float32(high))
    counts, twin = kernels.histogram(values, low, high, bins=bins), np.zeros(bins, np.int64)
    assert reference.histogram(values, low, high, twin) == 0
    np.testing.assert_array_equal(counts, twin)
    assert counts.sum() == n


def test_counts_equal_numpy_and_add_up_over_batches() -> None:
    values = np.random.default_rng(0).uniform(0, 1, (4, 50)).astype(np.float32)
    counts = kernels.histogram(values[:2], 0.0, 1.0, bins=64)
    kernels.histogram(values[2:], 0.0, 1.0, into=counts)
    np.testing.assert_array_equal(counts, np.histogram(values, 64, (0, 1))[0])


def test_outliers_go_to_the_ends() -> None:
    counts = kernels.histogram(np.array([-9, 9, np.inf, -np.inf, 0.1], np.float32), -1.0, 1.0, bins=4)
    assert counts.tolist() == [2, 0, 1, 2]


def bell(bins: int, seed: int, two_sided: bool) -> tuple[NDArray[np.int64], float, float]:
    values = np.random.default_rng(seed).laplace(size=20_000).astype(np.float32)
    values = values if two_sided else np.abs(values)
    low, high = min(float(values.min()), 0.0), float(values.max())
    return kernels.histogram(values, low, high, bins=bins), low, high


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bins", [300, 2048])
def test_the_ratio_equals_the_twin(two_sided: bool, entropy: bool, bits: int, bins: int) -> None:
    for seed in range(3):
        counts, low, high = bell(bins, seed, two_sided)
        args = (counts, low, high, entropy, bits, 100)
        assert _kernels.histogram_ratio(*args) == reference.histogram_ratio(*args)


def test_squared_error_clips_less_the_more_bits_there_are() -> None:
    counts, low, high = bell(2048, 0, True)
    tops = [kernels.clip_range(counts, low, high, "squared_error", bits=bits)[1] for bits in (2, 3, 4, 6, 8)]
    assert tops == sorted(tops) and tops[0] < 0.6 * tops[-1]


def test_squared_error_beats_every_other_ratio_on_the_values_themselves() -> None:
    values = np.random.default_rng(1).laplace(size=50_000).astype(np.float32)
    low, high = float(values.min()), float(values.max())

    def error(first: float, last: float) -> float:
        scale = (last - first) / 15
        return float(((values - first - scale * np.clip(np.rint((values - first) / scale), 0, 15)) ** 2).mean())

    chosen = kernels.clip_range(kernels.histogram(values, low, high), low, high, "squared_error", bits=4)
    assert error(*chosen) <= 1.01 * min(error(r / 100 * low, r / 100 * high) for r in range(1, 101))


@pytest.mark.parametrize("method", ["squared_error", "entropy"])
def test_a_uniform_distribution_is_not_clipped(method: str) -> None:
    counts = np.full(2048, 50, np.int64)
    assert kernels.clip_range(counts, 0.0, 3.0, method, bits=8) == (0.0, 3.0)  # type: ignore[arg-type]


def test_entropy_drops_a_far_outlier() -> None:
    values = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
    values[0] = 40
    counts = kernels.histogram(values, 0.0, 40.0, bins=4096)
    assert kernels.clip_range(counts, 0.0, 40.0, "entropy", bits=8)[1] < 10


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_percentiles_equal_numpy_to_a_bin(percentile: float) -> None:
    values = np.random.default_rng(3).normal(size=50_000).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    width = (high - low) / 2048
    found = kernels.clip_range(kernels.histogram(values, low, high), low, high, "percentile", percentile=percentile)
    out = (100 - percentile) / 2
    np.testing.assert_allclose(found, np.percentile(values, [out, 100 - out]), atol=1.01 * width)
    positive = np.abs(values)
    top = float(positive.max())
    found = kernels.clip_range(kernels.histogram(positive, 0.0, top), 0.0, top, "percentile", percentile=percentile)
    np.testing.assert_allclose(found, (0, np.percentile(positive, percentile)), atol=1.01 * top / 2048)


COUNTS = np.ones(8, np.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.histogram(np.array([np.nan], np.float32), 0.0, 1.0), "values must hold no NaN, got 1 of 1"),
        (lambda: kernels.histogram(np.zeros(1, np.float32), 1.0, 1.0), "low and high must be finite, low below high"),
        (lambda: kernels.histogram(np.zeros(1), 0.0, 1.0), "values must be a 1-dimensional float32"),  # type: ignore[arg-type]
        (lambda: kernels.histogram(np.zeros(1, np.float32), 0.0, 1.0, bins=0), "bins must be at least 1"),
        (lambda: kernels.histogram(np.zeros(1, np.float32), 0.0, 1.0, into=COUNTS[::2]), "into must be contiguous"),
        (lambda: kernels.clip_range(COUNTS, 0.5, 1.0, "entropy"), "low <= 0 <= high"),
        (lambda: kernels.clip_range(COUNTS * 0, 0.0, 1.0, "entropy"), "not all zero"),
        (lambda: kernels.clip_range(COUNTS, 0.0, 1.0, "median"), "method must be"),  # type: ignore[arg-type]
        (lambda: kernels.clip_range(COUNTS, 0.0, 1.0, "percentile", percentile=101), r"percentile must lie in \[50, 100\]"),
        (lambda: kernels.clip_range(COUNTS, 0.0, 1.0, "entropy", bits=1), "bits must be"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
