"""Rows of numbers that are found by 64-bit marks, for many marks at once: quicker than a dictionary and than bisection."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Marks = NDArray[np.uint64]
Rows = NDArray[np.float64]
Places = NDArray[np.int64]
END = np.uint64(2**64 - 1)  # stands behind all marks
ODD = np.uint64(0x9E3779B97F4A7C15)


class Marked:
    """A table of rows of one shape. The upper bits of marks have to be as good as random, as those of `spread` codes are.

    Args:
        most: rows that are kept; a look begins anew where there are more.
    """

    def __init__(self, shape: tuple[int, ...], most: int = 1 << 17) -> None:
        self._shape, self._most = shape, most
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._marks, self.rows = np.array([END]), np.full((1, *self._shape), np.nan)
        self._index()

    def look(self, marks: Marks, make: Callable[[Places], Rows]) -> Places:
        """The places of marks among `rows`.

        Args:
            make: gives the rows of marks that are new, by their places in `marks`, flattened.
        """
        if len(self.rows) > self._most:
            self.clear()
        found = self._places(marks)
        new = np.flatnonzero(self._marks.take(found) != marks)
        if not len(new):
            return found
        fresh, first = np.unique(marks.ravel()[new], return_index=True)
        every = np.concatenate([fresh, self._marks])
        order = np.argsort(every)
        self._marks, self.rows = every[order], np.concatenate([make(new[first]), self.rows])[order]
        self._index()
        return self._places(marks)

    def _index(self) -> None:
        """Where the marks of each beginning start, of four times as many as there are marks, and how many one has at most."""
        bits = len(self._marks).bit_length() + 2
        self._shift = np.uint64(64 - bits)
        self._starts = np.searchsorted(self._marks, np.arange(1 << bits, dtype=np.uint64) << self._shift)
        self._crowd = int(np.diff(self._starts, append=len(self._marks)).max())

    def _places(self, marks: Marks) -> Places:
        """The places of the first marks that are not less."""
        found: Places = self._starts.take(marks >> self._shift)
        for _ in range(self._crowd):
            found += self._marks.take(found) < marks
        return found


def spread(codes: NDArray[np.int64]) -> Marks:
    """Marks of whole numbers: each has its own, since the factor is odd, and neighbours are far apart."""
    return codes.astype(np.uint64) * ODD
