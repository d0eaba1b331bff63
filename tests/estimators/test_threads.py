"""Linear algebra keeps to one thread where the work of one core is promised, and only there."""

from collections.abc import Iterator

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  (has a BLAS of its own)
from threadpoolctl import threadpool_info, threadpool_limits

from tightrope.estimators.threads import one_blas_thread


def threads() -> list[int]:
    """Threads of each BLAS of this process."""
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def _two() -> Iterator[None]:
    with threadpool_limits(limits=2, user_api="blas"):
        yield


def test_every_blas_has_one_thread_inside_and_as_many_as_before_outside() -> None:
    before = threads()
    assert before and set(before) == {2}
    with one_blas_thread():
        with one_blas_thread():
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert threads() == before


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(np.linalg.LinAlgError), one_blas_thread():
        np.linalg.inv(np.zeros((2, 2)))
    assert set(threads()) == {2}


def test_a_function_has_one_thread_in_each_call() -> None:
    @one_blas_thread()
    def inside() -> list[int]:
        return threads()

    for _ in range(2):
        assert set(inside()) == {1}
        assert set(threads()) == {2}
