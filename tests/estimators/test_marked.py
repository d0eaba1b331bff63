"""Rows that are found by marks: as a dictionary finds them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tightrope.estimators.measured.marked import Marked

UPPER = st.integers(0, 3).map(lambda top: top << 48)  # marks that begin alike
MARK = st.builds(lambda top, low: top | low, UPPER, st.integers(0, 50)) | st.integers(0, 2**64 - 2)


@given(parts=st.lists(st.lists(MARK, max_size=40), max_size=4), asked=st.lists(MARK, min_size=1, max_size=60))
def test_rows_are_found_as_in_a_dictionary(parts: list[list[int]], asked: list[int]) -> None:
    known: dict[int, float] = {}
    table = Marked(2)
    for part in parts:
        fresh = [mark for mark in dict.fromkeys(part) if mark not in known]
        rows = np.arange(2 * len(fresh), dtype=np.float64).reshape(-1, 2) + 100 * len(known)
        known |= dict(zip(fresh, rows[:, 0].tolist(), strict=True))
        table.add(np.array(fresh, np.uint64), rows)
    every = [*asked, *known]
    places, missing = table.places(np.array([every], np.uint64))
    assert missing.tolist() == [[mark not in known for mark in every]]
    for mark, place in zip(every, places[0].tolist(), strict=True):
        if mark in known:
            assert table.rows[place].tolist() == [known[mark], known[mark] + 1]
