"""Rows that are found by marks: as a dictionary finds them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tightrope.estimators.marked import Marked, spread

UPPER = st.integers(0, 3).map(lambda top: top << 48)  # marks that begin alike
MARK = st.builds(lambda top, low: top | low, UPPER, st.integers(0, 50)) | st.integers(0, 2**64 - 2)


@given(parts=st.lists(st.lists(MARK, min_size=1, max_size=40), max_size=5), most=st.integers(1, 60))
def test_rows_are_found_as_in_a_dictionary(parts: list[list[int]], most: int) -> None:
    table, made = Marked((2,), most), dict[int, float]()
    for part in parts:
        kept = made if len(made) < most else dict[int, float]()

        def make(places: NDArray[np.int64], part: list[int] = part, kept: dict[int, float] = kept) -> NDArray[np.float64]:
            new = [part[i] for i in places.tolist()]
            assert sorted(new) == sorted({*part} - {*kept})
            kept |= {mark: len(kept) + i for i, mark in enumerate(new)}
            return np.array([[kept[mark], -kept[mark]] for mark in new])

        places = table.look(np.array([part], np.uint64), make)
        assert table.rows[places].tolist() == [[[kept[mark], -kept[mark]] for mark in part]]
        made = kept


@given(codes=st.lists(st.integers(0, 2**63 - 1), unique=True, min_size=2))
def test_each_code_has_a_mark_of_its_own(codes: list[int]) -> None:
    assert len({*spread(np.array(codes)).tolist()}) == len(codes)
