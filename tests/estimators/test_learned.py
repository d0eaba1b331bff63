"""Nodes with many free sizes: which are timed, and what is learned from them."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

from tightrope.estimators.measured import learned as module
from tightrope.estimators.measured.grid import Axis, design
from tightrope.estimators.measured.learned import Learned
from tightrope.estimators.measured.table import Table, Untimed

MATMUL = "MatMul{}(f:4,*,*;f:4,*,*)->f:4,*,*"
CONCAT = "Concat{axis=1}(f:1,*,9,9;f:1,*,9,9)->f:1,*,9,9"
AXES = (Axis(0, "", (8, 128)), Axis(1, "", (8, 128)), Axis(2, "", (8, 128)))


def drawn(seed: int, count: int) -> list[tuple[int, ...]]:
    sizes = np.random.default_rng(seed).integers(8, 129, (count, 3)).tolist()
    return [(8, 8, 8), (128, 128, 128), *dict.fromkeys(tuple(s) for s in sizes)]


def test_nodes_to_time_are_met_ones_spread_over_all_axes() -> None:
    met = {(m, k, k, n, m, n) for m, k, n in product(range(8, 130, 8), repeat=3)}
    found = design(MATMUL, met)
    assert [a.column for a in found.axes] == [0, 1, 3]
    assert len(found.keys) == 24 and set(found.keys) <= met
    places = np.log(np.array(found.keys))[:, [0, 1, 3]]
    for corner in product((np.log(8), np.log(128)), repeat=3):  # no part of the space is far from all
        assert np.abs(places - corner).max(axis=1).min() < np.log(128 / 8) / 2
    few = {(a, b, a + b) for a in (8, 16, 24) for b in (8, 16, 24)}
    assert set(design(CONCAT, few).keys) == few


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.floats(0.0, 1.2)] * 3), st.floats(0.001, 10.0), st.integers(0, 99))
def test_a_power_law_is_learned(powers: tuple[float, ...], scale: float, seed: int) -> None:
    def times(sizes: list[tuple[int, ...]]) -> np.ndarray:
        return scale * np.prod(np.array(sizes, float) ** powers, axis=1)

    known, others = drawn(seed, 22), drawn(seed + 100, 50)
    made = Learned(AXES, dict(zip(known, times(known).tolist(), strict=True)))
    assert made.error < 0.01
    assert made.at(np.array(others)) == pytest.approx(times(others), rel=0.02)


def test_beyond_the_axes_nothing_is_told() -> None:
    made = Learned(AXES, dict.fromkeys(drawn(0, 22), 1.0))
    assert np.isnan(made.at(np.array([[7, 64, 64], [64, 129, 64], [64, 64, 64]]))).tolist() == [True, True, False]
    table = Table(None, {})
    found = design(CONCAT, {(a, b, a + b) for a in (8, 16, 24, 32) for b in (8, 16, 24)})
    table.declare({CONCAT: found})
    table.add([(CONCAT, sizes) for sizes in found.keys], np.full((4, len(found.keys)), 0.5), 1.0, 0.0)
    assert table.time((CONCAT, (12, 16, 28))) == pytest.approx(0.5)
    assert table.learned() == {CONCAT: pytest.approx(0.0, abs=1e-9)}
    with pytest.raises(Untimed):
        table.time((CONCAT, (48, 16, 64)))


def test_a_timed_node_has_its_own_time() -> None:
    rng, table = np.random.default_rng(0), Table(None, {})
    found = design(CONCAT, {(a, b, a + b) for a in range(8, 64, 8) for b in range(8, 64, 8)})
    times = rng.uniform(0.1, 1, len(found.keys)).round(6)
    table.declare({CONCAT: found})
    table.add([(CONCAT, sizes) for sizes in found.keys], np.tile(times, (4, 1)), 1.0, 0.0)
    assert table.times(CONCAT, np.array(found.keys)) == pytest.approx(times)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_that_of_learning_anew_without_each(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scikit-learn's Gaussian process with the same covariance, fitted once for each node that is left out."""
    for name, value in {"LENGTHS": (1.0,), "NOISES": (0.1,), "BLOCKS": (0.0,)}.items():
        monkeypatch.setattr(module, name, value)
    rng = np.random.default_rng(seed)
    sizes = drawn(seed, 18)
    times = np.prod(np.array(sizes, float), axis=1) ** 0.5 * rng.uniform(0.8, 1.2, len(sizes))
    logs = np.log(np.array(sizes, float))
    places, targets = (logs - logs.mean(0)) / logs.std(0), np.log(times)

    def process(keep: Any) -> Any:
        trend = ConstantKernel(module.TREND) * DotProduct(1.0)
        made = GaussianProcessRegressor(trend + RBF(1.0), alpha=0.1, optimizer=None)
        return made.fit(places[keep], targets[keep] - targets.mean())

    left = [np.expm1(process(np.arange(len(sizes)) != i).predict(places[[i]])[0] + targets.mean() - targets[i])
            for i in range(len(sizes))]  # fmt: skip
    found = Learned(AXES, dict(zip(sizes, times.tolist(), strict=True)))
    assert found.left_out == pytest.approx(np.array(left), rel=1e-6)
    assert found.error == pytest.approx(np.mean(np.abs(left)), rel=1e-6)
    whole = process(np.arange(len(sizes)))
    others = np.array(drawn(seed + 50, 20))
    expected = np.exp(whole.predict((np.log(others) - logs.mean(0)) / logs.std(0)) + targets.mean())
    assert found.at(others) == pytest.approx(expected, rel=1e-6)
