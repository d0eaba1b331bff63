"""Settings of all tests: they assert no times, and a busy machine is no failure."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tightrope.estimators.measured import fitted

SEARCHES = Path(__file__).parent / "search"
settings.register_profile("tightrope", deadline=None)
settings.load_profile("tightrope")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Searches take longest: with several workers they come first, so that none is left waiting for another in the end."""
    items.sort(key=lambda item: SEARCHES not in item.path.parents)


@pytest.fixture(scope="session", autouse=True)
def _however_noisy() -> Iterator[None]:
    """Tables are filled on any machine; users' are not (`fitted.quiet`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "MOST_NOISE", float("inf"))
        yield
