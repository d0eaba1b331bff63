"""A device's own flash and RAM hold in the search and in what ends it."""

from dataclasses import dataclass

import pytest
from problems import SPACE, Jagged, Watched

from tightrope.search import finish
from tightrope.search.distribute import Inline
from tightrope.search.study import Study, allowed
from tightrope.spaces import Budget
from tightrope.spaces.budget import Limits


@dataclass(frozen=True)
class Small(Jagged):
    """A device with so much flash."""

    flash_bytes: int = 0

    @property
    def limits(self) -> Limits:
        return Limits((("size_bytes", float(self.flash_bytes)),))


DENSE = Small().estimate(SPACE.network, SPACE.dense)


@pytest.mark.parametrize(("share", "room"), [(0.3, True), (1.9, True), (2.1, False)])
def test_room_counts_where_the_dense_model_comes_near_it(share: float, room: bool) -> None:
    device = Small(flash_bytes=int(share * DENSE.size_bytes))
    found = dict(allowed(Budget.parse("latency<=0.5x"), device, DENSE).top)
    assert found == {"latency_ms": DENSE.latency_ms / 2, **({"size_bytes": float(device.flash_bytes)} if room else {})}


def test_what_is_chosen_in_the_end_has_room_on_the_device() -> None:
    executor, device = Inline(Watched), Small(flash_bytes=DENSE.size_bytes // 3)
    with Study.start(SPACE, device, Budget.parse("latency<=0.5x"), executor, agent="random", trials=4) as study:
        study.run(executor)
        held = dict(finish._allowed(study).top)
    assert held["size_bytes"] == device.flash_bytes and held["latency_ms"] == pytest.approx(DENSE.latency_ms / 2)
    assert all(t.cost.size_bytes <= device.flash_bytes for t in study.trials)
