"""Rows of numbers that are found by 64-bit marks, for many marks at once: quicker than a dictionary and than bisection."""

import numpy as np
from numpy.typing import NDArray

Marks = NDArray[np.uint64]
Rows = NDArray[np.float64]
BITS = 16  # of a mark that are looked up directly
END = np.uint64(2**64 - 1)  # stands behind all marks


class Marked:
    """A table of rows of so many numbers; marks have to be as good as random in their upper bits."""

    def __init__(self, columns: int) -> None:
        self._marks, self.rows = np.array([END]), np.full((1, columns), np.nan)
        self._index()

    def _index(self) -> None:
        """Where the marks of each beginning start, and how many one has at most."""
        self._starts = np.searchsorted(self._marks, np.arange(1 << BITS, dtype=np.uint64) << np.uint64(64 - BITS))
        self._most = int(np.diff(self._starts, append=len(self._marks)).max())

    def places(self, marks: Marks) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The places of marks among `rows`, and which of them are not there; of the shape of `marks`."""
        found = self._starts.take(marks >> np.uint64(64 - BITS))
        for _ in range(self._most):
            found += self._marks.take(found) < marks
        return found, self._marks.take(found) != marks

    def add(self, marks: Marks, rows: Rows) -> None:
        """Add rows whose marks are not there."""
        marks = np.concatenate([marks, self._marks])
        order = np.argsort(marks)
        self._marks, self.rows = marks[order], np.concatenate([rows, self.rows])[order]
        self._index()
