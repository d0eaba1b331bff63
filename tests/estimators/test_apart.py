"""Work in a child process: what it returns comes back, what it leaves does not, and a failure is told with its reason."""

import os

import numpy as np
import pytest

from tightrope.estimators.measured.apart import apart
from tightrope.spaces.errors import DeviceError


def test_results_come_back_and_nothing_else_does() -> None:
    left: list[int] = []

    def work() -> tuple[int, np.ndarray]:  # type: ignore[type-arg]
        left.append(1)
        return os.getpid(), np.arange(1 << 18)  # more than a pipe holds at once

    child, found = apart(work)
    assert child != os.getpid() and not left
    assert np.array_equal(found, np.arange(1 << 18))


def test_a_failure_is_told_with_its_reason() -> None:
    def work() -> None:
        raise ValueError("no such unit")

    with pytest.raises(DeviceError, match="no such unit"):
        apart(work)


def test_a_death_is_told() -> None:
    with pytest.raises(DeviceError, match="without a result, with status 3"):
        apart(lambda: os._exit(3))
