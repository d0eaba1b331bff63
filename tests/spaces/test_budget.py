"""Budgets as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.spaces import Budget, Cost, Limit
from tightrope.spaces.budget import Limits
from tightrope.spaces.errors import BudgetError

DENSE = Cost(8.0, 400_000, 10**6, peak_ram_bytes=2**20)
ALL = ("latency_ms", "size_bytes", "macs", "peak_ram_bytes")


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [
        ("latency<=0.25x", "latency_ms", 2.0), ("latency<=2ms", "latency_ms", 2.0), ("latency <= 500 us", "latency_ms", 0.5),
        ("latency<=1e-3s", "latency_ms", 1.0), ("size<=100KB", "size_bytes", 100e3), ("size<=.5X", "size_bytes", 200e3),
        ("size<=1MiB", "size_bytes", 2**20), ("ram<=256KiB", "peak_ram_bytes", 2**18), ("macs<=0.5x", "macs", 5e5),
        ("macs<=3M", "macs", 3e6), ("macs<=1234", "macs", 1234.0),
    ],
)  # fmt: skip
def test_limits_in_absolute_numbers(text: str, metric: str, value: float) -> None:
    (limit,) = Budget.parse(text).resolve(DENSE, ALL, "somewhere").top
    assert limit[0] == metric and limit[1] == pytest.approx(value, rel=1e-12)


NUMBERS = st.floats(1e-6, 1e6).map(lambda v: float(f"{v:g}"))


@given(NUMBERS, NUMBERS, st.none() | st.floats(-50, 0).map(lambda v: float(f"{v:g}")), st.booleans())
def test_text_comes_back(latency: float, size: float, floor: float | None, joined: bool) -> None:
    parts = [f"latency<={latency!r}x", f"size<={size!r}kB", *([] if floor is None else [f"accuracy>={floor!r}"])]
    budget = Budget.parse(",".join(parts) if joined else parts)
    assert budget.limits == (Limit("latency_ms", latency, True, parts[0]), Limit("size_bytes", size * 1e3, False, parts[1]))
    assert budget.floor == floor
    assert Budget.parse(budget.text) == budget


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must say what a policy may cost"), ([], "must say what"), ("latency", "cannot read the budget 'latency'"),
        ("latency<=fast", "cannot read"), ("latencyy<=2ms", "'latencyy' is no cost; did you mean 'latency'?"),
        ("latency>=2ms", "bounded from above"), ("latency<=2KB", "unit of 'latency<=2KB' must be x or one of"),
        ("latency<=0x", "greater than 0"), ("latency<=-1ms", "greater than 0"), ("latency<=2", "unit of"),
        ("latency<=2ms,latency<=0.5x", "must be bounded once"), ("accuracy>=1", "points below dense"),
        ("accuracy<=-1", "points below dense"), ("accuracy>=-1,accuracy>=-2", "given once"),
        ("accuracy>=-1x", "points below dense"),
        ("latency<=1ms;size<=2KB", "cannot read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(text: str, words: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert words in str(caught.value)


def test_a_device_that_cannot_tell_a_cost_says_so() -> None:
    with pytest.raises(BudgetError, match=r"'ort-cpu' cannot tell the cost in 'energy<=1mJ'; it tells latency, macs, ram, size"):
        Budget.parse("energy<=1mJ").resolve(DENSE, ALL, "ort-cpu")


def test_the_tightest_limit_counts() -> None:
    limits = Budget.parse("latency<=0.5x,size<=100KB").resolve(DENSE, ALL, "d")
    assert limits.use(Cost(4.0, 50_000, 1)) == 1.0 and limits.met(Cost(4.0, 50_000, 1))
    assert limits.use(Cost(2.0, 150_000, 1)) == 1.5 and not limits.met(Cost(2.0, 150_000, 1))
    assert Budget.parse("accuracy>=-1.0").resolve(DENSE, ALL, "d").use(Cost(1e9, 1, 1)) == 0.0


def test_two_limits_hold_together() -> None:
    first, second = Limits((("latency_ms", 2.0), ("size_bytes", 50.0))), Limits((("size_bytes", 40.0), ("peak_ram_bytes", 9.0)))
    assert first.within(second) == Limits((("latency_ms", 2.0), ("size_bytes", 40.0), ("peak_ram_bytes", 9.0)))
    assert second.within(Limits()) == second
